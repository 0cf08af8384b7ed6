"""What a call of another codebase's self-attention is about, and what Wan's attention makes of a window."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.kernel import attend
from mlaconvert.model.rope import Rotary, rotary, rotate

PARTS = ("q", "k", "v", "o", "norm_q", "norm_k")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Pass(NamedTuple):
    """One call of one layer's self-attention.

    Pass(x, grid=(3, 30, 52), start=6, cache=kv_cache)
    """

    x: Tensor
    """Its inputs [B, N, D], after the block's norm and modulation; tokens beyond the grid are padding."""
    grid: tuple[int, int, int]
    """Frames, height and width in tokens."""
    start: int = 0
    """The number of its first frame in the video."""
    cache: Any = None
    """What it reads the past from, another object for another video side by side; None where all is in `x`."""
    queries: int | None = None
    """How many of its last frames are the newest, where the past is in `x` as well; None: all."""


Read = Callable[[Mapping[str, Any]], Pass | None]
"""Gives the pass of one call, by the names of its arguments; None for a call that is not to be looked at."""


def read_pass(arguments: Mapping[str, Any]) -> Pass | None:
    """The pass of a call as Wan's own code, Self-Forcing's kin and world models make it.

    None for whole clips under a mask, as in training. Raises UnsupportedModelError for another call.
    """
    sizes, cache = arguments.get("grid_sizes"), arguments.get("kv_cache")
    x = next(iter(arguments.values()), None)
    if not isinstance(x, Tensor) or x.ndim != 3 or not isinstance(sizes, Tensor) or sizes.shape[-1:] != (3,):
        raise UnsupportedModelError(
            f"self-attention is called with {', '.join(arguments)}: expected tokens [B, N, D], grid_sizes, and with a "
            "cache kv_cache and current_start; say what a call is about with collect(..., read=...)"
        )
    rows = sizes.reshape(-1, 3).tolist()
    frames, height, width = (int(size) for size in rows[0])
    if any(row != rows[0] for row in rows):
        raise UnsupportedModelError("videos of several sizes are in one batch; run one size at a time")
    if cache is None:
        masked = arguments.get("block_mask") is not None or x.shape[1] >= 2 * prod(rows[0])
        return None if masked else Pass(x, (frames, height, width))
    start, rest = divmod(int(arguments.get("current_start", 0)), height * width)
    if rest:
        raise UnsupportedModelError(
            f"a chunk begins at token {arguments['current_start']}, which is no frame of {height} x {width} tokens; "
            "say what a call is about with collect(..., read=...)"
        )
    return Pass(x, (frames, height, width), start, cache)


class Attention:
    """One layer's self-attention in another codebase. Raises UnsupportedModelError unless it has Wan's plain parts."""

    def __init__(self, module: nn.Module, index: int) -> None:
        self.module = module
        try:
            parts = [module.get_submodule(name) for name in PARTS]
            weights = [part.get_parameter("weight") for part in parts]
            biases = [part.get_parameter("bias") for part in parts[:4]]
            self.heads = int(module.num_heads)  # type: ignore[arg-type]
        except (AttributeError, TypeError, ValueError):
            raise UnsupportedModelError(
                f"blocks.{index}.self_attn ({type(module).__name__}) has not Wan's q, k, v, o, norm_q, norm_k and "
                "num_heads with plain weights; collect before the model is fused, quantised or given adapters"
            ) from None
        self.dim = weights[0].shape[1]
        square = all(weight.shape == (self.dim, self.dim) for weight in weights[:4])
        if not square or any(weight.shape != (self.dim,) for weight in weights[4:]):
            raise UnsupportedModelError(
                f"blocks.{index}.self_attn ({type(module).__name__}) has weights of other shapes than Wan's, "
                f"{[list(weight.shape) for weight in weights]}; there is no calibration for it"
            )
        if weights[0].dtype not in _FLOATS or any(part.is_meta for part in weights):
            raise UnsupportedModelError(
                f"blocks.{index}.self_attn holds weights of {weights[0].dtype} on {weights[0].device}; collect on "
                "plain weights in float32, bfloat16 or float16, once they are loaded"
            )
        self.dtype = weights[0].dtype
        names = [f"{name}_weight" for name in PARTS[:4]] + [*PARTS[4:]] + [f"{name}_bias" for name in PARTS[:4]]
        self.weights = AttentionWeights(**dict(zip(names, [*weights, *biases], strict=True)))
        self._signature = inspect.signature(module.forward)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by their names."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def takes(self, name: str) -> bool:
        """Whether a call can have an argument of this name."""
        return name in self._signature.parameters

    def output(self, x: Tensor, grid: tuple[int, int, int], positions: tuple[int, ...], queries: int) -> Tensor:
        """What Wan's attention gives for the last `queries` frames [1, n, D] of a window x [1, N, D]."""
        part: dict[str, nn.Module] = {name: self.module.get_submodule(name) for name in PARTS}
        first = x.shape[1] - queries * grid[1] * grid[2]
        split = WanConfig(dim=self.dim, num_heads=self.heads, num_layers=1, ffn_dim=1).rope_split
        turn = rotary(torch.tensor(positions, device=x.device), *grid[1:], split)
        heads = (self.heads, -1)
        q = part["norm_q"](part["q"](x[:, first:])).unflatten(-1, heads)
        k = part["norm_k"](part["k"](x)).unflatten(-1, heads)
        v = part["v"](x).unflatten(-1, heads)
        made = attend(rotate(q, Rotary(turn.cos[first:], turn.sin[first:])), rotate(k, turn), v, None)
        out: Tensor = part["o"](made.flatten(-2))
        return out
