"""mlaconvert: give a pretrained video diffusion transformer Multi-Head Latent Attention."""

__version__ = "0.1.0"
