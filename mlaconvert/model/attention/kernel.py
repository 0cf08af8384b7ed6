"""What both kinds of self-attention share: the plan of a pass, RMSNorm, and the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.model.cache import LayerCache, WindowView
from mlaconvert.model.quantizer import CacheQuantizer
from mlaconvert.model.rope import Rotary

AttentionMode = Literal["auto", "expanded", "absorbed"]


Tokens = slice | Tensor
"""Some of the tokens of an axis: a run, or their indices [n]."""


class Segment(NamedTuple):
    """Queries that see the same keys, for layers whose present is exact.

    `own` tokens of the pass are the present: they and the queries see one another. `past` ones of the window are read
    from latents.
    """

    queries: Tokens = slice(None)
    own: Tokens = slice(None)
    past: Tokens = slice(None)


def take(x: Tensor, tokens: Tokens, dim: int = 1) -> Tensor:
    """`tokens` of an axis of `x`; a view where they are a run."""
    if isinstance(tokens, slice):
        start, end, _ = tokens.indices(x.shape[dim])
        return x.narrow(dim, start, end - start)
    return x.index_select(dim, tokens)


def segments_of(visible: Tensor, size: int = 1) -> tuple[Segment, ...]:
    """The segments of a pass in which frames of `size` tokens see one another as `visible`, bool [F, F], says.

    Row f has what frame f sees. Two frames are each other's present where each sees the other, as the frames of one
    chunk do; what a frame sees without being seen is its past.
    """
    mutual = visible & visible.mT
    other = (visible[1:] != visible[:-1]).any(1) | (mutual[1:] != mutual[:-1]).any(1)
    starts = [0, *(other.nonzero().flatten() + 1).tolist(), len(visible)]
    segments = []
    for start, end in pairwise(starts):
        own, past = (_tokens(which, size) for which in (mutual[start], visible[start] & ~mutual[start]))
        segments.append(Segment(slice(start * size, end * size), own, past))
    return tuple(segments)


def by_token(visible: Tensor, size: int) -> tuple[Tensor, tuple[Segment, ...]]:
    """The mask of tokens, bool [F * size, F * size], and the segments of a pass for `segments_of`'s arguments."""
    return visible.repeat_interleave(size, 0).repeat_interleave(size, 1), segments_of(visible, size)


