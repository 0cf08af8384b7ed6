"""Checkpoint files: read tensors lazily from a file, a folder or the Hub; `mlaconvert.writer` writes them.

This module knows files and tensors only. Which model they are is decided in `mlaconvert.families`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from io import RawIOBase
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlaconvert.errors import CheckpointError, is_plain
from mlaconvert.inputs import file_size, is_folder, parse_json, read_json, reason_of

CONFIG_NAME = "config.json"
# What a converted model's folder says of where it came from; it goes where the weights go.
CONVERSION_NAME, HEALING_NAME = "conversion.json", "healing.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
TINY = Path(__file__).parent / "tiny"

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
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 20  # bytes of a file that are read at a time
_MAX_HEADER = 1 << 22  # bytes of a .safetensors header; the largest Wan models have 0.2 million
_MAX_TENSORS = 100_000
_MAX_DIMS = 8
_MAX_PICKLE = 1 << 21  # bytes of a PyTorch file's pickle, which has no weights in it: some 300 a tensor
_MAX_NESTING = 8  # dictionaries inside dictionaries of a pickle
_MAX_ENTRIES = 200_000  # of all dictionaries of a pickle; one that is in it twice counts twice
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[^/\\]+)*/?")
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\?#-][^\s\\?#]*")


# Asked about a tensor by name; may give a function that takes its elements, some [n] at a time.
Visit = Callable[[str], AbstractContextManager[Callable[[torch.Tensor], None] | None]]


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor; `nbytes` is the size of its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class TensorStore:
    """The tensors of one checkpoint, read one at a time. Use it as a context manager, or call `close`.

    `source` is what was asked for, `path` the file or folder on this disk, `files` its weight files, `config` the
    config.json beside them (None when there is none), `revision` the Hub's commit that they are of (None for local
    ones), `tensors` what each tensor is, in file order.
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
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def _scan(self, file: Path) -> Iterable[TensorInfo]:
        if file.suffix == ".safetensors":
            infos = read_header(file)
            self._handle(file)  # the library that will read the tensors must agree
            return infos
        self._pickled = _load_pickle(file)
        return [TensorInfo(name, tuple(t.shape), t.dtype, t.nbytes) for name, t in self._pickled.items()]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from the file rather than copied. Raises CheckpointError for an unknown name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: it has no tensor {name!r}")
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

    def sha256(self, progress: Callable[[int], None] | None = None, visit: Visit | None = None) -> str:
        """Hash of the weight files' names and contents, read once; `progress` is told the bytes of each piece.

        On the way, `visit` is asked about each tensor of a .safetensors file by name, and may give a function that
        takes the tensor's elements, some [n] at a time, in memory that is used again.
        Raises CheckpointError when a file cannot be read to its end.
        """
        total = hashlib.sha256()
        for file in sorted(self.files):
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb", buffering=0) as stream:
                for info in self._regions(file):
                    with visit(info.name) if visit is not None and info.name else nullcontext() as take:
                        for piece in _pieces(stream, file, info.nbytes, forget=take is not None):
                            total.update(piece.numpy().data)
                            if take is not None:
                                take(piece.view(info.dtype))
                            if progress is not None:
                                progress(len(piece))
        return total.hexdigest()

    def _regions(self, file: Path) -> list[TensorInfo]:
        """What a file consists of: a header without a name, then tensors without gaps; a PyTorch file is all header."""
        inside = [info for info in self.tensors.values() if self._home[info.name] == file and file in self._handles]
        header = file.stat().st_size - sum(info.nbytes for info in inside)
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


# --- finding the files -------------------------------------------------------------------------------------------


