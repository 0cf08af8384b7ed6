"""Tensors of a checkpoint, read lazily, one at a time; `mlaconvert.files.writer` writes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlaconvert.errors import CheckpointError, is_plain
from mlaconvert.files.gguf_file import read_gguf
from mlaconvert.files.headers import FLOATS, TensorInfo, read_header
from mlaconvert.files.inputs import reason_of
from mlaconvert.files.names import is_gguf, is_safetensors
from mlaconvert.files.pickles import load_pickle
from mlaconvert.progress import Counter, Progress, silent

_PIECE = 1 << 20  # bytes of a file that are read at a time

# Asked about a tensor by name; may give a function that takes its elements, some [n] at a time.
Visit = Callable[[str], AbstractContextManager[Callable[[torch.Tensor], None] | None]]


@dataclass(frozen=True)
class View:
    """A tensor in another form than the file's: what it is then, and how it is made from what the file has.

    `make` is given a function that reads a tensor of the file by name.
    """

    info: TensorInfo
    make: Callable[[Callable[[str], torch.Tensor]], torch.Tensor]


class TensorStore:
    """The tensors of one checkpoint, read one at a time. Use it as a context manager, or call `close`.

    `source` is what was asked for, `path` the file or folder on this disk, `files` its weight files, `config` the
    config.json beside them (None when there is none), `revision` the Hub's commit that they are of (None for local
    ones), `tensors` what each tensor is, in file order, `decoded` what they are quantised to in
    the files ("" for weights as they are).
    """

    def __init__(
        self,
        source: str,
        path: Path,
        files: Sequence[Path],
        config: dict[str, Any] | None,
        revision: str | None = None,
    ) -> None:
        self.source = source
        self.revision = revision
        self.path = path
        self.files = tuple(files)
        self.config = config
        self._home: dict[str, Path] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._handles: dict[Path, Any] = {}
        self._views: dict[str, View] = {}
        self.decoded = ""
        self._stack = ExitStack()
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            if not is_plain(file.name):
                raise CheckpointError(f"{file}: a file name must be plain UTF-8 text; rename it")
            for info in self._scan(file):
                if info.name in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {info.name!r} is in {self._home[info.name].name} too; remove the stale file"
                    )
                tensors[info.name] = info
                self._home[info.name] = file
        if not tensors:
            raise CheckpointError(f"{path}: it holds no tensors; give a file with a model's weights")
        self._held = tensors
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def present(self, views: Mapping[str, View], *, without: Collection[str] = (), decoded: str = "") -> None:
        """Give tensors in another form from now on, and hide those `without` meaning of their own.

        `decoded` says what they were quantised to. Files and their hash stay as they are.
        """
        shown = {name: info for name, info in self.tensors.items() if name not in without}
        self._views |= {name: _upon(self._views.get(name), view) for name, view in views.items()}
        self.tensors = MappingProxyType(shown | {name: view.info for name, view in views.items()})
        self.decoded = " and ".join(filter(None, (self.decoded, decoded)))

    def is_plain(self, name: str) -> bool:
        """Whether `read` gives the elements of a tensor just as the file holds them."""
        return name not in self._views

    def _scan(self, file: Path) -> Iterable[TensorInfo]:
        if is_safetensors(file.name):
            infos = read_header(file)
            self._handle(file)  # the library that will read the tensors must agree
            return infos
        if is_gguf(file.name):
            return self._scan_gguf(file)
        found = load_pickle(file)
        self._pickled |= found
        return [TensorInfo(name, tuple(t.shape), t.dtype, t.nbytes) for name, t in found.items()]

    def _scan_gguf(self, file: Path) -> list[TensorInfo]:
        infos, kinds = [], set()
        for info, kind, make in read_gguf(file):
            infos.append(info)
            self._views[info.name] = View(info, make)
            kinds.add(kind)
        self.decoded = f"GGUF {', '.join(sorted(kinds))}"
        return infos

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from the file rather than copied, or decoded.

        Raises CheckpointError for an unknown name, and for one that cannot be decoded.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: it has no tensor {name!r}")
        return self._views[name].make(self._read) if name in self._views else self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._pickled:
            return self._pickled[name]
        file = self._home[name]
        try:
            tensor: torch.Tensor = self._handle(file).get_tensor(name)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: tensor {name!r} cannot be read ({reason_of(error)}); get an intact copy"
            ) from None
        return tensor

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (OSError, SafetensorError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{file}: it cannot be opened ({reason_of(error)}); download it again") from None
        return self._handles[file]

    def sha256(self, progress: Progress = silent, visit: Visit | None = None) -> str:
        """Hash of the weight files' names and contents, read once; `progress` counts bytes.

        On the way, `visit` is asked about each tensor of a .safetensors file by name, and may give a function that
        takes the tensor's elements, some [n] at a time, in memory that is used again.
        Raises CheckpointError when a file cannot be read to its end.
        """
        total, count = hashlib.sha256(), Counter(progress, "hash", sum(file.stat().st_size for file in self.files))
        count.show()
        for file in sorted(self.files):
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb", buffering=0) as stream:
                for info in self._regions(file):
                    with visit(info.name) if visit is not None and info.name else nullcontext() as take:
                        for piece in _pieces(stream, file, info.nbytes, forget=take is not None):
                            total.update(piece.numpy().data)
                            if take is not None:
                                take(piece.view(info.dtype))
                            count.step(len(piece))
        return total.hexdigest()

    def _regions(self, file: Path) -> list[TensorInfo]:
        """What a file consists of: a header without a name, then tensors without gaps; a PyTorch file is all header."""
        inside = [info for info in self._held.values() if self._home[info.name] == file and file in self._handles]
        header = file.stat().st_size - sum(info.nbytes for info in inside)
        if header < 0:
            raise CheckpointError(f"{file}: it has become shorter while it was read")
        return [TensorInfo("", (header,), torch.uint8, header), *inside]

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._handles.clear()
        self._pickled = {}
        self._stack.close()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _upon(view: View | None, other: View) -> View:
    """`other` made from what `view` of the same tensor gives."""
    if view is None:
        return other

    def make(read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        return other.make(lambda name: view.make(read) if name == other.info.name else read(name))

    return View(other.info, make)


def _pieces(stream: RawIOBase, file: Path, size: int, *, forget: bool) -> Iterator[torch.Tensor]:
    """The next `size` bytes of a file, some uint8 [n] at a time in the same memory.

    With `forget`, the system is told that they will not be read again: their memory is wanted elsewhere. Raises
    CheckpointError when they cannot be read.
    """
    buffer = torch.empty(min(size, _PIECE), dtype=torch.uint8)  # small enough to stay in the processor's cache
    for start in range(0, size, _PIECE):
        piece = buffer[: size - start]
        room = piece.numpy().data
        while room:
            try:
                count = stream.readinto(room)
            except OSError as error:
                raise CheckpointError(f"{file}: it cannot be read to its end ({error.strerror or error})") from None
            if not count:
                raise CheckpointError(f"{file}: it has become shorter while it was read")
            room = room[count:]
        yield piece
    if forget and size and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a hint
            os.posix_fadvise(stream.fileno(), stream.tell() - size, size, os.POSIX_FADV_DONTNEED)


def check_finite(tensor: torch.Tensor, name: str, where: str | Path) -> None:
    """Raise CheckpointError naming the tensor when it holds a NaN or an infinity."""
    # The extremes of floats are NaN or infinite when any value is, and are found several times as fast.
    extremes = torch.stack(torch.aminmax(tensor)) if tensor.dtype in FLOATS and tensor.numel() else tensor
    if not bool(torch.isfinite(extremes).all()):
        raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinite values; get an intact copy of the file")


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of the tensors `names` that a small .safetensors file has, float32, after checking that they are finite.

    Raises CheckpointError naming the file and the tensor; also for one that holds no floating-point numbers.
    """
    with TensorStore(str(path), path, [path], None) as store:
        found = {name: store.read(name) for name in names if name in store.tensors}
        if not found:
            raise CheckpointError(f"{path}: has {', '.join(sorted(store.tensors)[:5])}; expected {', '.join(names)}")
        for name, tensor in found.items():
            check_floats(store.tensors[name], path)
            check_finite(tensor, name, path)
        return {name: tensor.float() for name, tensor in found.items()}


def check_floats(info: TensorInfo, where: str | Path) -> None:
    """Raise CheckpointError naming the tensor unless it holds float64, float32, bfloat16 or float16."""
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: tensor {info.name!r} is {info.dtype}, expected float32, bfloat16, float16 or float64; "
            "use the unquantised values"
        )
