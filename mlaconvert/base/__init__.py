"""What a model's base repository adds: the text encoder and the VAE.

`repository` finds and checks it, `text` embeds prompts, `vae` turns video into latents and back, piece by piece.

    from mlaconvert.base.repository import open_base
    from mlaconvert.base.vae import Vae

    vae = Vae.load(open_base("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
"""
