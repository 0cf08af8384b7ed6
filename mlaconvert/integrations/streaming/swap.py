"""Put latent attention into their model in place of theirs: all checked first, then at once, or not at all."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.records import read_record
from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource
from mlaconvert.families.wrappers import unwrap
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.origin import origin_of
from mlaconvert.integrations.contract import Contract
from mlaconvert.integrations.streaming.attention import KvCache, Streaming, StreamingLatentAttention, Turns
from mlaconvert.integrations.streaming.codebase import (
    Codebase,
    Positions,
    causal_model,
    check_parts,
    self_attentions,
    unwrapped,
)
from mlaconvert.integrations.streaming.trial import on_first_chunk, watch

_ALLOCATE = "_initialize_kv_cache"


def swap_attention(
    model: nn.Module,
    source: AnySource,
    *,
    positions: Positions | None = None,
) -> None:
    """Put the converted model `source` into their causal `model`, or into the one inside their pipeline.

    `source` is anything that `open_checkpoint` reads. `positions` "window" counts frames from the
    sink, "absolute" from the start of the video as Self-Forcing does; by default it is what `source` was converted for.
    A pipeline's `_initialize_kv_cache` is replaced too, so that the dense cache is never allocated; without it (`model`
    is the bare model) each layer's is freed when it is first used. For inference: cached chunks carry no gradients.

    `torch.compile`, DataParallel and activation checkpointing are looked through. Adapters of PEFT are taken out when
    `source` was converted with a LoRA, which then is in its weights.

    First their attention runs a few chunks of noise beside ours (on the first chunk, where it cannot yet): what it does
    with its window, sink and positions must be the same. Raises UnsupportedModelError for a model whose attention does
    or is called otherwise, ConfigError for a source that is not converted, InputError when the two are not of one
    geometry, or count frames differently and `positions` is not given. On any error the model is as it was. Warns where
    the model's window or sink is not the one that `source` was converted for: the model's own is what runs.
    """
    pipeline, causal = unwrapped(model), causal_model(model)
    with open_checkpoint(source) as checkpoint, ExitStack() as undo:
        config = checkpoint.config
        if config.mla is None:
            raise ConfigError(f"{source} is not converted; run mlaconvert convert {source} -o DIR, and give DIR")
        swapped = {i: layer for i, layer in enumerate(config.mla.layers) if layer is not None}
        adapters = _adapters(causal)
        if adapters:
            _check_adapters(checkpoint, source, type(causal).__name__)
        outside = _outside(causal, checkpoint, swapped, source)
        contract = Contract.of(config)
        folder = contract.window.positions
        turns = Turns(contract, folder, _codebase(causal, checkpoint, positions, folder))
        turns.positions = turns.codebase.admit(positions, folder)
        theirs = self_attentions(causal)
        ours = {i: _made_like(theirs[i], checkpoint, i, config.mla, layer, turns) for i, layer in swapped.items()}
        changed = _changed(outside, checkpoint)
        # Nothing has been touched so far.
        for parent, name, base in adapters:
            undo.callback(setattr, parent, name, parent.get_submodule(name))
            setattr(parent, name, base)
        for i, attention in ours.items():
            block = unwrapped(causal.get_submodule(f"blocks.{i}"))
            undo.callback(setattr, block, "self_attn", block.self_attn)
            block.self_attn = attention
        with torch.no_grad():
            for tensor, value in changed:
                undo.callback(_put, tensor, tensor.detach().cpu().clone())
                tensor.copy_(value)
        _allocate_latents(pipeline, causal)
        undo.pop_all()
    other_window = _other_window(next(iter(ours.values())), contract.streaming)
    if other_window:
        warnings.warn(f"{source} {other_window}", stacklevel=2)
    if adapters:
        warnings.warn(
            f"{len(adapters)} LoRA layers taken out of {type(causal).__name__}; {source} was converted with a LoRA",
            stacklevel=2,
        )


def _other_window(attention: Streaming, streaming: StreamingConfig | None) -> str:
    """What to say where the codebase's window or sink is another than the folder's; "" where they are the same."""
    window, sink = attention.local_attn_size, attention.sink_size
    if streaming is None or window == -1 or (window, sink) == (streaming.window_frames, streaming.sink_frames):
        return ""
    return (
        f"was converted for a window of {streaming.window_frames} latent frames "
        f"with a sink of {streaming.sink_frames}; "
        f"the model's own, {window} and {sink}, runs: set local_attn_size and sink_size, or convert it for them"
    )


def _put(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _codebase(causal: nn.Module, checkpoint: Checkpoint, wanted: Positions | None, folder: Positions) -> Codebase:
    """Theirs, with the trial that is to run before the first chunk; known already where ours has been put in."""
    attentions = self_attentions(causal)
    known = next((a.turns.codebase for a in attentions if isinstance(a, Streaming)), None)
    if known is not None:
        codebase = replace(known, compare=None)
    else:
        for i, attention in enumerate(attentions):
            check_parts(attention, f"blocks.{i}.self_attn")
        codebase = watch(causal, attentions, checkpoint.config)
    if codebase.waiting:
        codebase.compare = on_first_chunk(codebase, wanted, folder)
    return codebase


def _adapters(causal: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """PEFT's layers: (what holds one, its name there, what it was before)."""
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, layer) for parent in causal.modules() for name, layer in parent.named_children()
    ]
    return [(parent, name, layer.get_base_layer()) for parent, name, layer in found if hasattr(layer, "get_base_layer")]


