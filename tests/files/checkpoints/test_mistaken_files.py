"""What lies under a weight file's name is said, where it is plain: another kind of file, a pointer, a page."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import INDEX, SHARDS, STATE, assert_state, read_all, save_shards
from safetensors.torch import save

from mlaconvert.errors import CheckpointError
from mlaconvert.files.find import open_store
from mlaconvert.files.names import CONFIG_NAME

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2838276416\n"
PAGES = {
    "a page": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "a page after blank lines": b"\n\n  <HTML>\n<head><title>404</title></head>",
    "a page with a byte order mark": b"\xef\xbb\xbf<!doctype HTML><p>x",
    "a store of objects": b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
}


def old_pytorch(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


# What a file holds -> how it is written, the names that it may have, and how it is called.
KINDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "safetensors": (lambda path: path.write_bytes(save(STATE)), (".safetensors", ".sft"), "a safetensors file"),
    "PyTorch": (lambda path: torch.save(STATE, path), PICKLES, "a PyTorch file (a pickle)"),
    "older PyTorch": (old_pytorch, PICKLES, "a PyTorch file (a pickle)"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), (".gguf",), "a GGUF file"),
}


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_store(source)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pointer_and_pages_are_said(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(POINTER)
    assert refusal(file) == (
        f"{file}: a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its clone, or download it"
    )
    for page in PAGES.values():
        file.write_bytes(page)
        assert refusal(file).startswith(f"{file}: an HTML or XML page, not the file itself; download it again")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_under_another_kinds_name(kind: str, suffix: str, tmp_path: Path) -> None:
    write, own, called = KINDS[kind]
    file = tmp_path / f"model.v2{suffix}"
    write(file)
    if suffix not in own:
        assert refusal(file) == f"{file}: {called} by its contents; rename it to model.v2{own[0]}"
    elif kind != "GGUF":
        assert_state(read_all(file))


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its length begins as a pickle does: 80 02."""
    data = save(STATE)
    length = int.from_bytes(data[:8], "little")
    padded = struct.pack("<Q", 640) + data[8 : 8 + length] + b" " * (640 - length) + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(padded)
    assert_state(read_all(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(padded[:600])
    assert "truncated" in refusal(tmp_path)


@pytest.mark.parametrize("name", [INDEX, CONFIG_NAME, SHARDS[1]])
def test_a_clone_without_its_large_files(name: str, tmp_path: Path) -> None:
    save_shards(tmp_path)
    for data, says in ((POINTER, "a Git LFS pointer"), (PAGES["a page"], "an HTML or XML page")):
        (tmp_path / name).write_bytes(data)
        assert refusal(tmp_path).startswith(f"{tmp_path / name}: {says}")