def open_store(
    source: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> TensorStore:
    """Open a checkpoint: a file, a folder, "tiny", or a Hub id (`user/repo[/path]`, with `revision`).

    A local path that exists wins over a Hub id. Reads .safetensors (one file, or shards with an index) and pickles
    of tensors (.pt, .pth, .ckpt, .bin; `weights_only` always). Downloads only the config, index, weights and, of a
    converted model, the records of its conversion and healing.
    Raises CheckpointError, naming the file and what to do.
    """
    path, commit = _local_path(source, revision), None
    if path is None:
        path, commit = _download(str(source), revision, subfolder)
    elif path.is_dir():
        root = path / _checked_subfolder(subfolder) if subfolder else path
        if not is_folder(root):
            raise CheckpointError(f"{path}: it has no folder {subfolder!r}{_offer_experts(path)}")
        path = root / _select(_list_folder(root), str(root))
    elif subfolder:
        raise CheckpointError(
            f"{path}: a file has no subfolder {subfolder!r}; give the folder, or leave --subfolder out"
        )
    return _open_local(str(source), path, commit)


def find_beside(store: TensorStore, name: str, *, above: Collection[str] = ()) -> Path | None:
    """The file `name` beside a store's weights, here or on the Hub; None without one.

    With `above`, it is the one beside the folder of such a name that the weights lie in, None if they lie in no such.
    """
    folder = store.path if store.path.is_dir() else store.path.parent
    if above:
        if folder.name not in above:
            return None
        folder = folder.parent
    path = folder / name
    if path.is_file():
        return path
    if store.revision is None or store.revision not in folder.parts:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    inside = folder.parts[folder.parts.index(store.revision) + 1 :]
    try:
        repo = _split_hub_id(store.source)[0]
        return Path(HfApi().hf_hub_download(repo, "/".join((*inside, name)), revision=store.revision))
    except (EntryNotFoundError, OSError):
        return None


def recorded_places(record: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Name and revision, likeliest first, of what a model was converted from, given its conversion.json's `source`."""
    name, commit = record.get("name"), record.get("revision")
    if not isinstance(name, str):
        return []
    return [(name, commit), (name, None)] if isinstance(commit, str) else [(name, None)]


def experts(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, ...]:
    """The two subfolders of a Wan2.2 A14B source (high noise first), or () for any other source."""
    path = _local_path(source, revision)
    if path is not None:
        return _find_experts(_list_folder(path)) if path.is_dir() else ()
    repo, inside = _split_hub_id(str(source))
    prefix = f"{inside}/" if inside else ""
    return _find_experts([n[len(prefix) :] for n in _list_repo(repo, revision) if n.startswith(prefix)])


def _local_path(source: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The local path that `source` means, or None when it can only be a Hub id."""
    text = str(source)
    if not text.strip() or not is_plain(text):
        raise CheckpointError(f"{text!r} is not a path: names must be plain UTF-8 text; rename it")
    try:
        path = Path(source).expanduser()
        found = path.exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, or an unknown user's home
        raise CheckpointError(f"{text!r} is not a path; give a file, a folder or a Hub id (user/repo)") from None
    if not found and text == "tiny":
        path, found = TINY, True
    if found:
        if revision is not None:
            raise CheckpointError(f"{path} is on this disk, which has no revision {revision!r}; leave --revision out")
        if not path.is_dir():
            file_size(path)
        if not is_plain(path.resolve().name):
            raise CheckpointError(f"{path.resolve()}: names must be plain UTF-8 text; rename it")
        return path
    if path.is_symlink():
        raise CheckpointError(f"{path}: it is a link that leads nowhere; mend it, or give another path")
    looks_like_file = text.count("/") == 1 and Path(text).suffix in (".safetensors", *PICKLE_SUFFIXES)
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not looks_like_file:
        if not {".", ".."}.isdisjoint(text.split("/")):
            raise CheckpointError(f"{text!r} leads outside its repository; give user/repo or user/repo/folder")
        if revision is not None and not _REVISION.fullmatch(revision):
            raise CheckpointError(f"revision {revision!r} is no branch, tag or commit; check --revision")
        return None
    raise CheckpointError(f"{path}: there is no such file or folder (a Hub id looks like user/repo)")


def _checked_subfolder(subfolder: str) -> str:
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"subfolder {subfolder!r} leads outside the source; give a folder inside it")
    return str(inside)


def _list_folder(folder: Path) -> list[str]:
    """Names of the files in `folder` and in its folders, one level down."""
    try:
        return sorted(
            p.relative_to(folder).as_posix() for p in chain(folder.glob("*"), folder.glob("*/*")) if p.is_file()
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be listed ({error.strerror})") from None


def _find_experts(names: Iterable[str]) -> tuple[str, ...]:
    folders = {n.split("/")[0] for n in names if n.endswith(".safetensors") and n.count("/") == 1}
    return next((pair for pair in EXPERT_FOLDERS if folders.issuperset(pair)), ())


def _offer_experts(folder: Path) -> str:
    found = _find_experts(_list_folder(folder))
    return f"; it has {' and '.join(found)}" if found else ""


def _select(names: Sequence[str], where: str) -> str:
    """Of the file names in a folder, the weight file or index to open. Raises CheckpointError when none stands out."""
    if pair := _find_experts(names):
        raise CheckpointError(f"{where}: it holds two experts; give --subfolder {pair[0]} or --subfolder {pair[1]}")
    here = [n for n in names if "/" not in n and not n.startswith(".")]
    indexes = [n for n in here if n.endswith(INDEX_SUFFIX)]
    whole = [n for n in here if n.endswith(".safetensors") and not _SHARD.search(n)]
    pickles = [n for n in here if n.endswith(PICKLE_SUFFIXES)]
    for found in (indexes, whole):
        standard = [n for n in found if n in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json")]
        if standard or found:
            return _only(standard or found, where)
    if any(_SHARD.search(n) for n in here):
        raise CheckpointError(f"{where}: it holds shards but no *{INDEX_SUFFIX}; download the index too")
    inner = [n.removeprefix("transformer/") for n in names if n.startswith("transformer/")]
    if any(n.endswith((".safetensors", *PICKLE_SUFFIXES)) for n in inner):
        return "transformer/" + _select(inner, f"{where}/transformer")
    if pickles:
        return _only(pickles, where)
    raise CheckpointError(f"{where}: it holds no weights (.safetensors, or {', '.join(PICKLE_SUFFIXES)})")


def _only(names: Sequence[str], where: str) -> str:
    if len(names) > 1:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise CheckpointError(f"{where}: it holds several weight files ({shown}); name the one to read")
    return names[0]


def _open_local(source: str, path: Path, revision: str | None) -> TensorStore:
    """Open one weight file, or the shards of an index."""
    config_file = path.parent / CONFIG_NAME
    config = read_json(config_file) if config_file.exists() or config_file.is_symlink() else None
    if path.name.endswith(INDEX_SUFFIX):
        placed = _read_index(path)
        store = TensorStore(source, path.parent, [path.parent / shard for shard in placed], config, revision)
        listed = set(chain.from_iterable(placed.values()))
        for kind, names in (("lists", listed - set(store.tensors)), ("leaves out", set(store.tensors) - listed)):
            if names:
                store.close()
                raise CheckpointError(f"{path}: it {kind} {min(names)!r}, against its shards; download the files again")
        return store
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise CheckpointError(f"{path}: not a weight file (.safetensors, {', '.join(PICKLE_SUFFIXES)})")
    if _SHARD.search(path.name):
        raise CheckpointError(f"{path}: one shard of several; give its folder {path.parent}")
    return TensorStore(source, path, [path], config, revision)


def _read_index(path: Path) -> dict[str, list[str]]:
    """Shard file -> its tensors, from an index whose shards all lie in its own folder."""
    placed: dict[str, list[str]] = {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: it has no weight_map; download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(f"{path}: {name!r} points to {shard!r}, which is not a .safetensors file beside it")
        placed.setdefault(shard, []).append(name)
    return dict(sorted(placed.items()))


# --- reading one file --------------------------------------------------------------------------------------------


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a .safetensors file in file order, after checking that header and file agree.

    Raises CheckpointError naming the file and the tensor.
    """
    size = file_size(path)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated or not safetensors ({size} bytes); download it again")
            if length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path}: its header has {length:,} bytes, expected at most {_MAX_HEADER:,}; download it again"
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


def _check_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, int], TensorInfo]:
    """((start, end), info) of one header entry. The end breaks ties of empty tensors."""
    _check_name(path, name)
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


