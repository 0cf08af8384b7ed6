"""Checkpoint files: read tensors lazily from a file, a folder or the Hub; write a model folder whole or not at all.

This module knows files and tensors only. Which model they are is decided in `mlaconvert.families`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from mlaconvert.errors import CheckpointError, OutputError

CONFIG_NAME = "config.json"
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
_MAX_NESTING = 8  # dictionaries inside dictionaries of a pickle
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[^/\\]+)*/?")


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
    config.json beside them (None when there is none), `tensors` what each tensor is, in file order.
    """

    def __init__(self, source: str, path: Path, files: Sequence[Path], config: dict[str, Any] | None) -> None:
        self.source = source
        self.path = path
        self.files = tuple(files)
        self.config = config
        self._home: dict[str, Path] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._handles: dict[Path, Any] = {}
        self._stack = ExitStack()
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
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
            return _read_header(file)
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
            if file not in self._handles:
                self._handles[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            tensor: torch.Tensor = self._handles[file].get_tensor(name)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({_first_line(error)})") from None
        return tensor

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Hash of the weight files' names and contents; `progress` is told the bytes of each piece read."""
        total = hashlib.sha256()
        for file in sorted(self.files):
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    total.update(piece)
                    if progress is not None:
                        progress(len(piece))
        return total.hexdigest()

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._handles.clear()
        self._pickled = {}
        self._stack.close()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_finite(tensor: torch.Tensor, name: str, where: str | Path) -> None:
    """Raise CheckpointError naming the tensor when it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinite values; get an intact copy of the file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is not readable JSON ({_first_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not a {type(data).__name__}")
    return data


# --- finding the files -------------------------------------------------------------------------------------------


def open_store(
    source: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> TensorStore:
    """Open a checkpoint: a file, a folder, "tiny", or a Hub id (`user/repo[/path]`, with `revision`).

    A local path that exists wins over a Hub id. Reads .safetensors (one file, or shards with an index) and pickles
    of tensors (.pt, .pth, .ckpt, .bin; `weights_only` always). Downloads only the config, index and weights.
    Raises CheckpointError, naming the file and what to do.
    """
    path = _local_path(source, revision)
    if path is None:
        path = _download(str(source), revision, subfolder)
    elif path.is_dir():
        root = path / _checked_subfolder(subfolder) if subfolder else path
        if not root.is_dir():
            raise CheckpointError(f"{path}: it has no folder {subfolder!r}{_offer_experts(path)}")
        path = root / _select(_list_folder(root), str(root))
    elif subfolder:
        raise CheckpointError(
            f"{path}: a file has no subfolder {subfolder!r}; give the folder, or leave --subfolder out"
        )
    return _open_local(str(source), path)


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
    path = Path(source).expanduser()
    try:
        found = path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        raise CheckpointError(f"{str(source)[:80]!r} is not a path") from None
    if not found and str(source) == "tiny":
        path, found = TINY, True
    if found:
        if revision is not None:
            raise CheckpointError(f"{path} is on this disk, which has no revision {revision!r}; leave --revision out")
        return path
    text = str(source)
    looks_like_file = text.count("/") == 1 and Path(text).suffix in (".safetensors", *PICKLE_SUFFIXES)
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not looks_like_file:
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


def _open_local(source: str, path: Path) -> TensorStore:
    """Open one weight file, or the shards of an index."""
    config_file = path.parent / CONFIG_NAME
    config = read_json(config_file) if config_file.is_file() else None
    if path.name.endswith(INDEX_SUFFIX):
        placed = _read_index(path)
        store = TensorStore(source, path.parent, [path.parent / shard for shard in placed], config)
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
    return TensorStore(source, path, [path], config)


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


def _read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a .safetensors file in file order, after checking that header and file agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: truncated or not safetensors ({size} bytes); download it again")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({_first_line(error)})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    placed = sorted((_check_entry(path, name, entry) for name, entry in header.items()), key=lambda item: item[0])
    end = 0
    for (start, _), info in placed:
        if start != end:
            raise CheckpointError(f"{path}: tensor {info.name!r} overlaps another or leaves a gap; its header is wrong")
        end += info.nbytes
    if end != size - 8 - length:
        found = size - 8 - length
        raise CheckpointError(
            f"{path}: the header promises {end} bytes of data, the file has {found}; download it again"
        )
    return [info for _, info in placed]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is in it twice")
    return data


def _check_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, int], TensorInfo]:
    """((start, end), info) of one header entry. The end breaks ties of empty tensors."""
    _check_name(path, name)
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}, which is not known here")
    nbytes = prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {nbytes} bytes, "
            f"but its header gives it {offsets[1] - offsets[0]}"
        )
    return (offsets[0], offsets[1]), TensorInfo(name, shape, _DTYPES[dtype], nbytes)


def _counts(value: Any) -> tuple[int, ...] | None:
    """`value` if it is a list of integers, none of them negative."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


def _check_name(path: Path, name: str) -> None:
    if not name or not name.isprintable():
        raise CheckpointError(f"{path}: a tensor is named {name!r}; names must be printable text")


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, nested dictionaries joined with "/". Nothing but tensors is ever unpickled."""
    try:
        is_zip = zipfile.is_zipfile(path)  # older pickles cannot be mapped
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise CheckpointError(f"{path}: it is not a PyTorch checkpoint, or it is damaged") from None
        raise CheckpointError(
            f"{path}: it pickles more than tensors, and mlaconvert never runs pickled code. "
            "Save its state dict alone, as .safetensors or with torch.save, and use that"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: it is not a PyTorch checkpoint, or it is damaged ({_first_line(error)})"
        ) from None
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _flatten(path, data, ()):
        _check_name(path, name)
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are named {name!r}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor; save it as one")
        tensors[name] = tensor.detach()
    return tensors


def _flatten(path: Path, data: Any, outer: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    if len(outer) > _MAX_NESTING:
        raise CheckpointError(f"{path}: dictionaries are nested too deeply at {'/'.join(outer)!r}")
    if isinstance(data, torch.Tensor):
        yield "/".join(outer), data
    elif isinstance(data, Mapping):
        # Keys that are no text number an optimizer's state: no weights below them.
        for key, value in data.items():
            if isinstance(key, str):
                yield from _flatten(path, value, (*outer, key))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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


def _download(source: str, revision: str | None, subfolder: str | None) -> Path:
    """Fetch the config, index and weights that `source` names; the local path of the weight file or index."""
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
    wanted = [chosen]
    config = f"{folder}/{CONFIG_NAME}".lstrip("/")
    if config in names:
        wanted.append(config)
    path = _fetch(repo, revision, wanted)
    if chosen.endswith(INDEX_SUFFIX):
        shards = [f"{folder}/{shard}".lstrip("/") for shard in _read_index(path)]
        _fetch(repo, revision, [chosen, *shards])
    return path


def _fetch(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download files of one repo; the local path of the first."""
    from huggingface_hub import HfApi

    paths, snapshots = [], set()
    with _hub_errors(repo, revision):
        for name in names:
            path = Path(HfApi().hf_hub_download(repo, name, revision=revision))
            paths.append(path)
            snapshots.add(path.parents[name.count("/")])
    if len(snapshots) > 1:
        raise CheckpointError(f"{repo} changed on the Hub during the download; run the command again")
    return paths[0]


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
        raise CheckpointError(f"{repo} on the Hub lacks a file that it lists ({_first_line(error)})") from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise CheckpointError(f"{repo}: the Hub answered with status {status}; {hint}") from None
    except Exception as error:  # no network, offline mode, disk full: the classes depend on the HTTP library
        raise CheckpointError(
            f"{repo}: no such path here, and it cannot be fetched from the Hub ({type(error).__name__}: "
            f"{_first_line(error)}); check the network, or download it and give its folder"
        ) from None


# --- writing -----------------------------------------------------------------------------------------------------


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


class ModelWriter:
    """Writes a model folder that appears whole or not at all.

    Everything goes to the sibling folder `.<name>.partial`, which `commit` renames to `path`; leaving the context
    without a commit removes it. Headers come first, so `write` takes the tensors in any order and holds only one.
    The same input gives the same bytes. `on_bytes` is told the size of each tensor written.

    Raises OutputError: `path` exists (without `overwrite`), its parent is missing or not writable, the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        *,
        metadata: Mapping[str, str],
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.specs = {spec.name: spec for spec in specs}
        self._metadata = dict(sorted(metadata.items()))
        self._overwrite = overwrite
        self._on_bytes = on_bytes
        self._target = Path(path).expanduser().resolve()
        self._staging = self._target.with_name(f".{self._target.name}.partial")
        self._aside = self._target.with_name(f".{self._target.name}.replaced")
        self._shards = _split_shards(specs, max_shard_bytes)
        self._places: dict[str, tuple[Path, int]] = {}
        self._streams: dict[Path, BinaryIO] = {}
        self._written: set[str] = set()
        self._open = False
        if len(self.specs) != len(specs) or not all(spec.name.isprintable() and spec.name for spec in specs):
            raise OutputError(f"{self.path}: tensor names must be printable and each used once")
        for spec in specs:
            if spec.dtype not in _DTYPE_NAMES:
                raise OutputError(f"{self.path}: {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold")
        self._check_target()

    def _check_target(self) -> None:
        target = self._target
        if not target.parent.is_dir():
            raise OutputError(f"{self.path}: its parent folder {target.parent} does not exist; create it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path}: the folder {target.parent} is not writable")
        if target.exists():
            if not self._overwrite:
                raise OutputError(f"{self.path} exists; choose another path, or pass --overwrite to replace it")
            # Overwriting deletes: never a folder that holds something other than a model.
            if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG_NAME).is_file()):
                raise OutputError(f"{self.path} is not a model folder, so it is not replaced; choose another path")
        if self._staging.exists():
            raise OutputError(
                f"{self._staging} is there: another run is writing {self.path}, or one was killed. "
                "Delete it if none is running"
            )
        if self._aside.exists():
            raise OutputError(
                f"{self._aside} is a model that an interrupted run set aside: rename it back or delete it"
            )
        needed, free = sum(spec.nbytes for spec in self.specs.values()), shutil.disk_usage(target.parent).free
        if needed > free:
            raise OutputError(
                f"{self.path}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on its disk; "
                "make room or choose another disk"
            )

    def __enter__(self) -> ModelWriter:
        with self._disk_errors():
            self._staging.mkdir()
        self._open = True
        try:
            with self._disk_errors():
                for number, shard in enumerate(self._shards, 1):
                    self._start_shard(self._shard_name(number), shard)
                if len(self._shards) > 1:
                    self._write_index()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._abandon()

    def _shard_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return WEIGHTS_NAME
        return WEIGHTS_NAME.replace(".safetensors", f"-{number:05d}-of-{len(self._shards):05d}.safetensors")

    def _start_shard(self, filename: str, specs: Sequence[TensorSpec]) -> None:
        """Write the header and make the file as long as it will be."""
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path = self._staging / filename
        stream = path.open("wb")
        self._streams[path] = stream
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
        for spec in specs:
            self._places[spec.name] = (path, 8 + len(text) + header[spec.name]["data_offsets"][0])

    def _write_index(self) -> None:
        total = sum(spec.nbytes for spec in self.specs.values())
        weight_map = {name: path.name for name, (path, _) in sorted(self._places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.write_text(f"{WEIGHTS_NAME}.index.json", json.dumps(index, indent=2, ensure_ascii=False) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place. Raises OutputError if it is not the one planned, or comes twice."""
        self._require_open()
        spec = self.specs.get(name)
        if spec is None or name in self._written:
            problem = "is not planned" if spec is None else "was written before"
            raise OutputError(f"{self.path}: tensor {name!r} {problem}")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise OutputError(
                f"{self.path}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, "
                f"planned were {list(spec.shape)} {spec.dtype}"
            )
        path, offset = self._places[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._disk_errors():
            self._streams[path].seek(offset)
            self._streams[path].write(data.data)
        self._written.add(name)
        if self._on_bytes is not None:
            self._on_bytes(spec.nbytes)

    def write_text(self, filename: str, text: str) -> None:
        """Write a small UTF-8 file beside the weights, such as config.json."""
        self.write_bytes(filename, text.encode("utf-8"))

    def write_bytes(self, filename: str, data: bytes) -> None:
        """Write a small file beside the weights, such as a picture."""
        self._require_open()
        path = self._staging / filename
        if path.name != filename or path.exists():
            raise OutputError(f"{self.path}: {filename!r} is not a new file's name")
        with self._disk_errors():
            stream = path.open("wb")
            self._streams[path] = stream
            stream.write(data)

    def commit(self) -> None:
        """Put the folder in place. Raises OutputError when a planned tensor was not written."""
        self._require_open()
        missing = [name for name in self.specs if name not in self._written]
        if missing:
            raise OutputError(f"{self.path}: {len(missing)} planned tensors were not written, first {missing[0]!r}")
        with self._disk_errors():
            for stream in self._streams.values():
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            _sync_folder(self._staging)
            if self._target.exists() and self._overwrite:
                swap_folders(self._staging, self._target, self._aside)
            else:
                self._staging.rename(self._target)
            self._open = False
        with suppress(OSError):  # it is in place; some network disks cannot sync a folder
            _sync_folder(self._target.parent)
        shutil.rmtree(self._aside, ignore_errors=True)

    def _abandon(self) -> None:
        self._open = False
        for stream in self._streams.values():
            with suppress(OSError):  # a full disk: the data is thrown away in any case
                stream.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def _require_open(self) -> None:
        if not self._open:
            raise OutputError(f"{self.path}: the writer is closed; use it inside its with block")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path}: writing failed ({error.strerror or error}); nothing was left there"
            ) from None


def swap_folders(staging: Path, target: Path, aside: Path) -> None:
    """Put `staging` in the place of `target`, which becomes `aside`; when that fails, all is as it was."""
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise


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


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