def _tokens(chosen: Tensor, size: int) -> Tokens:
    """The tokens of the chosen ones, bool [F], of frames of `size` tokens; a slice where there are no gaps."""
    frames = chosen.nonzero().flatten()
    if not len(frames):
        return slice(0, 0)
    first, last = int(frames[0]), int(frames[-1])
    if last - first + 1 == len(frames):
        return slice(first * size, (last + 1) * size)
    return (frames[:, None] * size + torch.arange(size, device=frames.device)).flatten()


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one forward pass share: rotations, who sees whom, and where the cache is written.

    `mask` is bool [N, M], True where a query sees a key; None where every query sees every key. `turns` are the
    rotations of queries and keys for pairs that were selected beforehand. `segments` say the same as the mask, and in a
    window which keys are the chunk's own; none: every query and key is present. `frame_tokens` are the tokens of a
    frame, which only caches that are narrowed in groups ask for.
    """

    query_rotary: Rotary
    key_rotary: Rotary
    mask: Tensor | None = None
    window: WindowView | None = None
    mode: AttentionMode = "expanded"
    turns: Mapping[tuple[int, ...], tuple[Rotary, Rotary]] = field(default_factory=dict)
    segments: Sequence[Segment] = ()
    frame_tokens: int = 0

    def select(self, pairs: tuple[int, ...]) -> tuple[Rotary, Rotary]:
        """The rotations of queries and of keys for these pairs."""
        found = self.turns.get(pairs)
        return found or (self.query_rotary.select(pairs), self.key_rotary.select(pairs))

    def remember(
        self, cache: LayerCache | None, *new: Tensor, quantizer: CacheQuantizer | None = None
    ) -> tuple[Tensor, ...]:
        """Put the chunk's tensors into the cache and return the window's; without a cache, `new` itself.

        With a `quantizer`, all of them are what it makes of them; the cache then holds its bytes.
        """
        if cache is None or self.window is None:
            return new if quantizer is None else quantizer(*new)
        if quantizer is not None:
            (window,) = cache.update(self.window, quantizer.pack(*new))
            return quantizer.unpack(window, new)
        return tuple(x.to(n.dtype) for x, n in zip(cache.update(self.window, *new), new, strict=True))


class RMSNorm(nn.Module):
    """x * weight / rms(x) over the last axis, in float32 like Wan's."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # the fused kernels want one dtype
            return x * inverse_rms(x, self.eps).to(x.dtype) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept as [..., 1], in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def kernel_width(*widths: int) -> int:
    """The width that scores and values are padded to: the fused kernels want both alike, in multiples of 8."""
    return -(-max(widths) // 8) * 8


def widen(x: Tensor, width: int) -> Tensor:
    """`x` with zeros behind its last axis, up to `width`; itself where it is as wide (padding by nothing copies)."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., D] widened to one width that the fused kernels take."""
    width = kernel_width(q.shape[-1], v.shape[-1])
    return widen(q, width), widen(k, width), widen(v, width)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention: [B, N, H, Dq], [B, M, H, Dq], [B, M, H, Dv] -> [B, N, H, Dv]."""
    scale, value = scale or q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad:
        # The fused CPU kernel's backward is twice as slow as plain products in this dtype.
        scores = (q * scale) @ k.mT
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        q, k, v = padded(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :value]
    return out.transpose(1, 2)


def attend_segments(
    q: Tensor,
    past: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    segments: Sequence[Segment],
    attend: Callable[[Tensor, Tensor, Tensor, None], Tensor] = attend,
) -> Tensor:
    """Attention [B, N, H, Dv] of queries that see their past through other keys and values than their own chunk.

    `past` and `own` are keys and values [B, N, H, D] of all tokens.
    """
    made = []
    for some, seen, before in segments:
        k, v = (torch.cat((take(a, before), take(b, seen)), 1) for a, b in zip(past, own, strict=True))
        made.append(attend(take(q, some), k, v, None))
    return torch.cat(made, 1)


# torch's fused kernels that give the log-sum-exp besides; nothing public of torch does without compiling.
_LSE_KERNELS: dict[str, Callable[..., Any]] = {
    place: getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    for place, name in (
        ("cpu", "flash_attention_for_cpu"),
        ("cuda half", "flash_attention"),
        ("cuda", "efficient_attention"),
    )
}


def attend_both(
    present: tuple[Tensor, Tensor, Tensor], past: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over two sets of keys that are read with queries and values of their own.

    `present` and `past` are queries [B, N, H, D], keys [B, M, H, D] and values [B, M, H, Dv], each of its own widths
    and number of keys. Returns what each contributes to the output, [B, N, H, Dv] each, and the past's share of the
    probability, [B, N, H, 1].

    Each set is attended to on its own, and the two are merged by their log-sum-exp. Where gradients are wanted, or
    there is no kernel that tells it, keys of both sets stand side by side in one call, as wide as both together.
    """
    if not present[1].shape[1]:
        out = attend(*past, None, scale)
        return out.new_zeros(*out.shape[:-1], present[2].shape[-1]), out, torch.ones_like(out[..., :1])
    ours, theirs = _attend_lse(*present, scale), _attend_lse(*past, scale)
    if ours is None or theirs is None:
        return _side_by_side(present, past, scale)
    (out, lse), (past_out, past_lse) = ours, theirs
    share = torch.sigmoid(past_lse - lse).unsqueeze(-1)  # in float32
    return out * (1 - share).to(out.dtype), past_out * share.to(out.dtype), share.to(out.dtype)


def _attend_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Attention [B, N, H, Dv] and the log-sum-exp of its scores [B, N, H]; None where no kernel gives both."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    value = v.shape[-1]
    q, k, v = padded(*(x.to(v.dtype).transpose(1, 2) for x in (q, k, v)))
    half = v.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cpu":
        out, lse = _LSE_KERNELS["cpu"](q, k, v, scale=scale)
    elif q.device.type == "cuda" and half and q.shape[-1] <= 256:
        out, lse = _LSE_KERNELS["cuda half"](q, k, v, scale=scale)[:2]
    elif q.device.type == "cuda" and v.dtype == torch.float32:
        out, lse = _LSE_KERNELS["cuda"](q, k, v, None, True, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]  # padded to multiples of 32 queries
    else:
        return None
    return out[..., :value].transpose(1, 2), lse.transpose(1, 2)


def _side_by_side(
    present: tuple[Tensor, Tensor, Tensor], past: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_both` in one call. A last channel of the values tells the past's share."""
    (q, k, v), (past_q, past_k, past_v) = present, past
    wide = q.shape[-1], past_q.shape[-1]
    keys = torch.cat((F.pad(past_k, (wide[0], 0)), F.pad(k, (0, wide[1]))), 1)
    values = v.shape[-1], past_v.shape[-1]
    ones = past_v.new_ones(()).expand(*past_v.shape[:-1], 1)
    rows = torch.cat((F.pad(torch.cat((past_v, ones), -1), (values[0], 0)), F.pad(v, (0, values[1] + 1))), 1)
    out = attend(torch.cat((q, past_q), -1), keys, rows, None, scale)
    made = out.split((*values, 1), -1)
    return made[0], made[1], made[2]
