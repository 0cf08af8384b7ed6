"""The built-in model and the clips that it was trained on."""
