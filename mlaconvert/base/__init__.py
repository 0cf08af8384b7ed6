"""What a model's base repository adds: the text encoder and the VAE."""
