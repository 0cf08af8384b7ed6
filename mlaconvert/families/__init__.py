"""Model families: which checkpoint is what, under which names, and how LoRAs and wrappers lie around it."""
