"""Write a model folder that appears whole or not at all: built in a hidden folder, put in place in one step.

Like `mlaconvert.checkpoint`, this module knows files and tensors only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mlaconvert.checkpoint import CONFIG_NAME, DTYPE_NAMES, INDEX_SUFFIX, WEIGHTS_NAME, experts
from mlaconvert.errors import OutputError
from mlaconvert.inputs import refuse_links

MAX_SHARD_BYTES = 5_000_000_000
_LOCK, _MODEL = "lock", "model"


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


# --- the hidden folder -------------------------------------------------------------------------------------------


class Staging:
    """The hidden folder `.NAME.partial` in which the model folder `path` is built: `publish` puts it in place.

    `model` is what will be put in place; its owner may keep other things in `folder`. A lock, which the system lets go
    of when its process dies, tells a run that works there from one that was killed.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self.target = Path(path).expanduser().resolve()
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.model = self.folder / _MODEL
        self._aside = self.target.with_name(f".{self.target.name}.replaced")
        self._lock: int | None = None

    def check(self, needed: int, *, pair: bool = False) -> None:
        """Raise OutputError when `path` may not be written, or `needed` bytes have no room; changes nothing.

        With `pair`, a folder of two experts may be overwritten too.
        """
        target = self.target
        if not target.parent.is_dir():
            raise OutputError(f"{self.path}: its parent folder {target.parent} does not exist; create it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path}: the folder {target.parent} is not writable")
        if target.exists():
            if not self.overwrite:
                raise OutputError(f"{self.path} exists; choose another path, or pass --overwrite to replace it")
            # Overwriting deletes: never a folder that holds something other than a model.
            if not target.is_dir() or not _replaceable(target, pair):
                raise OutputError(f"{self.path} is not a model folder, so it is not replaced; choose another path")
        elif self._aside.exists() and not self.overwrite:
            raise OutputError(
                f"{self._aside} is the model that an interrupted run was replacing: go on with --overwrite, "
                "or rename it back"
            )
        if self.folder.exists():
            self._check_folder()
        free = shutil.disk_usage(target.parent).free
        missing = needed - _allocated(self.model)
        if missing > free:
            raise OutputError(
                f"{self.path}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on its disk; "
                "make room or choose another disk"
            )

    def _check_folder(self) -> None:
        lock = self.folder / _LOCK
        ours = self.folder.is_dir() and not self.folder.is_symlink()
        if not ours or (any(self.folder.iterdir()) and not lock.is_file()):
            raise OutputError(f"{self.folder} is in the way: delete it, or choose another path than {self.path}")
        for folder in (self.folder, self.model, *self.model.glob("*/")):
            refuse_links(folder)
        if lock.is_file() and self._lock is None:
            self._acquire(shared=True)  # several processes may look at once
            self.close()

    def open(self) -> None:
        """Take the folder, with what a killed run left. Raises OutputError when another run has it, or OSError."""
        self.folder.mkdir(exist_ok=True)
        self._check_folder()
        (self.folder / _LOCK).touch()
        self._acquire()
        if self._aside.exists():  # a run was killed while it replaced the old model, or just after
            if self.target.exists():
                shutil.rmtree(self._aside)
            else:
                self._aside.rename(self.target)

    def clear(self) -> None:
        """Throw away what the folder holds. Raises OSError."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def publish(self) -> None:
        """Put `model`, whose files are on the disk, in the place of `path` and remove the hidden folder.

        Raises OSError; all is then as it was.
        """
        for folder in (*(path for path in self.model.iterdir() if path.is_dir()), self.model):
            _sync_folder(folder)
        if self.target.exists() and self.overwrite:
            swap_folders(self.model, self.target, self._aside)
        else:
            self.model.rename(self.target)
        with suppress(OSError):  # it is in place; some network disks cannot sync a folder
            _sync_folder(self.target.parent)
        shutil.rmtree(self._aside, ignore_errors=True)
        self.remove()

    def remove(self) -> None:
        """Throw the folder away and let go of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder and leave it as it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _acquire(self, *, shared: bool = False) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        handle = os.open(self.folder / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise OutputError(f"{self.folder} is there: another run is writing {self.path}; wait for it") from None
        except OSError:
            pass  # a network disk without locks
        self._lock = handle


@contextmanager
def disk_errors(path: Path, fate: str = "nothing was left there") -> Iterator[None]:
    """Turn an OSError into an OutputError about `path` that says what became of the work."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: writing failed ({error.strerror or error}); {fate}") from None


def _replaceable(folder: Path, pair: bool) -> bool:
    return not any(folder.iterdir()) or (folder / CONFIG_NAME).is_file() or (pair and bool(experts(folder)))


def _allocated(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk already; holes in them take none."""
    files = folder.rglob("*.safetensors") if folder.is_dir() else ()
    return sum(512 * getattr(file.stat(), "st_blocks", 0) for file in files)


def swap_folders(staging: Path, target: Path, aside: Path) -> None:
    """Put `staging` in the place of `target`, which becomes `aside`; when that fails, all is as it was."""
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise


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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even when the machine stops. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- the files of a model ----------------------------------------------------------------------------------------


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
        _sync_folder(self.folder)

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


# --- both, for a model that is written in one go -----------------------------------------------------------------


class ModelWriter:
    """Writes a model folder that appears whole or not at all.

    Everything goes to a hidden folder beside it (`Staging`), which `commit` puts in place; leaving the context without
    a commit removes it, and so does the next run after a kill. Tensors come in any order and nothing is held. The same
    input gives the same bytes. `on_bytes` is told the size of each tensor written.

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
    ) -> None:
        self.path = Path(path)
        self._staging = Staging(path, overwrite=overwrite)
        self._files = ModelFiles(
            self._staging.model, specs, metadata=metadata, where=self.path, max_shard_bytes=max_shard_bytes
        )
        self._on_bytes = on_bytes
        self._written: set[str] = set()
        self._open = False
        self._staging.check(sum(spec.nbytes for spec in specs))

    def __enter__(self) -> ModelWriter:
        with disk_errors(self.path):
            self._staging.open()
        self._open = True
        try:
            with disk_errors(self.path):
                self._staging.clear()
                self._staging.model.mkdir()
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
        path = self._staging.model / filename
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
