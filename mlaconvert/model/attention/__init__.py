"""Self-attention, dense and latent, and what each costs."""