def _check_name(path: Path, name: str) -> None:
    if not name or not name.isprintable():
        raise CheckpointError(f"{path}: a tensor is named {name!r}; expected printable text, get an intact copy")


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, nested dictionaries joined with "/". Nothing but tensors is ever unpickled."""
    size = file_size(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # older pickles cannot be mapped
        available = check_zip(path, size) if is_zip else size
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise CheckpointError(
                f"{path}: it is not a PyTorch checkpoint, or it is damaged; download it again"
            ) from None
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
        _check_name(path, name)
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are named {name!r}; save one state dict alone")
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


# --- the Hub -----------------------------------------------------------------------------------------------------


def _split_hub_id(source: str) -> tuple[str, str]:
    """("user/repo", "path/inside or nothing")."""
    user, name, *inside = source.rstrip("/").split("/")
    return f"{user}/{name}", "/".join(inside)


def _list_repo(repo: str, revision: str | None) -> list[str]:
    """File names of a Hub repo; those in the local cache when the Hub is out of reach."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with _hub_errors(repo, revision):
        try:
            siblings = HfApi().model_info(repo, revision=revision).siblings or []
            return [file.rfilename for file in siblings]
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:  # no network: each HTTP library has its own class
            # The pattern asks for no file: this only finds the cached snapshot, complete or not.
            try:
                found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["//"])
            except Exception:
                raise error from None
            return [p.relative_to(found).as_posix() for p in Path(found).rglob("*") if p.is_file()]


