"""Self-attention of converted layers as diffusers' hooks, backends and processors expect it.

Needs the extra `diffusers`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.integrations.contract import CachedLayer, Contract
from mlaconvert.model.attention.kernel import AttentionMode, AttentionPlan, Segment, by_token, padded, segments_of
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.cache import LayerCache
from mlaconvert.model.rope import Rotary


class LatentAttnProcessor:
    """Says which of diffusers' attention backends computes latent attention; the maths is the module's own."""

    _attention_backend: Any = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`attend` by diffusers' choice of backend."""
        value = v.shape[-1]
        q, k, v = padded(*(x.to(v.dtype) for x in (q, k, v)))
        made: Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=self._attention_backend)
        return made[..., :value]


class LatentSelfAttention(LatentAttention, AttentionModuleMixin):  # type: ignore[misc]
    """`LatentAttention` where diffusers' blocks have their `attn1`; its output projection is `to_out.0`.

    diffusers' hooks for attention layers (Pyramid Attention Broadcast, FasterCache, ...) find it by its base class.
    """

    mode: AttentionMode = "auto"
    is_cross_attention = False
    _supports_qkv_fusion = False  # the projections read different inputs

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer, cached: CachedLayer) -> None:
        super().__init__(config, mla, layer)
        self.cached = cached
        self.to_out = nn.ModuleList((self.o,))
        del self.o
        self.processor = LatentAttnProcessor()

    @property
    def to_q(self) -> nn.Module:
        """The projection of queries before their norm, for hooks that look for it by diffusers' name."""
        return self.q_a_proj

    def set_processor(self, processor: Any) -> None:
        """Take another `LatentAttnProcessor`. Raises UnsupportedModelError for a processor of dense attention."""
        check_processor(processor)
        self.processor = processor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.processor.attend(q, k, v, mask, self.scale)

    def attended(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """As `CachedAttention` has it."""
        made: Tensor = self.to_out[0](self.heads(x, plan, cache))
        return made

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Any, ...] = (),
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `rotary_emb` is what diffusers' rotary embedding makes, or `ChunkRope`.

        `attention_mask` is bool, broadcast to [B, H, N, N], True where a query sees a key; it wins over `ChunkRope`'s.
        """
        cos, sin, *chunks = rotary_emb
        mask, segments = chunks or (None, ())
        if attention_mask is not None:
            mask = attention_mask
            segments = _segments(mask, mask._version) if self.v_proj is not None else ()
        turn = Rotary(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
        plan = AttentionPlan(query_rotary=turn, key_rotary=turn, mask=mask, mode=self.mode, segments=segments)
        return self.attended(hidden_states, plan)


@lru_cache(maxsize=1)  # all layers of a pass have the same mask
def _segments(mask: Tensor, version: int) -> tuple[Segment, ...]:
    """`segments_of` a mask of tokens. Raises UnsupportedModelError for one that differs between videos or heads."""
    if mask.numel() != mask.shape[-1] ** 2:
        raise UnsupportedModelError(
            f"attention_mask is {list(mask.shape)}: beside an exact present, one mask serves all videos and heads; "
            "give it as [N, N], or leave it out"
        )
    return segments_of(mask.reshape(mask.shape[-2:]))


def check_processor(processor: Any) -> None:
    """Raise UnsupportedModelError for a processor that does not compute latent attention."""
    if not isinstance(processor, LatentAttnProcessor):
        raise UnsupportedModelError(
            f"{type(processor).__name__} computes dense attention, which a converted layer has not; set processors by "
            "name (a dict) and leave those of converted layers as attn_processors gives them"
        )


class ChunkRope(WanRotaryPosEmbed):  # type: ignore[misc]
    """diffusers' rotary embedding, and behind it the mask and segments of a model that is causal between chunks."""

    def __init__(self, config: WanConfig, contract: Contract, max_frames: int) -> None:
        super().__init__(config.head_dim, config.patch_size, max_frames)
        self.contract = contract

    def forward(self, hidden_states: Tensor) -> tuple[Any, ...]:
        """[B, C, F, H, W] -> cosines and sines [1, N, 1, D]; of a streaming model also its mask, bool [N, N], and
        what `AttentionPlan` has as segments.
        """
        turn: tuple[Tensor, Tensor] = super().forward(hidden_states)
        frames = hidden_states.shape[2] // self.patch_size[0]
        visible = self.contract.visible(frames)
        if visible is None:
            return turn
        return (*turn, *by_token(visible.to(hidden_states.device), turn[0].shape[1] // frames))


class ChunkCausalProcessor(WanAttnProcessor):  # type: ignore[misc]
    """diffusers' dense self-attention with the mask that `ChunkRope` hands over."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Any, ...] = (),
    ) -> Tensor:
        cos, sin, chunks, _ = rotary_emb
        mask = chunks if attention_mask is None else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, (cos, sin))
