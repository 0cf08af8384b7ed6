"""What a file is by its first bytes, where its name says something else."""

from __future__ import annotations

from pathlib import Path

from mlaconvert.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes of a .safetensors header, as the safetensors library has it
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")  # an object store answers in XML
_ZIP, _FIRST_RECORD = b"PK\x03\x04", b"data.pkl"  # of a PyTorch file
_OLD_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that files before the zips begin with
# What weights are stored in -> how it is called, and how a file of it is named.
_CALLED = {
    "safetensors": ("a safetensors file", ".safetensors"),
    "pickle": ("a PyTorch file (a pickle)", ".pt"),
    "gguf": ("a GGUF file", ".gguf"),
}


def stand_in(head: bytes) -> str | None:
    """What a file that begins so is in another's place, and what to do; None where it may be the file itself."""
    if head.startswith(_POINTER):
        return "a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its clone, or download it"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "an HTML or XML page, not the file itself; download it again, logged in if its page asks for that"
    return None


def refuse_mistaken(path: Path, kind: str) -> None:
    """Raise CheckpointError for a regular file of weights that is plainly none of `kind` ("safetensors", "pickle",
    "gguf"): one of another kind, a Git LFS pointer, or a page. Only its first bytes are looked at.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(256)
    except OSError:
        return  # its reader says so
    if instead := stand_in(head):
        raise CheckpointError(f"{path}: {instead}")
    found = _kind(head)
    if found is not None and found != kind:
        called, suffix = _CALLED[found]
        raise CheckpointError(f"{path}: {called} by its contents; rename it to {path.stem}{suffix}")


def _kind(head: bytes) -> str | None:
    """The kind of weight file that begins so; None where that is not plain."""
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(_OLD_PYTORCH) or (head.startswith(_ZIP) and _FIRST_RECORD in head):
        return "pickle"
    return None
