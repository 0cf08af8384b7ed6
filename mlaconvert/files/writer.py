"""Write a model folder that appears whole or not at all (`mlaconvert.files.staging`).

Like `mlaconvert.files.store`, this module knows files and tensors only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mlaconvert.errors import OutputError
from mlaconvert.files.find import experts
from mlaconvert.files.headers import DTYPE_NAMES
from mlaconvert.files.names import CONFIG_NAME, INDEX_SUFFIX, WEIGHTS_NAME
from mlaconvert.files.staging import Staging, disk_errors
from mlaconvert.files.whole import sync_folder, write_whole

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def is_model(folder: Path, *, pair: bool = False) -> bool:
    """Whether a folder may be overwritten as a model: it holds one, with `pair` perhaps two experts, or nothing."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or (folder / CONFIG_NAME).is_file() or (pair and bool(experts(folder)))


def reserve(handle: int, size: int) -> None:
    """Ask for the blocks of an open file's first `size` bytes: a full disk shows at once, and writing is faster.

    Nothing happens where the system or the disk cannot; glibc's posix_fallocate would write to every block instead,
    which takes minutes on a network disk. Raises OSError, as when the disk is full.
    """
    with suppress(AttributeError, TypeError):  # not Linux
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(handle, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR, errno.EPERM):
            raise OSError(number, os.strerror(number))


