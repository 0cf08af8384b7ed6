"""What config.json and recipes say of a model: its geometry, how it sees time, its latent attention."""
