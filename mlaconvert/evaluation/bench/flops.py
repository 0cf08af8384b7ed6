"""FLOPs of a forward pass by part of the model, and seconds of one by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.profiler import profile, record_function

from mlaconvert.config.geometry import WanConfig
from mlaconvert.evaluation.bench.runner import no_remarks
from mlaconvert.model.attention.cost import FLOPS_PER_BYTE, cheaper_mode, latent_cost
from mlaconvert.model.attention.kernel import AttentionMode, RMSNorm, kernel_width
from mlaconvert.model.rope import Rope

SCOPE = "norms and RoPE"
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"}


def forward_flops(
    config: WanConfig,
    *,
    queries: int,
    keys: int,
    mode: AttentionMode = "auto",
    itemsize: int = 2,
    flops_per_byte: float = FLOPS_PER_BYTE["cuda"],
) -> dict[str, int]:
    """FLOPs of one pass of one video through the blocks, by part: two for each multiplication and addition.

    `queries` tokens see `keys` tokens. "attention": scores and values; "latent": expanding the latents, or mapping
    queries and outputs to them; "projections": of queries, keys, values and outputs; "cross-attention": to a text whose
    keys and values are cached; "ffn". Beside an exact present, latents are read for the keys before the queries' chunk,
    which are its own keys too. Norms, RoPE, embeddings and the head are not counted: under 1% at Wan's sizes.
    """
    dim, heads, tokens = config.dim, config.num_heads, queries
    parts = dict.fromkeys(("attention", "cross-attention", "latent", "projections", "ffn"), 0)
    for index in range(config.num_layers):
        mla = config.mla.layers[index] if config.mla else None
        if config.mla is None or mla is None:
            width = kernel_width(config.head_dim)
            parts["attention"] += 4 * tokens * keys * heads * width
            parts["projections"] += 4 * 2 * tokens * dim * dim
        else:
            exact = config.mla.present == "exact"
            read = max(0, keys - tokens) if exact else keys  # from latents
            sizes = {"num_heads": heads, "content": mla.kv_lora_rank, "queries": tokens, "keys": read}
            chosen: Literal["expanded", "absorbed"] = "absorbed" if mode == "absorbed" else "expanded"
            if mode == "auto" and config.mla.rope != "head":
                chosen = cheaper_mode(mla, **sizes, itemsize=itemsize, flops_per_byte=flops_per_byte)
            total = latent_cost(chosen, mla, **sizes).flops
            width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
            channels = sizes["content"] + 1 + mla.qk_rope_head_dim
            attended = kernel_width(width, mla.v_head_dim) if chosen == "expanded" else kernel_width(channels)
            parts["attention"] += 4 * tokens * read * heads * attended
            parts["latent"] += total - 4 * tokens * read * heads * attended
            rank = config.mla.q_lora_rank
            query = dim * dim if rank is None else rank * dim
            if config.mla.past_queries:
                query += heads * (config.head_dim if rank is None else rank) * width
            down = dim * (mla.kv_lora_rank + config.mla.cached_rope(mla))
            if config.mla.rope == "latent":  # the rotary key of all that is read
                parts["latent"] += 2 * read * mla.kv_lora_rank * mla.qk_rope_head_dim
            own = dim * dim if config.mla.key_norm == "token" or exact else 0
            out = heads * mla.v_head_dim * dim
            if exact:
                parts["attention"] += 4 * tokens * tokens * heads * kernel_width(config.head_dim)
                own, out = own + dim * dim, dim * dim
                if mla.v_head_dim < config.head_dim:
                    parts["latent"] += 2 * tokens * heads * mla.v_head_dim * config.head_dim
            parts["projections"] += 2 * tokens * (query + down + own + out)
        parts["projections"] += 2 * 2 * tokens * dim * dim  # cross-attention's queries and output
        parts["cross-attention"] += 4 * tokens * config.text_len * heads * kernel_width(config.head_dim)
        parts["ffn"] += 2 * 2 * tokens * dim * config.ffn_dim
    return parts


def seconds_by_part(
    model: nn.Module, work: Callable[[], object], device: torch.device, *, compiled: bool
) -> dict[str, float]:
    """Seconds of `work`, which runs `model`, by part. A compiled model's norms and RoPE are fused into the rest."""
    cuda = device.type == "cuda"
    profiler = profile(use_device="cuda" if cuda else None, use_kineto=cuda)
    with scopes(model, not compiled), no_remarks(), profiler:
        work()
    parts = dict.fromkeys(("attention", "projections", SCOPE, "the rest"), 0.0)
    for event in profiler.function_events or []:
        if event.device_type.name != "CPU":  # a kernel, whose time its operation has already
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        parts[part_of_model(event)] += spent / 1e6
    return parts


@contextmanager
def scopes(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Name the norms and rotations of an eager model in a profile."""
    handles, open_scopes = [], []

    def enter(*_: Any) -> None:
        open_scopes.append(record_function(SCOPE))
        open_scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    if wanted:
        for module in model.modules():
            if isinstance(module, RMSNorm | nn.LayerNorm | Rope):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of_model(event: Any) -> str:
    """The part that a profiler's event belongs to, by its own name and those above it."""
    names, above = [], event
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    if any(name in _PRODUCTS for name in names):
        return "projections"
    return SCOPE if SCOPE in names else "the rest"