def _download(source: str, revision: str | None, subfolder: str | None) -> tuple[Path, str]:
    """Fetch what `source` names, with the config and records beside it: path of weight file or index, the commit."""
    repo, inside = _split_hub_id(source)
    if subfolder:
        inside = f"{inside}/{_checked_subfolder(subfolder)}".lstrip("/")
    names = _list_repo(repo, revision)
    if inside in names:
        chosen = inside
    else:
        prefix = f"{inside}/" if inside else ""
        below = [n[len(prefix) :] for n in names if n.startswith(prefix)]
        if not below:
            raise CheckpointError(f"{repo} on the Hub has no file or folder {inside!r}; check the path and --revision")
        chosen = prefix + _select(below, f"{repo}/{inside}".rstrip("/"))
    folder = chosen.rpartition("/")[0]
    beside = (f"{folder}/{name}".lstrip("/") for name in (CONFIG_NAME, CONVERSION_NAME, HEALING_NAME))
    snapshot = _fetch(repo, revision, [chosen, *(name for name in beside if name in names)])
    if chosen.endswith(INDEX_SUFFIX):
        shards = [f"{folder}/{shard}".lstrip("/") for shard in _read_index(snapshot / chosen)]
        _fetch(repo, revision, [chosen, *shards])
    return snapshot / chosen, snapshot.name


def _fetch(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download files of one repo; the folder in the Hub's cache that they lie in, which is named by their commit."""
    from huggingface_hub import HfApi

    snapshots = set()
    with _hub_errors(repo, revision):
        for name in names:
            snapshots.add(Path(HfApi().hf_hub_download(repo, name, revision=revision)).parents[name.count("/")])
    if len(snapshots) > 1:
        raise CheckpointError(f"{repo} changed on the Hub during the download; run the command again")
    return snapshots.pop()


def list_files(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, ...]:
    """Names of all files of a local folder or a Hub repo, sorted, with "/" between folders. Raises CheckpointError."""
    path = _local_path(source, revision)
    if path is not None:
        return tuple(sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    repo, inside = _split_hub_id(str(source))
    prefix = f"{inside}/" if inside else ""
    return tuple(sorted(n[len(prefix) :] for n in _list_repo(repo, revision) if n.startswith(prefix)))


def fetch_files(source: str | os.PathLike[str], names: Sequence[str], revision: str | None = None) -> Path:
    """The local folder that holds the files `names` of a folder or Hub repo; what is missing is downloaded.

    Raises CheckpointError.
    """
    path = _local_path(source, revision)
    if path is None:
        repo, inside = _split_hub_id(str(source))
        prefix = f"{inside}/" if inside else ""
        path = _fetch(repo, revision, [prefix + name for name in names]) / inside
    return path


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        ) from None
    except hub.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: no such path here and no such model on the Hub; check the name, or log in with `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise CheckpointError(f"{repo} on the Hub has no revision {revision!r}; check --revision") from None
    except hub.HFValidationError:
        raise CheckpointError(f"{repo!r} is neither a path here nor a Hub id (user/repo)") from None
    except hub.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{repo} on the Hub lacks a file that it lists ({reason_of(error)})") from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise CheckpointError(f"{repo}: the Hub answered with status {status}; {hint}") from None
    except Exception as error:  # no network, offline mode, disk full: the classes depend on the HTTP library
        raise CheckpointError(
            f"{repo}: no such path here, and it cannot be fetched from the Hub ({type(error).__name__}: "
            f"{reason_of(error)}); check the network, or download it and give its folder"
        ) from None
