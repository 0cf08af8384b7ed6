"""Measuring what self-attention really reads, and choosing each layer's latent by it."""
