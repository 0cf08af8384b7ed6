"""Find the model in what a user gives: a file, a folder, a Hub id, or the built-in model's name."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import chain
from pathlib import Path

from mlaconvert.errors import CheckpointError
from mlaconvert.files.headers import read_index
from mlaconvert.files.hub_cache import checked_subfolder, download, list_repo, split_hub_id
from mlaconvert.files.inputs import is_folder, read_json
from mlaconvert.files.names import CONFIG_NAME, PICKLE_SUFFIXES, is_index
from mlaconvert.files.select import (
    DISTCP,
    NON_BLOCK,
    SHARD,
    block_files,
    distributed,
    find_experts,
    is_weights,
    list_folder,
    local_path,
    offer_experts,
    refuse_cache,
    select,
)
from mlaconvert.files.store import TensorStore


def open_store(
    source: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> TensorStore:
    """Open a checkpoint: a file, a folder, "tiny", or a Hub id (`user/repo[/path]`, with `revision`).

    A local path that exists wins over a Hub id. Reads .safetensors (one file, or shards with an index), pickles
    of tensors (.pt, .pth, .ckpt, .bin; `weights_only` always) and GGUF. Downloads only the config, index, weights
    and, of a converted model, the records of its conversion and healing.
    Raises CheckpointError, naming the file and what to do.
    """
    path, commit = local_path(source, revision), None
    if path is None:
        path, commit = download(str(source), revision, subfolder)
    elif path.is_dir():
        root = path / checked_subfolder(subfolder) if subfolder else path
        if not is_folder(root):
            raise CheckpointError(f"{path}: it has no folder {subfolder!r}{offer_experts(path)}")
        names = list_folder(root)
        if not any(is_weights(name) or is_index(name) for name in names):
            refuse_cache(root)
        path = root / select(names, str(root))
        if path.is_symlink() and not path.exists():
            lost = "shards but no index" if is_index(path.name) else "no weights"
            raise CheckpointError(
                f"{root}: it holds {lost}: {path.name} is a link to nowhere ({path.readlink()}); download it again"
            )
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
        repo = split_hub_id(store.source)[0]
        return Path(HfApi().hf_hub_download(repo, "/".join((*inside, name)), revision=store.revision))
    except (EntryNotFoundError, OSError):
        return None


def experts(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, ...]:
    """The two subfolders of a Wan2.2 A14B source (high noise first), or () for any other source."""
    path = local_path(source, revision)
    if path is not None:
        return find_experts(list_folder(path)) if path.is_dir() else ()
    repo, inside = split_hub_id(str(source))
    prefix = f"{inside}/" if inside else ""
    return find_experts([n[len(prefix) :] for n in list_repo(repo, revision) if n.startswith(prefix)])


def _open_local(source: str, path: Path, revision: str | None) -> TensorStore:
    """Open one weight file, or the shards of an index."""
    config_file = path.parent / CONFIG_NAME
    config = read_json(config_file) if config_file.exists() or config_file.is_symlink() else None
    if is_index(path.name):
        placed = read_index(path)
        store = TensorStore(source, path.parent, [path.parent / shard for shard in placed], config, revision)
        listed = set(chain.from_iterable(placed.values()))
        for kind, names in (("lists", listed - set(store.tensors)), ("leaves out", set(store.tensors) - listed)):
            if names:
                store.close()
                raise CheckpointError(f"{path}: it {kind} {min(names)!r}, against its shards; download the files again")
        return store
    if path.name.endswith(DISTCP):
        raise distributed(str(path.parent))
    if not is_weights(path.name):
        raise CheckpointError(f"{path}: not a weight file (.safetensors, {', '.join(PICKLE_SUFFIXES)}, .gguf)")
    if SHARD.search(path.name):
        raise CheckpointError(f"{path}: one shard of several; give its folder {path.parent}")
    blocks = block_files(path.name, [file.name for file in path.parent.iterdir()] if path.name == NON_BLOCK else ())
    return TensorStore(source, path, [path, *sorted(path.parent / name for name in blocks)], config, revision)
