"""Multi-Head Latent Attention on Wan's queries, keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import InputError
from mlaconvert.model.attention.cost import cheaper_mode, flops_per_byte
from mlaconvert.model.attention.kernel import AttentionPlan, RMSNorm, attend, inverse_rms, kernel_width
from mlaconvert.model.cache import LayerCache
from mlaconvert.model.rope import Rope


class LatentQuery(nn.Module):
    """Up-projection of the exact query path: per head, [B, N, H * D] -> [B, N, H * (nope + rope)]."""

    def __init__(self, num_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width, head_dim))

    def forward(self, latent: Tensor) -> Tensor:
        heads = latent.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("bnhd,hed->bnhe", heads, self.weight).flatten(-2)


class LatentUp(nn.Module):
    """W_UK and W_UV by head, and the bias of the content keys."""

    def __init__(self, num_heads: int, nope: int, value: int, rank: int) -> None:
        super().__init__()
        self.split = (num_heads, nope, value)
        self.weight = nn.Parameter(torch.empty(num_heads * (nope + value), rank))
        self.bias = nn.Parameter(torch.empty(num_heads * nope))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_UK [H, nope, r], W_UV [H, v, r] and the key bias [H, nope]; a call, so that offloading hooks see it."""
        heads, nope, value = self.split
        key, up = self.weight.unflatten(0, (heads, nope + value)).split((nope, value), dim=1)
        return key, up, self.bias.unflatten(0, (heads, nope))


