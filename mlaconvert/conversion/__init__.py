"""From a dense checkpoint to a folder with latent attention: recipe, plan, calibration, assembly."""