class ModelFiles:
    """Weight files of a model in `folder`, each tensor at a place that is known from the start.

    Headers come first, so tensors come in any order and nothing is held. `where` names the model in messages. Methods
    raise OSError when the disk fails, and OutputError for a tensor that is not as planned.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        metadata: Mapping[str, str],
        where: Path,
        max_shard_bytes: int | None = None,
    ) -> None:
        self.folder, self.where = folder, where
        self.specs = {spec.name: spec for spec in specs}
        self._metadata = dict(sorted(metadata.items()))
        self._shards = _split_shards(specs, max_shard_bytes or MAX_SHARD_BYTES)
        self._places: dict[str, tuple[Path, int]] = {}
        self._heads: dict[Path, tuple[bytes, int]] = {}  # header and size of each shard
        if len(self.specs) != len(specs) or not all(spec.name.isprintable() and spec.name for spec in specs):
            raise OutputError(f"{where}: tensor names must be printable and each used once")
        for spec in specs:
            if spec.dtype not in DTYPE_NAMES:
                raise OutputError(f"{where}: {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold")
        for number, shard in enumerate(self._shards, 1):
            self._place(folder / self._shard_name(number), shard)

    def _shard_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return WEIGHTS_NAME
        return WEIGHTS_NAME.replace(".safetensors", f"-{number:05d}-of-{len(self._shards):05d}.safetensors")

    def _place(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._heads[path] = head, len(head) + offset
        for spec in specs:
            self._places[spec.name] = path, len(head) + header[spec.name]["data_offsets"][0]

    def there(self) -> bool:
        """Whether all weight files are there already, with these headers."""
        for path, (head, size) in self._heads.items():
            if not path.is_file() or path.stat().st_size != size:
                return False
            with path.open("rb") as stream:
                if stream.read(len(head)) != head:
                    return False
        return True

    def create(self) -> None:
        """Make the files, as long as they will be, and an index if there are several."""
        for path, (head, size) in self._heads.items():
            with path.open("wb") as stream:
                stream.write(head)
                stream.truncate(size)
                stream.flush()
                reserve(stream.fileno(), size)
                os.fsync(stream.fileno())
        if len(self._shards) > 1:
            weight_map = {name: path.name for name, (path, _) in sorted(self._places.items())}
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs.values())},
                "weight_map": weight_map,
            }
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.folder / WEIGHTS_NAME.replace(".safetensors", INDEX_SUFFIX), text.encode())
        sync_folder(self.folder)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place."""
        spec = self.specs.get(name)
        if spec is None:
            raise OutputError(f"{self.where}: tensor {name!r} is not planned")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise OutputError(
                f"{self.where}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, "
                f"planned were {list(spec.shape)} {spec.dtype}"
            )
        with self.place(name) as write:
            write(tensor.detach().cpu().reshape(-1))

    @contextmanager
    def place(self, name: str) -> Iterator[Callable[[torch.Tensor], None]]:
        """A function that writes the next elements of a tensor, from its first on; each thread may have its own."""
        path, offset = self._places[name]

        def write(part: torch.Tensor) -> None:
            left = part.contiguous().view(torch.uint8).numpy().data
            while left:  # the system may write less than asked for
                left = left[stream.write(left) :]

        with FileIO(path, "r+") as stream:
            stream.seek(offset)
            yield write

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the tensors of these names are on the disk."""
        for path in {self._places[name][0] for name in names}:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _split_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive groups of at most `limit` bytes of data (a larger tensor stands alone)."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    # Readers view each tensor in place, so wider elements go first: every offset stays a multiple of its width.
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


class ModelWriter:
    """Writes a model folder that appears whole or not at all.

    Everything goes to a hidden folder beside it (`Staging`), which `commit` puts in place; leaving the context without
    a commit removes it, and so does the next run after a kill. That folder is `command`'s, or `staging`, which the
    caller has opened already. Tensors come in any order and nothing is held. The same input gives the same bytes.
    `on_bytes` is told the size of each tensor written.

    Raises OutputError: `path` exists (without `overwrite`), its parent is missing or not writable, the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        *,
        metadata: Mapping[str, str],
        max_shard_bytes: int | None = None,
        overwrite: bool = False,
        on_bytes: Callable[[int], None] | None = None,
        command: str = "save_pretrained",
        staging: Staging | None = None,
    ) -> None:
        self.path = Path(path)
        self._staging, self._opened = staging or Staging(path, command, overwrite=overwrite), staging is not None
        self._files = ModelFiles(
            self._staging.content, specs, metadata=metadata, where=self.path, max_shard_bytes=max_shard_bytes
        )
        self._on_bytes = on_bytes
        self._written: set[str] = set()
        self._open = False
        self._staging.check(sum(spec.nbytes for spec in specs), kind="model", replaceable=is_model)

    def __enter__(self) -> ModelWriter:
        if not self._opened:
            with disk_errors(self.path):
                self._staging.open()
        self._open = True
        try:
            with disk_errors(self.path):
                self._staging.clear()
                self._staging.content.mkdir()
                self._files.create()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._abandon()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place. Raises OutputError if it is not the one planned, or comes twice."""
        self._require_open()
        if name in self._written:
            raise OutputError(f"{self.path}: tensor {name!r} was written before")
        with disk_errors(self.path):
            self._files.write(name, tensor)
        self._written.add(name)
        if self._on_bytes is not None:
            self._on_bytes(self._files.specs[name].nbytes)

    def write_text(self, filename: str, text: str) -> None:
        """Write a small UTF-8 file beside the weights, such as config.json."""
        self.write_bytes(filename, text.encode("utf-8"))

    def write_bytes(self, filename: str, data: bytes) -> None:
        """Write a small file beside the weights, such as a picture."""
        self._require_open()
        path = self._staging.content / filename
        if path.name != filename or path.exists():
            raise OutputError(f"{self.path}: {filename!r} is not a new file's name")
        with disk_errors(self.path):
            write_whole(path, data)

    def commit(self) -> None:
        """Put the folder in place. Raises OutputError when a planned tensor was not written."""
        self._require_open()
        missing = [name for name in self._files.specs if name not in self._written]
        if missing:
            raise OutputError(f"{self.path}: {len(missing)} planned tensors were not written, first {missing[0]!r}")
        with disk_errors(self.path):
            self._files.sync(self._written)
            self._staging.publish()
        self._open = False

    def _abandon(self) -> None:
        self._open = False
        self._staging.remove()

    def _require_open(self) -> None:
        if not self._open:
            raise OutputError(f"{self.path}: the writer is closed; use it inside its with block")
