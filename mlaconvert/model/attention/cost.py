"""FLOPs and bytes of latent attention, expanded or absorbed, and which of the two is cheaper."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mlaconvert.config.mla import MLALayer
from mlaconvert.model.attention.kernel import kernel_width

# What a device computes while it moves one byte, roughly: H100 and H200 in bfloat16 do 200 to 300 FLOPs, a CPU core 10.
FLOPS_PER_BYTE = {"cuda": 200.0, "cpu": 10.0}


def flops_per_byte(device: torch.device) -> float:
    """The balance of `FLOPS_PER_BYTE` for a device; unknown ones count as GPUs."""
    return FLOPS_PER_BYTE.get(device.type, FLOPS_PER_BYTE["cuda"])


class AttentionCost(NamedTuple):
    """Floating point operations (a multiplication and an addition are two) and bytes read and written."""

    flops: int
    bytes: int

    def seconds(self, flops_per_byte: float) -> float:
        """Time by the roofline, in units of one FLOP at the device's peak rate."""
        return max(float(self.flops), flops_per_byte * self.bytes)


def latent_cost(
    mode: Literal["expanded", "absorbed"],
    layer: MLALayer,
    *,
    num_heads: int,
    content: int,
    queries: int,
    keys: int,
    itemsize: int = 2,
) -> AttentionCost:
    """What latent attention costs one video between its query and output projections.

    `content` is the number of columns of kv_b_proj; `queries` and `keys` are counted in tokens, `itemsize` in bytes.
    With head width w = max(nope + rope, v) and key width c = content + 1 + rope, both rounded up to multiples of 8:
    expanded builds K and V by two products of 2 M c H w FLOPs each and attends with 4 N M H w; their 2 M H w scalars
    are written and read. Absorbed attends with 4 N M H c, and maps queries and outputs by 2 N c H (w + v); their
    2 N H c scalars are written and read. What both read and write alike is left out.
    """
    heads, value = num_heads, layer.v_head_dim
    width = kernel_width(layer.qk_nope_head_dim + layer.qk_rope_head_dim, value)
    channels = kernel_width(content + 1 + layer.qk_rope_head_dim)
    if mode == "expanded":
        flops = 2 * keys * channels * heads * 2 * width + 4 * queries * keys * heads * width
        return AttentionCost(flops, 2 * 2 * keys * heads * width * itemsize)
    flops = 4 * queries * keys * heads * channels + 2 * queries * channels * heads * (width + value)
    return AttentionCost(flops, 2 * 2 * queries * heads * channels * itemsize)


def cheaper_mode(
    layer: MLALayer,
    *,
    num_heads: int,
    content: int,
    queries: int,
    keys: int,
    itemsize: int,
    flops_per_byte: float,
) -> Literal["expanded", "absorbed"]:
    """The mode with the shorter roofline time, max(FLOPs, flops_per_byte * bytes) of `latent_cost`.

    A chunk of thousands of queries is bound by FLOPs: expanded wins, its heads are narrower. With few queries, what
    expanding the whole window costs rules: absorbed wins.
    """
    sizes = {"num_heads": num_heads, "content": content, "queries": queries, "keys": keys, "itemsize": itemsize}
    expanded = latent_cost("expanded", layer, **sizes).seconds(flops_per_byte)
    return "expanded" if expanded <= latent_cost("absorbed", layer, **sizes).seconds(flops_per_byte) else "absorbed"
