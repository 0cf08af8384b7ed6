"""Speed and memory of dense and latent attention, side by side in one run."""
