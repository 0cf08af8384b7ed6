"""The default cache of a converted model, at any width."""

from __future__ import annotations

from typing import NamedTuple

from mlaconvert.config.geometry import WanConfig


class Budget(NamedTuple):
    """Widths of one MLA layer; `q_lora_rank` is the paper's compressed query path."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    q_lora_rank: int


def default_budget(config: WanConfig) -> Budget:
    """VideoMLA's cache budget (arXiv 2605.30351) at any width: (192, 32, 96, 768) at width 1536, 12 heads.

    Latent and shared rotary key together take 7/48 of the width, rounded down, so that a token's cache shrinks
    by 92.7% at least. The rotary key is a quarter of a head, rounded to an even number (two scalars a complex
    pair, at least one pair); the latent takes the rest, at least one channel. Scores stay as wide as the
    teacher's heads, and the query latent is half the width.
    """
    rope = max(2, 2 * ((config.head_dim + 3) // 8))
    latent = max(1, 7 * config.dim // 48 - rope)
    return Budget(latent, rope, config.head_dim - rope, config.dim // 2)
