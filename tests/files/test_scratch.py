"""Tensors in files instead of memory."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mlaconvert.errors import OutputError
from mlaconvert.files.scratch import Scratch, return_memory


def anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def test_tensors_live_as_long_as_they_are_used_and_leave_nothing(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    made = torch.arange(21.0, dtype=torch.float64).reshape(3, 7)
    kept, empty = scratch.keep(made), scratch.empty((4, 0, 2), torch.float32)
    other = scratch.keep(made.mT)
    del scratch
    kept[1] += 1
    assert torch.equal(kept, made + torch.tensor([0.0, 1.0, 0.0])[:, None])
    assert torch.equal(other, made.mT)
    assert empty.shape == (4, 0, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_they_take_no_anonymous_memory(tmp_path: Path) -> None:
    return_memory()
    before = anonymous()
    kept = Scratch(tmp_path).empty((16 << 20,), torch.float32).fill_(1)
    assert anonymous() - before < 8 << 20
    assert float(kept.sum()) == 16 << 20


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"no room for 2\.4 GB of activations \(No space left on device\)"):
        Scratch(tmp_path).empty((600_000_000,), torch.float32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="nowhere: no room"):
        Scratch(tmp_path / "nowhere").empty((3,), torch.float32)


def test_files_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says so by a RuntimeError."""

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 12 bytes from file </x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", refused)
    with pytest.raises(OutputError, match=r"0\.0 GB of activations cannot be mapped there \(unable to mmap 12 bytes"):
        Scratch(tmp_path).empty((3,), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_without_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(OutputError, match="set TMPDIR"):
        Scratch()
