"""Which files of a folder, or of a repository's list, are the model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from mlaconvert.errors import CheckpointError, is_plain
from mlaconvert.files.inputs import file_size
from mlaconvert.files.names import EXPERT_FOLDERS, INDEX_SUFFIX, PICKLE_SUFFIXES, WEIGHTS_NAME
from mlaconvert.files.shipped import TINY

SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[^/\\]+)*/?")
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\?#-][^\s\\?#]*")


def local_path(source: str | os.PathLike[str], revision: str | None) -> Path | None:
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


def list_folder(folder: Path) -> list[str]:
    """Names of the files in `folder` and in its folders, one level down."""
    try:
        return sorted(
            p.relative_to(folder).as_posix() for p in chain(folder.glob("*"), folder.glob("*/*")) if p.is_file()
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be listed ({error.strerror})") from None


def find_experts(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of two experts among these file names, high noise first; () without."""
    folders = {n.split("/")[0] for n in names if n.endswith(".safetensors") and n.count("/") == 1}
    return next((pair for pair in EXPERT_FOLDERS if folders.issuperset(pair)), ())


def offer_experts(folder: Path) -> str:
    """What a message adds of the two experts in a folder; nothing without."""
    found = find_experts(list_folder(folder))
    return f"; it has {' and '.join(found)}" if found else ""


def select(names: Sequence[str], where: str) -> str:
    """Of the file names in a folder, the weight file or index to open. Raises CheckpointError when none stands out."""
    if pair := find_experts(names):
        raise CheckpointError(f"{where}: it holds two experts; give --subfolder {pair[0]} or --subfolder {pair[1]}")
    here = [n for n in names if "/" not in n and not n.startswith(".")]
    indexes = [n for n in here if n.endswith(INDEX_SUFFIX)]
    whole = [n for n in here if n.endswith(".safetensors") and not SHARD.search(n)]
    pickles = [n for n in here if n.endswith(PICKLE_SUFFIXES)]
    for found in (indexes, whole):
        standard = [n for n in found if n in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json")]
        if standard or found:
            return _only(standard or found, where)
    if any(SHARD.search(n) for n in here):
        raise CheckpointError(f"{where}: it holds shards but no *{INDEX_SUFFIX}; download the index too")
    inner = [n.removeprefix("transformer/") for n in names if n.startswith("transformer/")]
    if any(n.endswith((".safetensors", *PICKLE_SUFFIXES)) for n in inner):
        return "transformer/" + select(inner, f"{where}/transformer")
    if pickles:
        return _only(pickles, where)
    raise CheckpointError(f"{where}: it holds no weights (.safetensors, or {', '.join(PICKLE_SUFFIXES)})")


def _only(names: Sequence[str], where: str) -> str:
    if len(names) > 1:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise CheckpointError(f"{where}: it holds several weight files ({shown}); name the one to read")
    return names[0]