def _check_adapters(checkpoint: Checkpoint, source: AnySource, name: str) -> None:
    """Raise InputError unless a LoRA is in the converted weights already."""
    path = checkpoint.store.path
    record = read_record((path if path.is_dir() else path.parent) / CONVERSION_NAME)
    if not origin_of(record).loras:
        raise InputError(
            f"{name} carries a LoRA, and {source} was not converted with one (its {CONVERSION_NAME} names none): "
            "convert it with --lora FILE, or take the LoRA off the model (model.unload()) before swap_attention"
        )


def _outside(
    causal: nn.Module, checkpoint: Checkpoint, swapped: Mapping[int, MLALayer], source: Any
) -> dict[str, Tensor]:
    """Their weights that are not swapped, by canonical name.

    Raises InputError unless they are those of the converted model, UnsupportedModelError where they cannot be written.
    """
    adapted = tuple(f"{path}." for path, part in causal.named_modules() if hasattr(part, "get_base_layer"))
    state = causal.state_dict()
    raws = {  # names without PEFT's layer around them
        raw.replace(".base_layer.", "."): raw
        for raw in state
        if not any(raw.startswith(path) and not raw.startswith(f"{path}base_layer.") for path in adapted)
    }
    inside = tuple(f"blocks.{i}.self_attn." for i in swapped)
    clean = unwrap(raws)[1]
    theirs = {name: state[raws[old]] for name, old in clean.items() if not name.startswith(inside)}
    ours = {name: checkpoint.info(name).shape for name in checkpoint.names if not name.startswith(inside)}
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in theirs.items()}
    if shapes != ours:
        name = min(name for name in shapes | ours if shapes.get(name) != ours.get(name))
        sides = [list(side[name]) if name in side else "missing" for side in (shapes, ours)]
        raise InputError(
            f"{source} is not a conversion of this model, or the model is quantised or fused, which comes after "
            f"swap_attention: {name!r} is {sides[0]} in it and {sides[1]} in the source"
        )
    for name, tensor in theirs.items():
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name!r} of the model is on the meta device; load its weights, then swap")
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{name!r} of the model is a {type(tensor).__name__} of {tensor.dtype}; call swap_attention before the "
                "model is quantised or sharded, on plain weights"
            )
    return theirs


def _changed(outside: Mapping[str, Tensor], checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Their tensors that the source has otherwise, as after healing, and what it has."""
    pairs = ((tensor, checkpoint.read(name).to(tensor.dtype)) for name, tensor in outside.items())
    return [(tensor, value) for tensor, value in pairs if not torch.equal(tensor.detach(), value.to(tensor.device))]


def _made_like(
    theirs: nn.Module, checkpoint: Checkpoint, index: int, mla: MLAConfig, layer: MLALayer, turns: Turns
) -> StreamingLatentAttention:
    """Our attention of one layer on the device, in the dtype and with the limits of theirs."""
    with torch.device("meta"):
        ours = StreamingLatentAttention(checkpoint.config, mla, layer, index, turns)
    for limit in ("local_attn_size", "sink_size", "max_attention_size"):
        setattr(ours, limit, getattr(theirs, limit, getattr(ours, limit)))
    like = next(theirs.parameters())
    if not like.is_floating_point() or like.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"blocks.{index}.self_attn holds weights of {like.dtype}; call swap_attention before the model is quantised"
        )
    prefix = f"blocks.{index}.self_attn."
    state = {name: checkpoint.read(prefix + name).to(like.device, like.dtype) for name in ours.state_dict()}
    ours.load_state_dict(state, assign=True)
    return ours.requires_grad_(like.requires_grad).train(theirs.training)


class _LatentAllocation:
    """Their allocation without its memory: it runs on the meta device, and real buffers of latents take its place."""

    def __init__(self, pipeline: nn.Module, theirs: Callable[..., None], causal: nn.Module) -> None:
        self.pipeline, self.theirs, self.causal = pipeline, theirs, causal

    def __call__(self, *arguments: Any, **options: Any) -> None:
        bound = inspect.signature(self.theirs).bind(*arguments, **options)
        device = bound.arguments["device"]
        bound.arguments["device"] = "meta"
        self.theirs(*bound.args, **bound.kwargs)
        for caches in vars(self.pipeline).values():
            if isinstance(caches, list) and all(isinstance(c, dict) and "k" in c and c["k"].is_meta for c in caches):
                for attention, cache in zip(self_attentions(self.causal), caches, strict=True):
                    _make_real(cache, attention, device)


def _allocate_latents(pipeline: nn.Module, causal: nn.Module) -> None:
    """Let a pipeline allocate latents at once, if it has a way to allocate that names its device."""
    theirs: Any = getattr(pipeline, _ALLOCATE, None)
    if theirs is None or isinstance(theirs, _LatentAllocation) or "device" not in inspect.signature(theirs).parameters:
        return
    setattr(pipeline, _ALLOCATE, _LatentAllocation(pipeline, theirs, causal))


def _make_real(cache: KvCache, attention: nn.Module, device: torch.device | str) -> None:
    if isinstance(attention, Streaming):
        cache["k"] = attention.empty_buffer(cache["k"], device)
        cache["v"] = cache["k"][..., :0]
    for name, value in cache.items():
        if isinstance(value, Tensor) and value.is_meta:
            cache[name] = torch.zeros_like(value, device=device)
