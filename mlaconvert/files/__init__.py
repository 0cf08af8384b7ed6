"""Reading what is not trusted, writing what appears whole or not at all. Knows files and tensors, no models."""