class LatentAttention(nn.Module):
    """Multi-Head Latent Attention (DeepSeek-V2, arXiv 2405.04434) with VideoMLA's shared 3D-RoPE key (2605.30351).

    A token caches its latent and, with `key_norm` "token", the teacher's key norm s = 1 / rms(W_K x + b_k), which
    scales keys but never values. What is turned by position follows `mla.rope`: a rotary key that all heads share,
    cached (unrotated) or read from the latent, or each head's own keys.
    """

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
        self.q_b_proj: nn.Module = (
            nn.Linear(query_rank, heads * width, bias=False)
            if mla.q_lora_rank is not None
            else LatentQuery(heads, config.head_dim, width)
        )
        self.kv_a_proj_with_mqa = nn.Linear(dim, rank + mla.cached_rope(layer))
        self.k_rope_proj = nn.Linear(rank, rope) if mla.rope == "latent" and rope else None
        self.kv_a_layernorm = RMSNorm(rank, config.eps) if mla.key_norm == "latent" else None
        self.k_norm_proj = nn.Linear(dim, dim) if mla.key_norm == "token" else None
        self.kv_b_proj = LatentUp(heads, layer.qk_nope_head_dim, layer.v_head_dim, rank)
        self.o = nn.Linear(heads * layer.v_head_dim, dim)
        self.rope = Rope()
        self._products: tuple[Tensor, Tensor] | None = None
        self._made_of: tuple[Tensor, int, int] | None = None  # the weight, where it lay, and its version

    def compress(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is cached of [B, N, D]: latent [B, N, r], any rotary key [B, N, R] (times s) and, in token mode, s."""
        made = self.kv_a_proj_with_mqa(x)
        latent, rope = made[..., : self.layer.kv_lora_rank], made[..., self.layer.kv_lora_rank :]
        cached = (rope,) if rope.shape[-1] else ()
        if self.kv_a_layernorm is not None:
            return self.kv_a_layernorm(latent), *cached
        assert self.k_norm_proj is not None
        norm = inverse_rms(self.k_norm_proj(x), self.eps).to(x.dtype)
        return latent, *(rope * norm for rope in cached), norm

    def unpack(self, cached: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latent, unrotated rotary key [B, M, R] (times s) and s [B, M, 1] of what `compress` made."""
        latent, *rest = cached
        norm = rest.pop() if self.k_norm_proj is not None else None
        if self.k_rope_proj is not None:
            rope = self.k_rope_proj(latent)
            return latent, rope if norm is None else rope * norm, norm
        return latent, rest[0] if rest else latent[..., :0], norm

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with a cache, the queries see its window."""
        return self.o(self.heads(x, plan, cache))

    def products(self) -> tuple[Tensor, Tensor]:
        """W_K and W_V [H, w, c], which make padded keys and values of the cached channels in one product each.

        The channels are [content, 1, rotary key] and zeros up to a multiple of 8: content-key bias and rotary key need
        no pass of their own. The same W_K maps queries into the latent space, and W_V leads back from there.
        """
        key, value, bias = self.kv_b_proj()
        rope, content = self.layer.qk_rope_head_dim, key.shape[-1]
        width = kernel_width(key.shape[1] + rope, value.shape[1])
        channels = kernel_width(content + 1 + rope)
        turned = torch.eye(rope, channels - content - 1, dtype=key.dtype, device=key.device)
        turned = F.pad(turned, (content + 1, 0)).expand(self.num_heads, -1, -1)
        unturned = F.pad(torch.cat((key, bias.unsqueeze(-1)), -1), (0, channels - content - 1))
        rows = F.pad(torch.cat((unturned, turned), 1), (0, 0, 0, width - key.shape[1] - rope))
        return rows, F.pad(value, (0, channels - content, 0, width - value.shape[1]))

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
        """Attention before its output projection, [B, N, D] -> [B, N, H * v].

        Expanded attention builds the keys and values of every head; absorbed attention takes the cached channels as
        the one key and value of all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
        """
        layer = self.layer
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q.split((layer.qk_nope_head_dim, layer.qk_rope_head_dim), -1)
        if self.turns_heads:
            q_nope = self.rope(q_nope, plan.query_rotary)
        content, k_rope, norm = self.unpack(plan.remember(cache, *self.compress(x)))
        turn_q, turn_k = plan.select(layer.component_pairs)
        turned = self.rope(k_rope.unsqueeze(2), turn_k).squeeze(2)
        known = self._products if cache is not None and not torch.is_grad_enabled() else None
        w_key, w_value = known or self.products()
        width, channels = w_key.shape[1:]
        one = torch.ones_like(content[..., :1]) if norm is None else norm
        zeros = content.new_zeros(()).expand(*content.shape[:2], channels - content.shape[-1] - 1 - turned.shape[-1])
        keys = torch.cat((content if norm is None else content * norm, one, turned, zeros), -1)  # [B, M, c]
        # Without s, the keys hold the content as it is, and zero columns of W_V skip the rest.
        values = keys if norm is None else F.pad(content, (0, channels - content.shape[-1]))
        empty = q.new_zeros(()).expand(*q.shape[:-1], width - q.shape[-1])
        q = torch.cat((q_nope, self.rope(q_rope, turn_q), empty), -1)
        mode = plan.mode
        if self.turns_heads:
            if mode == "absorbed":
                raise InputError(
                    "absorbed attention shares keys between heads, but this model turns each head's own; "
                    "use auto or expanded attention, or convert with --rope latent"
                )
            mode = "expanded"
        if mode == "auto":
            mode = cheaper_mode(
                layer,
                num_heads=self.num_heads,
                content=content.shape[-1],
                queries=q.shape[1],
                keys=keys.shape[1],
                itemsize=q.element_size(),
                flops_per_byte=flops_per_byte(q.device),
            )
        if mode == "expanded":
            k, v = (
                F.linear(c, w.flatten(0, 1)).unflatten(-1, (-1, width)) for c, w in ((keys, w_key), (values, w_value))
            )
            if self.turns_heads:
                turned = self.rope(k[..., : q_nope.shape[-1]], plan.key_rotary)
                k = torch.cat((turned, k[..., q_nope.shape[-1] :]), -1) if width > q_nope.shape[-1] else turned
            out = self.attend(q, k, v, plan.mask)[..., : layer.v_head_dim]
        else:
            q = torch.einsum("bnhw,hwc->bnhc", q, w_key)
            k, v = (c.unsqueeze(2).expand(-1, -1, self.num_heads, -1) for c in (keys, values))
            out = self.attend(q, k, v, plan.mask)
            out = torch.einsum("bnhc,hvc->bnhv", out, w_value[:, : layer.v_head_dim])
        return out.flatten(-2)

    def keys(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """The keys of every head at their positions, [B, N, H, nope + rope], of inputs [B, N, D]."""
        content, k_rope, norm = self.unpack(self.compress(x))
        up_key, _, bias = self.kv_b_proj()
        keys = torch.einsum("bmr,hdr->bmhd", content, up_key) + bias
        keys = keys if norm is None else keys * norm.unsqueeze(2)
        if self.turns_heads:
            return self.rope(keys, plan.key_rotary)
        turned = self.rope(k_rope.unsqueeze(2), plan.key_rotary.select(self.turned_pairs))
        return torch.cat((keys, turned.expand(-1, -1, self.num_heads, -1)), -1)
