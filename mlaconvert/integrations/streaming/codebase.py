"""Whose causal model it is: found behind its wrappers, known by how its self-attention is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mlaconvert.errors import InputError, UnsupportedModelError

Positions = Literal["window", "absolute"]

_SELF_FORCING = ("kv_cache", "current_start", "cache_start")
_INFINITY_ROPE = (*_SELF_FORCING, "timestep")
_LONGLIVE = (*_SELF_FORCING, "sink_recache_after_switch")
_CAUSVID = ("kv_cache", "current_start", "current_end")
_CALLS = (_SELF_FORCING, _INFINITY_ROPE, _LONGLIVE, _CAUSVID)  # their self-attention's arguments from kv_cache on
# (what gives it away: an argument or an attribute of self-attention, whose it is, why latent attention does not do it)
_REFUSED = (
    ("incremental_update", "Reward-Forcing", "it blends evicted frames into its sink, keys after their norm and values "
     "before it, and one latent cannot hold both blends"),
    ("compression_alpha", "Reward-Forcing", "it blends evicted frames into its sink"),
    ("updating_cache", "Rolling Forcing", "it denoises several chunks in one pass and caches only the first of them"),
    ("kv_bank", "MemFlow", "it attends to a second cache too, of frames that it picks by prompt"),
    ("t_scale", "LongLive 2", "it scales time inside attention"),
)  # fmt: skip
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
DENSE = ("q", "k", "v", "o", "norm_q", "norm_k")
_FUSED = "to_qkv"  # krea's


@dataclass
class Codebase:
    """How their self-attention is called, and what trials have shown of it.

    `positions` are those of ours with which it computes the same; None before a trial could run. `frame_tokens` is the
    one number of tokens a frame that it counts rightly, None where it takes any. `waiting` are trials that could not
    run before the first chunk, which runs them by `compare`.
    """

    name: str
    arguments: tuple[str, ...]
    masks_beside_cache: bool = False
    positions: frozenset[Positions] | None = None
    frame_tokens: int | None = None
    waiting: tuple[Callable[..., tuple[frozenset[Positions], int | None]], ...] = ()
    compare: Callable[[Tensor | None, Tensor], None] | None = None

    @classmethod
    def of(cls, attention: nn.Module) -> Codebase:
        """Raises UnsupportedModelError, by name, for a call or a cache that latent attention cannot take over."""
        made = type(attention)
        parameters = tuple(inspect.signature(made.forward).parameters)
        for sign, whose, why in _REFUSED:
            if sign in parameters or hasattr(attention, sign):
                raise UnsupportedModelError(
                    f"{made.__name__} is {whose}'s (it has {sign}): {why}; keep its dense attention, "
                    "or run the converted model with mlaconvert generate, whose sink and window are plain"
                )
        if parameters[6:] not in _CALLS:
            shown = ", ".join(parameters[6:]) or "nothing"
            raise UnsupportedModelError(
                f"{made.__name__}.forward takes {shown} after block_mask; expected kv_cache, current_start and "
                "cache_start as in Self-Forcing, what Infinity-RoPE or LongLive 1 adds, or current_end as in CausVid; "
                "mlaconvert generate runs converted models without that code"
            )
        # krea's realtime code alone runs a clip under its mask and writes it into a cache in one call.
        return cls(made.__name__, parameters[6:], masks_beside_cache=hasattr(attention, "fuse_projections"))

    @property
    def hands_back(self) -> bool:
        """Whether a call ends as LongLive's does: with the new indices, for the model to set."""
        return self.arguments == _LONGLIVE

    @property
    def has_indices(self) -> bool:
        """Whether its cache has indices; CausVid's slots are counted from the start of the video."""
        return self.arguments != _CAUSVID

    @property
    def counts_to_window(self) -> bool:
        """Whether its queries stand where Infinity-RoPE puts them: as in the video, at most at the window's end."""
        return self.arguments == _INFINITY_ROPE

    def note(self, positions: frozenset[Positions], frame_tokens: int | None) -> None:
        """Take in what one trial found. Raises UnsupportedModelError when its layers count in different ways."""
        self.positions = positions if self.positions is None else self.positions & positions
        self.frame_tokens = frame_tokens or self.frame_tokens
        if not self.positions:
            raise UnsupportedModelError(
                f"layers of {self.name} count frames in different ways; keep its dense attention"
            )

    def admit(self, wanted: Positions | None, folder: Positions) -> Positions:
        """The positions to count by: those that were asked for, or else the folder's.

        Raises InputError when the folder's are not theirs and it was not said which shall hold.
        """
        chosen = wanted or folder
        if self.positions is not None and wanted is None and chosen not in self.positions:
            (theirs,) = self.positions
            raise InputError(
                f"{self.name} counts frames by positions {theirs!r}, the converted folder says {folder!r}, and with a "
                f"sink the two differ. Follow the codebase with swap_attention(..., positions={theirs!r}), or keep the "
                f"folder's with positions={folder!r}; the recipe field streaming.positions sets it in a conversion"
            )
        return chosen


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel and activation checkpointing wrapped."""
    names = list(module._modules)
    inner = module._modules[names[0]] if len(names) == 1 and names[0] in _WRAPPED else None
    return module if inner is None else unwrapped(inner)


def self_attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attention of each of a model's own blocks."""
    blocks = model._modules.get("blocks")  # wrappers such as PEFT's pass attributes through; only the model holds them
    found = [getattr(unwrapped(b), "self_attn", None) for b in blocks] if isinstance(blocks, nn.ModuleList) else []
    return [unwrapped(attention) for attention in found if isinstance(attention, nn.Module)]


def causal_model(model: nn.Module) -> nn.Module:
    """The one causal Wan model inside `model`. Raises UnsupportedModelError."""
    found = [part for part in model.modules() if self_attentions(part)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models with blocks of self_attn; "
            "give the causal model itself, such as pipeline.generator.model"
        )
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is sharded by FSDP, whose shards have no layers to replace; "
            "call swap_attention, or collect, before FSDP wraps the model"
        )
    return found[0]


def check_parts(attention: nn.Module, path: str) -> None:
    """Raise UnsupportedModelError when a dense self-attention has no weights, or some that ours would leave out."""
    if next(attention.parameters(), None) is None:
        raise UnsupportedModelError(f"{path} has no plain weights; call swap_attention before the model is quantised")
    for name in attention.state_dict():
        if name.split(".")[0] not in (*DENSE, _FUSED):
            raise UnsupportedModelError(
                f"{type(attention).__name__} has {path}.{name} beside Wan's q, k, v, o, norm_q and norm_k, and latent "
                "attention has nothing in its place; keep its dense attention"
            )
