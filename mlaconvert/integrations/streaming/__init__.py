"""Latent attention inside the published streaming codebases: Self-Forcing, LongLive, CausVid, and their kin.

    from mlaconvert.integrations.streaming import swap_attention
    swap_attention(pipeline, "self-forcing-mla")

Two lines in an inference script, anywhere between making the pipeline and running it. Their model keeps its blocks,
their pipeline its sampler and its cache dictionaries; only `self_attn` of converted layers is replaced, and every other
weight is read from the converted folder as well, because healing may have changed it.

Their dictionaries then hold under "k" what a layer caches of a token side by side, [B, tokens, latent + rotary + norm],
unrotated, and under "v" nothing; indices, eviction and sink are theirs. `attention` runs in their place, `codebase`
says whose code it is, `trial` compares what both do with a cache, `swap` puts one in for the other.
"""

from mlaconvert.integrations.streaming.attention import StreamingLatentAttention
from mlaconvert.integrations.streaming.swap import swap_attention

__all__ = ["StreamingLatentAttention", "swap_attention"]
