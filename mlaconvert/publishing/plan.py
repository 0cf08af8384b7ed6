"""What a push would change, file by file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from huggingface_hub import RepoFile

from mlaconvert.files.names import CONVERSION_NAME, README_NAME
from mlaconvert.progress import Counter, Progress, silent
from mlaconvert.publishing.api import RemoteFiles
from mlaconvert.publishing.folder import RECORDS, WEIGHTS, ModelFolder


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """One file of a push. "same" and "kept" stay as they are on the Hub, "kept" being a card edited there."""

    path: str
    size: int  # bytes
    state: Literal["new", "changed", "same", "kept", "deleted"]


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What a push would do to `repo`, decided from the folder and the Hub's state at commit `parent`.

    `exists` is whether the repository is there, None when nobody is logged in to see. `left_out` are files of the
    folder that do not belong to a model. `card` is the README.md as it will be on the Hub, generated or not. `notes`
    are short remarks for the user.
    """

    repo: str
    private: bool
    exists: bool | None
    parent: str | None
    files: tuple[FileChange, ...]
    left_out: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def changes(self) -> tuple[FileChange, ...]:
        """The files that a commit would add, replace or delete."""
        return tuple(file for file in self.files if file.state not in ("same", "kept"))

    @property
    def upload_bytes(self) -> int:
        """Size of the files that a commit would send."""
        return sum(file.size for file in self.changes if file.state != "deleted")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "repo": self.repo,
            "private": self.private,
            "exists": self.exists,
            "files": [{"path": file.path, "bytes": file.size, "state": file.state} for file in self.files],
            "upload_bytes": self.upload_bytes,
            "left_out": list(self.left_out),
            "card": self.card,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """A plan and the URL of the commit that carried it out, None for a dry run or when nothing had changed."""

    plan: PushPlan
    commit_url: str | None


def compare_files(
    local: ModelFolder, remote: RemoteFiles | None, card: bytes, card_state: str, progress: Progress | None
) -> Iterator[FileChange]:
    """What becomes of every file, by the hashes that the Hub lists; only files of equal size are hashed."""
    there = remote.files if remote is not None else {}
    sizes = {name: local.size(name) for name in local.names} | {README_NAME: len(card)}
    alike = {path for path, size in sizes.items() if path in there and there[path].size == size}
    count = Counter(progress or silent, "hash", sum(sizes[path] for path in alike))
    if alike:
        count.show()
    for path, size in sorted(sizes.items()):
        state: Literal["new", "changed", "same", "kept"] = "changed" if path in there else "new"
        if path == README_NAME and card_state == "kept":
            state = "kept"
        elif path in alike:
            with io.BytesIO(card) if path == README_NAME else local.open(path) as stream:
                state = "same" if _same(stream, size, there[path], count.step) else state
        yield FileChange(path=path, size=size, state=state)
    for path in sorted(there.keys() - sizes.keys()):
        if _is_stale(path, there):
            yield FileChange(path=path, size=there[path].size, state="deleted")


def _is_stale(path: str, there: Mapping[str, RepoFile]) -> bool:
    """Whether a file that the folder has no longer may not stay beside the new ones.

    A stale index or shard would be read in place of the new weights, stale figures would speak of other weights. Only
    in folders that an earlier push wrote; a VAE beside the model, for one, is left alone.
    """
    folder, _, name = path.rpartition("/")
    ours = f"{folder}/{CONVERSION_NAME}".lstrip("/") in there
    return ours and (name in RECORDS or WEIGHTS.fullmatch(name) is not None)


def _same(stream: BinaryIO, size: int, old: RepoFile, count: Callable[[int], None]) -> bool:
    """Whether `stream` has the Hub's file: large files are known by their SHA-256, others by git's hash."""
    digest = hashlib.sha256() if old.lfs is not None else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while piece := stream.read(1 << 22):
        digest.update(piece)
        count(len(piece))
    return digest.hexdigest() == (old.lfs.sha256 if old.lfs is not None else old.blob_id)
