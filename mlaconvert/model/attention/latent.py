"""Multi-Head Latent Attention on Wan's queries, keys and values."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import InputError
from mlaconvert.model.attention.cost import cheaper_mode, flops_per_byte
from mlaconvert.model.attention.kernel import (
    AttentionPlan,
    RMSNorm,
    Segment,
    attend,
    attend_both,
    attend_segments,
    inverse_rms,
    kernel_width,
    take,
    widen,
)
from mlaconvert.model.attention.projections import LatentQuery, LatentUp
from mlaconvert.model.cache import LayerCache
from mlaconvert.model.group_quantizer import GroupQuantizer
from mlaconvert.model.quantizer import CacheQuantizer
from mlaconvert.model.rope import Rope, Rotary


class Products(NamedTuple):
    """W_K and W_V in one product each, padded; see `LatentAttention.products`."""

    key: Tensor  # [H, w, c]
    value: Tensor  # [H, w, c]
    value_bias: Tensor  # [H, w]; zero where the output projection's bias has it


class OwnChunk(NamedTuple):
    """What the teacher makes of a chunk, without the past."""

    normed: Tensor  # [B, N, D], queries before they turn
    unnormed: Tensor  # [B, N, D], keys before their norm
    q: Tensor  # [B, N, H, d], turned
    k: Tensor  # [B, N, H, d], turned
    v: Tensor  # [B, N, H, d]


class LatentAttention(nn.Module):
    """Multi-Head Latent Attention (DeepSeek-V2, arXiv 2405.04434) with VideoMLA's shared 3D-RoPE key (2605.30351).

    A token caches its latent and, with `key_norm` "token", the teacher's key norm s = 1 / rms(W_K x + b_k), which
    scales keys but never values. What is turned by position follows `mla.rope`: a rotary key that all heads share,
    cached (unrotated) or read from the latent, or each head's own keys.

    With `mla.present` "exact", a chunk sees itself through the teacher's own keys and values, and latents are read for
    the past alone, in one softmax over both; the output projection is the teacher's.

    With a `group_quantizer`, the past is read as the cache gives it back, in a masked pass too.
    """

    group_quantizer: GroupQuantizer | None = None

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer) -> None:
        super().__init__()
        dim, heads, rank = config.dim, config.num_heads, layer.kv_lora_rank
        self.layer, self.num_heads, self.eps, self.scale = layer, heads, config.eps, mla.softmax_scale
        rope, width = layer.qk_rope_head_dim, layer.qk_nope_head_dim + layer.qk_rope_head_dim
        self.turns_heads = mla.rope == "head"
        self.turned_pairs = tuple(range(config.head_dim // 2)) if self.turns_heads else layer.component_pairs
        query_rank = mla.q_lora_rank or dim
        self.q_a_proj = nn.Linear(dim, query_rank)
        self.q_a_layernorm = RMSNorm(query_rank, config.eps)
        self.q_b_proj: nn.Module | None = None
        if mla.q_lora_rank is not None:
            self.q_b_proj = nn.Linear(query_rank, heads * width, bias=False)
        elif mla.past_queries:
            self.q_b_proj = LatentQuery(heads, config.head_dim, width)
        self.kv_a_proj_with_mqa = nn.Linear(dim, rank + mla.cached_rope(layer))
        self.k_rope_proj = nn.Linear(rank, rope) if mla.rope == "latent" and rope else None
        self.kv_a_layernorm = RMSNorm(rank, config.eps) if mla.key_norm == "latent" else None
        exact, value = mla.present == "exact", layer.v_head_dim
        self.keeps_norm = mla.key_norm == "token"
        self.k_norm_proj = nn.Linear(dim, dim) if self.keeps_norm or exact else None
        self.k_norm = RMSNorm(dim, config.eps) if exact else None
        self.v_proj = nn.Linear(dim, dim) if exact else None
        self.past_out_proj = LatentQuery(heads, value, config.head_dim) if exact and value < config.head_dim else None
        self.kv_b_proj = LatentUp(heads, layer.qk_nope_head_dim, value, rank, value_bias=exact)
        self.o = nn.Linear(dim if exact else heads * value, dim)
        self.kv_quantizer = CacheQuantizer(layer.scalar_bits) if layer.cache_bits else None
        self.rope = Rope()
        self._products: Products | None = None
        self._made_of: tuple[Tensor, int, int] | None = None  # the weight, where it lay, and its version

    def compress(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is cached of [B, N, D]: latent [B, N, r], any rotary key [B, N, R] (times s) and, in token mode, s.

        `keys` are the teacher's before their norm [B, N, D], where they are known already.
        """
        made = self.kv_a_proj_with_mqa(x)
        latent, rope = made[..., : self.layer.kv_lora_rank], made[..., self.layer.kv_lora_rank :]
        cached = (rope,) if rope.shape[-1] else ()
        if self.kv_a_layernorm is not None:
            return self.kv_a_layernorm(latent), *cached
        assert self.k_norm_proj is not None
        norm = inverse_rms(self.k_norm_proj(x) if keys is None else keys, self.eps).to(x.dtype)
        return latent, *(rope * norm for rope in cached), norm

    def remembered(
        self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What `compress` makes, as the cache gives it back: of `x`, or with a cache of the whole window."""
        made = self.compress(x, keys)
        if self.group_quantizer is not None and plan.window is None:
            return self.group_quantizer.round_trip(plan.frame_tokens, made)
        return plan.remember(cache, *made, quantizer=self.kv_quantizer)

    def unpack(self, cached: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latent, unrotated rotary key [B, M, R] (times s) and s [B, M, 1] of what `compress` made."""
        latent, *rest = cached
        norm = rest.pop() if self.keeps_norm else None
        if self.k_rope_proj is not None:
            rope = self.k_rope_proj(latent)
            return latent, rope if norm is None else rope * norm, norm
        return latent, rest[0] if rest else latent[..., :0], norm

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with a cache, the queries see its window."""
        return self.o(self.heads(x, plan, cache))

    def products(self) -> Products:
        """W_K and W_V, which make padded keys and values of the cached channels in one product each.

        The channels are [content, 1, rotary key] and zeros up to a multiple of 8: content-key bias and rotary key need
        no pass of their own. The same W_K maps queries into the latent space, and W_V leads back from there.
        """
        key, value, bias, value_bias = self.kv_b_proj()
        rope, content = self.layer.qk_rope_head_dim, key.shape[-1]
        width = kernel_width(key.shape[1] + rope, value.shape[1])
        channels = kernel_width(content + 1 + rope)
        turned = torch.eye(rope, channels - content - 1, dtype=key.dtype, device=key.device)
        turned = F.pad(turned, (content + 1, 0)).expand(self.num_heads, -1, -1)
        unturned = F.pad(torch.cat((key, bias.unsqueeze(-1)), -1), (0, channels - content - 1))
        rows = F.pad(torch.cat((unturned, turned), 1), (0, 0, 0, width - key.shape[1] - rope))
        value_bias = F.pad(value_bias, (0, width - value_bias.shape[1]))
        return Products(rows, F.pad(value, (0, channels - content, 0, width - value.shape[1])), value_bias)

    def refresh(self) -> None:
        """Make `products` once for all passes until the weights change."""
        weight, known = self.kv_b_proj.weight, self._made_of
        version = 0 if weight.is_inference() else weight._version + self.kv_b_proj.bias._version
        if known is None or known[0] is not weight or known[1:] != (weight.data_ptr(), version):
            with torch.no_grad():
                self._products = self.products()
            self._made_of = (weight, weight.data_ptr(), version)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attend` at this layer's scale; a subclass may choose another kernel."""
        return attend(q, k, v, mask, self.scale)

    def heads(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """Attention before its output projection: [B, N, D] -> [B, N, H * v], or [B, N, D] beside an exact present.

        Expanded attention builds the keys and values of every head; absorbed attention takes the cached channels as
        the one key and value of all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
        """
        known = self._products if cache is not None and not torch.is_grad_enabled() else None
        if self.v_proj is not None:
            own = self.own_chunk(x, plan)
            return self.beside_past(own, self.remembered(x, plan, cache, own.unnormed), plan, known)
        products = known or self.products()
        queries, turn = self._past_queries(self.q_a_layernorm(self.q_a_proj(x)), plan), self._key_turn(plan)
        if self.group_quantizer is not None and plan.window is None:
            # What a chunk sees of itself is not read from the cache: behind the past's latents stand its own.
            made = self.compress(x)
            past = self.group_quantizer.round_trip(plan.frame_tokens, made)
            cached = self.unpack(tuple(torch.cat(parts, 1) for parts in zip(past, made, strict=True)))
            mode, tokens = self._mode(plan, x.shape[1], x.shape[1], x), x.shape[1]
            q, k, v = self._read(queries, cached, Rotary(*(torch.cat((part, part)) for part in turn)), products, mode)
            (past_k, own_k), (past_v, own_v) = k.split(tokens, 1), v.split(tokens, 1)
            segments = plan.segments or (Segment(past=slice(0, 0)),)
            out = attend_segments(q, (past_k, past_v), (own_k, own_v), segments, self.attend)
        else:
            cached = self.unpack(self.remembered(x, plan, cache))
            mode = self._mode(plan, x.shape[1], cached[0].shape[1], x)
            q, k, v = self._read(queries, cached, turn, products, mode)
            out = self.attend(q, k, v, plan.mask)
        return self._values(out, products, mode).flatten(-2)

    def own_chunk(self, x: Tensor, plan: AttentionPlan) -> OwnChunk:
        """What the teacher makes of a chunk [B, N, D], for a layer whose present is exact."""
        assert self.k_norm_proj is not None
        assert self.k_norm is not None
        assert self.v_proj is not None
        heads, unnormed = (self.num_heads, -1), self.k_norm_proj(x)
        normed = self.q_a_layernorm(self.q_a_proj(x))
        return OwnChunk(
            normed,
            unnormed,
            self.rope(normed.unflatten(-1, heads), plan.query_rotary),
            self.rope(self.k_norm(unnormed).unflatten(-1, heads), plan.query_rotary),
            self.v_proj(x).unflatten(-1, heads),
        )

    def beside_past(
        self, own: OwnChunk, cached: tuple[Tensor, ...], plan: AttentionPlan, products: Products | None = None
    ) -> Tensor:
        """`heads` [B, N, D] of queries that see their own chunk exactly, and the past through its `cached` latents."""
        segments, turn = plan.segments, self._key_turn(plan)
        if len(segments) == 1:  # what nobody sees is not expanded
            ((some, seen, past),) = segments
            cached = tuple(take(part, past) for part in cached)
            turn = Rotary(*(take(part, past, 0) for part in turn))
            segments = (Segment(some, seen, slice(None)),)
        if not segments or not cached[0].shape[1]:
            return self.attend(own.q, own.k, own.v, None).flatten(-2)
        products = products or self.products()
        mode = self._mode(plan, own.q.shape[1], cached[0].shape[1], own.q)
        past_q = own.q if self.q_b_proj is None else self._past_queries(own.normed, plan)
        together = self.q_b_proj is None and self.past_out_proj is None  # the same queries, and heads as wide
        if together and len(segments) == 1:
            ((some, seen, _),) = segments
            beside = take(own.k, seen), take(own.v, seen)
            q, k, v = self._read(take(past_q, some), self.unpack(cached), turn, products, mode, beside)
            return self.attend(q, k, v, None)[..., : own.v.shape[-1]].flatten(-2)
        past_q, past_k, past_v = self._read(past_q, self.unpack(cached), turn, products, mode)
        made = []
        for some, seen, past in segments:
            present = take(own.q, some), take(own.k, seen), take(own.v, seen)
            read = take(past_q, some), take(past_k, past), take(past_v, past)
            if not read[1].shape[1]:
                made.append(self.attend(*present, None))
            elif together:
                k, v = (torch.cat((a, widen(b, a.shape[-1])), 1) for a, b in zip(read[1:], present[1:], strict=True))
                made.append(self.attend(read[0], k, v, None)[..., : own.v.shape[-1]])
            else:
                out, past_out, share = attend_both(present, read, self.scale)
                past_out = self._values(past_out, products, mode)
                if mode == "absorbed":
                    past_out = past_out + share * products.value_bias[:, : past_out.shape[-1]]
                if self.past_out_proj is not None:
                    past_out = self.past_out_proj(past_out.flatten(-2)).unflatten(-1, (self.num_heads, -1))
                made.append(out + past_out)
        return torch.cat(made, 1).flatten(-2)

    def _past_queries(self, queries: Tensor, plan: AttentionPlan) -> Tensor:
        """Queries [B, N, H, nope + rope] at their positions, which meet keys that are made of latents."""
        assert self.q_b_proj is not None
        layer = self.layer
        q_nope, q_rope = (
            self.q_b_proj(queries)
            .unflatten(-1, (self.num_heads, -1))
            .split((layer.qk_nope_head_dim, layer.qk_rope_head_dim), -1)
        )
        if self.turns_heads:
            q_nope = self.rope(q_nope, plan.query_rotary)
        return torch.cat((q_nope, self.rope(q_rope, plan.select(layer.component_pairs)[0])), -1)

    def _key_turn(self, plan: AttentionPlan) -> Rotary:
        """Rotations of the pairs of keys that turn."""
        return plan.key_rotary if self.turns_heads else plan.select(self.layer.component_pairs)[1]

    def _mode(self, plan: AttentionPlan, queries: int, keys: int, like: Tensor) -> Literal["expanded", "absorbed"]:
        """Which of the two reads `keys` latents for `queries` queries; "auto" is the cheaper.

        Raises InputError for absorbed attention where heads turn their own keys.
        """
        if self.turns_heads:
            if plan.mode == "absorbed":
                raise InputError(
                    "absorbed attention shares keys between heads, but this model turns each head's own; "
                    "use auto or expanded attention, or convert with --rope latent"
                )
            return "expanded"
        if plan.mode != "auto":
            return plan.mode
        return cheaper_mode(
            self.layer,
            num_heads=self.num_heads,
            content=self.layer.kv_lora_rank,
            queries=queries,
            keys=keys,
            itemsize=like.element_size(),
            flops_per_byte=flops_per_byte(like.device),
        )

    def _read(
        self,
        q: Tensor,
        cached: tuple[Tensor, Tensor, Tensor | None],
        turn: Rotary,
        products: Products,
        mode: Literal["expanded", "absorbed"],
        present: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, H, w or c], and keys and values [B, M, H, w or c] of what `unpack` gives, padded alike.

        `turn` are the rotations of the M keys, as `_key_turn` has them. Keys and values of a `present` [B, n, H, d] go
        behind expanded ones, each as soon as these are made: that keeps the peak of memory low.
        """
        (content, k_rope, norm), (w_key, w_value, value_bias) = cached, products
        turned = k_rope if self.turns_heads else self.rope(k_rope.unsqueeze(2), turn).squeeze(2)
        width, channels = w_key.shape[1:]
        one = torch.ones_like(content[..., :1]) if norm is None else norm
        zeros = content.new_zeros(()).expand(*content.shape[:2], channels - content.shape[-1] - 1 - turned.shape[-1])
        keys = torch.cat((content if norm is None else content * norm, one, turned, zeros), -1)  # [B, M, c]
        # Without s, the keys hold the content as it is, and zero columns of W_V skip the rest.
        values = keys if norm is None else widen(content, channels)
        q = widen(q, width)
        if mode == "absorbed":
            q = torch.einsum("bnhw,hwc->bnhc", q, w_key)
            k, v = (c.unsqueeze(2).expand(-1, -1, self.num_heads, -1) for c in (keys, values))
            return q, k, v
        bias = value_bias.flatten() if self.v_proj is not None else None
        k = F.linear(keys, w_key.flatten(0, 1)).unflatten(-1, (-1, width))
        if self.turns_heads:
            own = self.layer.qk_nope_head_dim
            k = widen(self.rope(k[..., :own], turn), width)
        if present is not None:
            k = torch.cat((k, widen(present[0], width)), 1)
        v = F.linear(values, w_value.flatten(0, 1), bias).unflatten(-1, (-1, width))
        if present is not None:
            v = torch.cat((v, widen(present[1], width)), 1)
        return q, k, v

    def _values(self, out: Tensor, products: Products, mode: Literal["expanded", "absorbed"]) -> Tensor:
        """[B, N, H, v] of what attention made of the values that `_read` gives."""
        value = self.layer.v_head_dim
        if mode == "expanded":
            return out[..., :value]
        return torch.einsum("bnhc,hvc->bnhv", out, products.value[:, :value])

    def keys(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """The keys of every head at their positions, [B, N, H, nope + rope], of inputs [B, N, D]."""
        content, k_rope, norm = self.unpack(self.remembered(x, plan))
        up_key, _, bias, _ = self.kv_b_proj()
        keys = torch.einsum("bmr,hdr->bmhd", content, up_key) + bias
        keys = keys if norm is None else keys * norm.unsqueeze(2)
        if self.turns_heads:
            return self.rope(keys, plan.key_rotary)
        turned = self.rope(k_rope.unsqueeze(2), plan.key_rotary.select(self.turned_pairs))
        return torch.cat((keys, turned.expand(-1, -1, self.num_heads, -1)), -1)
