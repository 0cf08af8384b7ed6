"""Weights in GGUF files (Q8_0, the K-quants and others), read and decoded by the gguf package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.errors import CheckpointError
from mlaconvert.files.contents import refuse_mistaken
from mlaconvert.files.headers import TensorInfo, check_name
from mlaconvert.files.inputs import file_size, reason_of

_MOST = 100_000  # tensors, and fields of metadata
_MAX_DIMS = 8
# Shapes that ComfyUI's converters keep where a file could not hold so many dimensions.
_ORIGINAL = "comfy.gguf.orig_shape."


def read_gguf(path: Path) -> Iterator[tuple[TensorInfo, str, Callable[..., Tensor]]]:
    """Each tensor of a GGUF file: what it is once decoded, how it is stored (Q4_K, F16, ...), and what decodes it.

    Floats keep their dtype; quantised weights become bfloat16. Raises CheckpointError naming the file, also when the
    gguf package is not installed.
    """
    _check_head(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(
            f"{path}: reading GGUF needs the gguf package; install it with `pip install 'mlaconvert[gguf]'`"
        ) from None
    try:
        reader: Any = GGUFReader(path)
        found = [(tensor, _shape(reader, tensor)) for tensor in reader.tensors]
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"{path}: not a readable GGUF file, or damaged ({reason_of(error)}); download it again"
        ) from None
    for tensor, shape in found:
        check_name(path, tensor.name)
        if len(shape) > _MAX_DIMS or prod(shape) != prod(map(int, tensor.shape)):
            raise CheckpointError(f"{path}: tensor {tensor.name!r} has an impossible shape; download it again")
        dtype = _FLOATS.get(tensor.tensor_type.name, torch.bfloat16)
        info = TensorInfo(tensor.name, shape, dtype, prod(shape) * dtype.itemsize)
        yield info, tensor.tensor_type.name, _decoder(path, tensor, info)


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _check_head(path: Path) -> None:
    size = file_size(path)
    refuse_mistaken(path, "gguf")
    try:
        with path.open("rb") as stream:
            head = stream.read(24)
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({reason_of(error)})") from None
    counts = [int.from_bytes(head[at : at + 8], "little") for at in (8, 16)]
    if len(head) < 24 or head[:4] != b"GGUF" or size < sum(counts):
        raise CheckpointError(f"{path}: not a readable GGUF file, or damaged ({size} bytes); download it again")
    if max(counts) > _MOST:
        raise CheckpointError(f"{path}: it has {max(counts):,} tensors or fields, expected at most {_MOST:,}")


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """As PyTorch counts dimensions, the last one varies fastest."""
    kept = reader.get_field(f"{_ORIGINAL}{tensor.name}")
    if kept is not None:
        return tuple(int(kept.parts[index][0]) for index in kept.data)
    return tuple(int(size) for size in reversed(tensor.shape))


def _decoder(path: Path, tensor: Any, info: TensorInfo) -> Callable[..., Tensor]:
    def decode(*_: object) -> Tensor:
        from gguf.quants import dequantize

        try:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except Exception as error:  # kinds that the package does not decode, and what a damaged file makes of it
            kind = re.sub(r"\W", "", tensor.tensor_type.name)
            raise CheckpointError(
                f"{path}: tensor {info.name!r} ({kind}) cannot be decoded ({reason_of(error)}); give another "
                "quantisation, such as Q8_0"
            ) from None
        return values.to(info.dtype).reshape(info.shape)

    return decode
