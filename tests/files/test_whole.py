"""Files that are there whole or not at all, also when two runs write the same one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlaconvert.conversion.calibration import kept
from mlaconvert.errors import OutputError
from mlaconvert.files.whole import PARTIAL, remove_partial, whole_file, write_whole
from mlaconvert.healing import state
from mlaconvert.reports.save import save_report

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
kill = importlib.import_module("kill")


def numbers(path: Path) -> Any:
    return load_file(path)["x"].tolist()


# How a file is written that holds a number, and read back.
WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Any]]] = {
    "bytes": (lambda path, n: write_whole(path, bytes([n])), lambda path: list(path.read_bytes())),
    "tensors": (lambda path, n: kept.write_tensors(path, {"x": torch.tensor([n])}, "the moments"), numbers),
    "state": (lambda path, n: state.save(path, {"x": [n]}), lambda path: state.load(path, "x")["x"]),
    "report": (lambda path, n: save_report(path, bytes([n]), "the page"), lambda path: list(path.read_bytes())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_two_runs_do_not_write_into_one_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run writes the file while another is about to put its own in place: each is whole, the last one stays."""
    write, read = WRITERS[name]
    path, plain = tmp_path / "file", Path.replace
    seen: list[Any] = []

    def replace(partial: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", plain)
        write(path, 2)
        seen.append(read(path))
        return plain(partial, target)

    monkeypatch.setattr(Path, "replace", replace)
    write(path, 1)
    assert (seen, read(path)) == ([[2]], [1])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fails_keeps_what_was_there(name: str, tmp_path: Path) -> None:
    """Whatever fails before the new file is in place; nothing is put there before it is on the disk."""
    write, read = WRITERS[name]
    path = tmp_path / "file"
    write(path, 1)
    with kill.watched(kill.Disk()) as clean:
        write(path, 2)
    kinds = [kind for kind, named in clean.seen if named == "file.partial"]
    assert kinds[-2:] == ["fsync", "replace"]
    for kind in kinds:
        write(path, 3)
        with pytest.raises((OutputError, OSError)), kill.watched(kill.Disk(broken=(kind, "file.partial", 0))):
            write(path, 4)
        assert read(path) == [3]
        assert list(tmp_path.iterdir()) == [path]


def half_written(path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        half_written(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of now and of earlier versions; nothing else, such as the hidden folder of an output."""
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            half_written(tmp_path / "layer-003.safetensors")
    (tmp_path / "last.partial").write_text("half")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / "kept.pt").write_text("whole")
    assert len(list(tmp_path.glob(f"*{PARTIAL}"))) == 3
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "kept.pt"]
    remove_partial(tmp_path / "missing")
