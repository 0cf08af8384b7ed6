"""The header of a safetensors file and the index of shards, read without trusting them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mlaconvert.errors import CheckpointError
from mlaconvert.files.contents import MAX_HEADER, refuse_mistaken
from mlaconvert.files.inputs import file_size, parse_json, read_json, reason_of
from mlaconvert.files.names import is_pickle_index

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_TENSORS = 100_000
_MAX_DIMS = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor; `nbytes` is the size of its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def read_index(path: Path) -> dict[str, list[str]]:
    """Shard file -> its tensors, from an index whose shards all lie in its own folder, and are what its name says."""
    placed: dict[str, list[str]] = {}
    endings = ("bin",) if is_pickle_index(path.name) else ("safetensors", "sft")
    shards = re.compile(rf"[^/\\\0]+\.({'|'.join(endings)})", re.IGNORECASE)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: it has no weight_map; download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shards.fullmatch(shard):
            raise CheckpointError(f"{path}: {name!r} points to {shard!r}, which is not a .{endings[0]} file beside it")
        placed.setdefault(shard, []).append(name)
    return dict(sorted(placed.items()))


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a .safetensors file in file order, after checking that header and file agree.

    Raises CheckpointError naming the file and the tensor.
    """
    size = file_size(path)
    refuse_mistaken(path, "safetensors")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated or not safetensors ({size} bytes); download it again")
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{path}: its header has {length:,} bytes, expected at most {MAX_HEADER:,}; download it again"
                )
            header = parse_json(stream.read(length).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({reason_of(error)}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the __metadata__ of its header is not a mapping of texts; download it again")
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: it has {len(header):,} tensors, expected at most {_MAX_TENSORS:,}")
    placed = sorted((_check_entry(path, name, entry) for name, entry in header.items()), key=lambda item: item[0])
    end = 0
    for (start, _), info in placed:
        if start != end:
            raise CheckpointError(f"{path}: tensor {info.name!r} overlaps another or leaves a gap; download it again")
        end += info.nbytes
    if end != size - 8 - length:
        found = size - 8 - length
        raise CheckpointError(
            f"{path}: the header promises {end} bytes of data, the file has {found}; download it again"
        )
    return [info for _, info in placed]


def _check_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, int], TensorInfo]:
    """((start, end), info) of one header entry. The end breaks ties of empty tensors."""
    check_name(path, name)
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry; download it again")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, which is not known here; convert it to float32"
        )
    nbytes = prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {nbytes} bytes, "
            f"but its header gives it {offsets[1] - offsets[0]}; download it again"
        )
    return (offsets[0], offsets[1]), TensorInfo(name, shape, _DTYPES[dtype], nbytes)


def _counts(value: Any) -> tuple[int, ...] | None:
    """`value` if it is a short list of sizes."""
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < 1 << 63 for item in value) else None


def check_name(path: Path, name: str) -> None:
    """Raise CheckpointError for a tensor's name that cannot be printed."""
    if not name or not name.isprintable():
        raise CheckpointError(f"{path}: a tensor is named {name!r}; expected printable text, get an intact copy")
