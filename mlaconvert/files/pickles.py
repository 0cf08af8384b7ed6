"""State dicts in pickles, read with `weights_only=True` and never otherwise."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlaconvert.errors import CheckpointError
from mlaconvert.files.contents import refuse_mistaken
from mlaconvert.files.headers import check_name
from mlaconvert.files.inputs import file_size, reason_of

_MAX_PICKLE = 1 << 21  # bytes of a PyTorch file's pickle, which has no weights in it: some 300 a tensor
_MAX_NESTING = 8  # dictionaries inside dictionaries of a pickle
_MAX_ENTRIES = 200_000  # of all dictionaries of a pickle; one that is in it twice counts twice


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, nested dictionaries joined with "/". Nothing but tensors is ever unpickled."""
    size = file_size(path)
    refuse_mistaken(path, "pickle")
    try:
        is_zip = zipfile.is_zipfile(path)  # older pickles cannot be mapped
        available = check_zip(path, size) if is_zip else size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of sparse tensors, which are refused below
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise CheckpointError(
                f"{path}: it is not a PyTorch checkpoint, or it is damaged; download it again"
            ) from None
        if re.search(r"DTensor|ShardedTensor|torch\.distributed", str(error)):
            raise _sharded(path) from None
        raise CheckpointError(
            f"{path}: it pickles more than tensors, and mlaconvert never runs pickled code. "
            "Save its state dict alone, as .safetensors or with torch.save, and use that"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: it is not a PyTorch checkpoint, or it is damaged ({reason_of(error)}); download it again"
        ) from None
    tensors: dict[str, torch.Tensor] = {}
    storages: dict[int, int] = {}
    for name, tensor in _flatten(path, data):
        check_name(path, name)
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are named {name!r}; save one state dict alone")
        if type(tensor).__name__ in ("DTensor", "ShardedTensor"):
            raise _sharded(path)
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise CheckpointError(f"{path}: tensor {name!r} is a {type(tensor).__name__}; save it as a plain one")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor; save it as one")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(tensor.shape)} repeats the values of a smaller one; "
                "save it whole"
            )
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        tensors[name] = tensor.detach()
    if sum(storages.values()) > available:
        raise CheckpointError(f"{path}: it promises more data than it has; download it again")
    return tensors


def _sharded(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a sharded training state (FSDP's DTensor); gather its tensors where it was trained, with "
        "tensor.full_tensor() or `accelerate merge-weights`, save them with torch.save, and give that file"
    )


def check_zip(path: Path, size: int, *, longest_pickle: int = _MAX_PICKLE) -> int:
    """Bytes of data in a PyTorch file, which holds its records as they are.

    Raises CheckpointError, before anything is unpacked, when they are packed, or more than the file.
    """
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
        raise CheckpointError(f"{path}: a record in it is compressed, which torch.save never does; save it again")
    if sum(r.file_size for r in records) > size or len({r.filename for r in records}) < len(records):
        raise CheckpointError(f"{path}: its records overlap or come twice, so it is damaged; download it again")
    if any(r.file_size > longest_pickle for r in records if r.filename.endswith(".pkl")):
        raise CheckpointError(f"{path}: its pickle is larger than that of any model; save the state dict alone")
    return sum(r.file_size for r in records if "/data/" in r.filename)


def _flatten(path: Path, data: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries, in order. A hostile pickle can hold one dictionary a million times."""
    left: list[tuple[tuple[str, ...], Any]] = [((), data)]
    seen = 0
    while left:
        outer, found = left.pop()
        if isinstance(found, torch.Tensor):
            yield "/".join(outer), found
        elif isinstance(found, Mapping):
            seen += len(found)
            if len(outer) > _MAX_NESTING or seen > _MAX_ENTRIES:
                raise CheckpointError(
                    f"{path}: dictionaries are nested too deeply at {'/'.join(outer)!r}; save the state dict alone"
                )
            # Keys that are no text number an optimizer's state: no weights below them.
            inner = [((*outer, key), value) for key, value in found.items() if isinstance(key, str)]
            left += reversed(inner)
