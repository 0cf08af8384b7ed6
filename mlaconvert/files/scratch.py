"""Tensors in files, for what is larger than memory and needed only for a while; and freed memory given back."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mlaconvert.errors import OutputError
from mlaconvert.files.inputs import reason_of


class Scratch:
    """Tensors in unnamed files in `folder` (default: the temporary folder), each gone when nothing refers to it.

    They are mapped: the system writes their pages to the disk and drops them when memory is wanted elsewhere. Not even
    a killed process leaves anything. Raises OutputError when there is no temporary folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self.folder = folder or Path(tempfile.gettempdir())
        except OSError as error:
            raise OutputError(f"no temporary folder can be written to ({reason_of(error)}); set TMPDIR") from None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor, of zeros. Raises OutputError when the disk is full, or its files cannot be mapped."""
        size = prod(shape)
        if not size:
            return torch.empty(*shape, dtype=dtype)
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                # Room that is there beforehand: writing to a mapped page of a full disk kills the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size * dtype.itemsize)
                else:
                    os.truncate(handle, size * dtype.itemsize)
                return torch.from_file(name, shared=True, size=size, dtype=dtype).view(*shape)
            finally:
                os.close(handle)
                Path(name).unlink()
        except OSError as error:
            raise OutputError(
                f"{self.folder}: no room for {size * dtype.itemsize / 1e9:.1f} GB of activations "
                f"({error.strerror or error}); make room there, or take fewer clips"
            ) from None
        except RuntimeError as error:  # torch's word for a mapping that the system refuses
            raise OutputError(
                f"{self.folder}: {size * dtype.itemsize / 1e9:.1f} GB of activations cannot be mapped there "
                f"({reason_of(error)}); take a folder on another disk, or fewer clips"
            ) from None

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in a file."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def return_memory() -> None:
    """Give freed matrices back to the system: glibc keeps blocks of up to 32 MB, and a long run fills with gaps."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
