"""Measuring what self-attention really reads, and choosing each layer's latent by it.

`windows` are the pairs of query and key that are measured, `walk` goes through the layers, `measure` sums what comes by
and `store` keeps it, `target` weighs splits, `refit` fits output and queries; `run` does all of it for a model.

    from mlaconvert.config.streaming import StreamingConfig
    from mlaconvert.conversion.calibration.windows import Regime

    regime = Regime.of(StreamingConfig(chunk_frames=3))  # which queries see which keys, at which timesteps
"""
