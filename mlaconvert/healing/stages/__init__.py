"""The stages of healing, a file each."""
