"""Quantised weights of published files: float8, plain or with scales, decoded as they are read; others by their names.

A scaled weight is stored as W / s in float8, with s beside it as one number or one a row (ComfyUI, LightX2V), or as
one for each block of 128 x 128 (`weight_scale_inv`: the inverse is of what W was multiplied by; DeepSeek-V3) or of
another square that divides W.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from mlaconvert.errors import CheckpointError
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.store import TensorStore, View

DECODED = torch.bfloat16  # what quantised weights become
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = 128
_BLOCK_SCALE = "weight_scale_inv"
_SCALES = ("scale_weight", "weight_scale", _BLOCK_SCALE)
_BESIDE = (*_SCALES, "scale_input", "input_scale", "comfy_quant")  # of a weight; scales of inputs are of no use here
_MARKER = "scaled_fp8"  # ComfyUI's, without data
_LONGEST = 1000  # bytes of a comfy_quant that are read
# What is not decoded: (a tensor's name, what the file is).
_OTHER = (
    (r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.)", "quantised to 4 bits by bitsandbytes (NF4 or FP4)"),
    (r"\.(SCB|weight_format)$", "quantised to int8 by bitsandbytes"),
    (r"\.(wscales|smooth_factor|smooth_factor_orig|wtscale|wcscales|proj_down)$", "an SVDQuant of Nunchaku's (4 bits)"),
    (r"\.qzeros$", "a GPTQ or AWQ quantisation (4 bits)"),
    (r"\.(weight_scale_2|quantized_weight_(values|scale_factors))$", "quantised to NVFP4 (4 bits)"),
    (r"\.weight\._(data|scale|shift)$", "a quanto quantisation"),
)


def decode(store: TensorStore) -> None:
    """Have `store` give float8 weights decoded, and hide what belongs to them.

    Raises CheckpointError for a quantisation that is not decoded here, naming it, and for a scale that does not fit.
    """
    refuse_other(store.tensors)
    views: dict[str, View] = {}
    hidden = {name for name in store.tensors if name.rpartition(".")[2].rpartition("/")[2] == _MARKER}
    kinds: dict[str, None] = {}
    for name, info in store.tensors.items():
        stem, _, leaf = name.rpartition(".")
        beside = [f"{stem}.{part}" for part in _BESIDE if f"{stem}.{part}" in store.tensors] if leaf == "weight" else []
        scale = next((one for one in beside if one.endswith(_SCALES)), None)
        if scale is not None and info.dtype in _FLOAT8 and _is_exponent(store.tensors[scale].dtype):
            raise _refusal("quantised to MXFP8 (float8 with an exponent for every 32 values)", scale)
        if beside and info.dtype in (torch.int8, torch.uint8):
            raise _refusal(f"quantised to {'int8' if info.dtype == torch.int8 else '4 or 8 bits'}", name)
        if scale is not None and info.dtype not in _FLOAT8:
            raise CheckpointError(
                f"tensor {scale!r} is the scale of a weight that is {info.dtype}, not float8; get an intact copy"
            )
        if info.dtype not in _FLOAT8 or name in hidden:
            continue
        if f"{stem}.comfy_quant" in beside:
            _check_format(store, f"{stem}.comfy_quant")
        block = None
        if scale is not None:
            block = _block(store, info, scale)
            if block is None:
                _check_scale(store, info, scale)
        hidden.update(beside)
        views[name] = View(_decoded(info), _decoder(name, scale, block))
        how = "" if scale is None else " with scales" + (f" of blocks of {block[0]} x {block[1]}" if block else "")
        kinds[f"{str(info.dtype).removeprefix('torch.')}{how}"] = None
    store.present(views, without=hidden, decoded=" and ".join(kinds))


def refuse_other(names: Iterable[str]) -> None:
    """Raise CheckpointError for tensor names of a quantisation that is not decoded here, saying which it is."""
    for name in names:
        for sign, what in _OTHER:
            if re.search(sign, name):
                raise _refusal(what, name)


def _refusal(what: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"this is {what} (found {name!r}), which is not decoded here; give the model in bfloat16, in float8 or as GGUF"
    )


def _decoded(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.name, info.shape, DECODED, prod(info.shape) * DECODED.itemsize)


def _decoder(
    name: str, scale: str | None, block: tuple[int, int] | None
) -> Callable[[Callable[[str], Tensor]], Tensor]:
    def make(read: Callable[[str], Tensor]) -> Tensor:
        weight = read(name)
        if scale is None:
            return weight.to(DECODED)  # which holds every float8
        factor = read(scale).float()
        if block is not None:
            rows = factor.repeat_interleave(block[0], 0)[: len(weight)]
            return (weight.float() * rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]).to(DECODED)
        return (weight.float() * (factor.view(-1, 1) if factor.numel() > 1 else factor.reshape(()))).to(DECODED)

    return make


def _is_exponent(dtype: torch.dtype) -> bool:
    return dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8))


def _block(store: TensorStore, weight: TensorInfo, name: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks that each have a scale; None of one scale, or one a row.

    Raises CheckpointError for as many as no blocks would have.
    """
    info = store.tensors[name]
    if prod(info.shape) == 1 and not (info.shape and name.endswith(_BLOCK_SCALE)):
        return None
    if len(weight.shape) != 2 or len(info.shape) != 2 or not info.dtype.is_floating_point or info.dtype in _FLOAT8:
        if name.endswith(_BLOCK_SCALE):
            raise _odd_blocks(info, weight, (_BLOCK, _BLOCK))
        return None
    if not name.endswith(_BLOCK_SCALE):
        sides = {size / count if count else 0.0 for size, count in zip(weight.shape, info.shape, strict=True)}
        side = sides.pop()
        return (int(side), int(side)) if not sides and side == int(side) > 1 else None
    said = (store.config or {}).get("quantization_config")
    asked = said.get("weight_block_size") if isinstance(said, Mapping) else None
    block = (_BLOCK, _BLOCK)
    if isinstance(asked, list) and len(asked) == 2 and all(type(side) is int and side > 0 for side in asked):
        block = (asked[0], asked[1])
    if info.shape != tuple(-(-size // side) for size, side in zip(weight.shape, block, strict=True)):
        raise _odd_blocks(info, weight, block)
    return block


def _odd_blocks(info: TensorInfo, weight: TensorInfo, block: tuple[int, int]) -> CheckpointError:
    return CheckpointError(
        f"tensor {info.name!r} is {list(info.shape)} of {info.dtype}, the scales of a weight {list(weight.shape)} in "
        f"blocks of {block[0]} x {block[1]}; get an intact copy, with its config.json"
    )


def _check_scale(store: TensorStore, weight: TensorInfo, name: str) -> None:
    info = store.tensors[name]
    rows = weight.shape[0] if len(weight.shape) == 2 else 1
    if info.dtype in _FLOAT8 or not info.dtype.is_floating_point or prod(info.shape) not in (1, rows):
        raise CheckpointError(
            f"tensor {name!r} is {list(info.shape)} of {info.dtype}, the scale of a weight {list(weight.shape)}; "
            "expected one number, or one a row, of floating point"
        )
    if prod(info.shape) > 1 and info.shape not in ((rows,), (rows, 1)):
        raise CheckpointError(f"tensor {name!r} has shape {list(info.shape)}, expected {[rows, 1]}")


def _check_format(store: TensorStore, name: str) -> None:
    """What ComfyUI says of a layer, JSON in bytes; not all writers fill it in."""
    info = store.tensors[name]
    if info.dtype != torch.uint8 or not 0 < prod(info.shape) <= _LONGEST:
        return
    try:
        said = json.loads(bytes(store.read(name).flatten().tolist()))
    except ValueError:
        return
    kind = said.get("format") if isinstance(said, Mapping) else None
    if isinstance(kind, str) and not kind.startswith("float8"):
        raise _refusal(f"quantised to {kind[:40]!r} by ComfyUI", name)
