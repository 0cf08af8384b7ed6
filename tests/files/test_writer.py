"""ModelWriter: what it writes loads with the safetensors library, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlaconvert.errors import OutputError
from mlaconvert.files.find import open_store
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.writer import ModelFiles, ModelWriter, TensorSpec, reserve

# Odd counts of narrow elements before wide ones: a writer that ignores alignment breaks here.
STATE = {
    "b.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "a.weight": torch.randn(2, 7, generator=torch.Generator().manual_seed(1)),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "half": torch.arange(5, dtype=torch.float16),
    "count": torch.tensor([[7], [-9]], dtype=torch.int64),
    "tiny": torch.tensor([1, -2, 3], dtype=torch.int8),
    "unsigned": torch.tensor([1, 65535], dtype=torch.int32).to(torch.uint16),
}
OLD = {"old.weight": torch.ones(2)}


def specs_of(state: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]


def write_folder(path: Path, state: dict[str, torch.Tensor], *, overwrite: bool = False, limit: int = 10**9) -> None:
    with ModelWriter(
        path, specs_of(state), metadata={"format": "pt"}, overwrite=overwrite, max_shard_bytes=limit
    ) as writer:
        for name in sorted(state):  # not the planned order
            writer.write(name, state[name])
        writer.write_text("config.json", "{}")
        writer.commit()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


def only_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_loads_with_safetensors(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", STATE)
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), STATE)
    assert only_in(tmp_path) == ["out"]
    assert only_in(tmp_path / "out") == ["config.json", WEIGHTS_NAME]
    with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_header_is_aligned_and_keeps_the_planned_order(tmp_path: Path) -> None:
    state = {name: torch.full((3,), i, dtype=torch.float32) for i, name in enumerate(["z", "a", "m"])}
    write_folder(tmp_path / "out", state)
    raw = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert [name for name in header if name != "__metadata__"] == ["z", "a", "m"]
    assert raw[8 + length :] == b"".join(t.numpy().tobytes() for t in state.values())


def test_every_tensor_starts_at_a_multiple_of_its_elements(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", STATE)
    raw = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in STATE.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, STATE, limit=40)
    for file in only_in(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_shards_and_index(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", STATE, limit=40)
    index = json.loads((tmp_path / "out" / f"{WEIGHTS_NAME}.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in STATE.values())
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        part = load_file(tmp_path / "out" / shard)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 40
        assert {name: index["weight_map"][name] for name in part} == dict.fromkeys(part, shard)
        found |= part
    assert_same(found, STATE)
    with open_store(tmp_path / "out") as store:
        assert_same({name: store.read(name) for name in store.tensors}, STATE)


def test_one_file_when_everything_just_fits(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", STATE, limit=sum(t.nbytes for t in STATE.values()))
    assert only_in(tmp_path / "out") == ["config.json", WEIGHTS_NAME]


def test_takes_views_and_reports_bytes(tmp_path: Path) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    told: list[int] = []
    specs = [TensorSpec("t", (6, 4), torch.float32), TensorSpec("column", (4,), torch.float32)]
    with ModelWriter(tmp_path / "out", specs, metadata={}, on_bytes=told.append) as writer:
        writer.write("t", torch.nn.Parameter(wide.T))
        writer.write("column", wide[:, 2])
        writer.commit()
    assert told == [96, 16]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), {"t": wide.T.contiguous(), "column": wide[:, 2]})


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_files_get_the_umasks_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "out", STATE)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / WEIGHTS_NAME).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OutputError("no")])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with ModelWriter(tmp_path / "out", specs_of(STATE), metadata={}) as writer:
            writer.write("flag", STATE["flag"])
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert only_in(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(OLD), metadata={}) as writer:
        writer.write("old.weight", OLD["old.weight"])
        assert only_in(tmp_path) == [".out.partial"]
    assert only_in(tmp_path) == []
    with pytest.raises(OutputError, match="closed"):
        writer.commit()


def test_commit_wants_every_tensor(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(STATE), metadata={}) as writer:
        writer.write("flag", STATE["flag"])
        with pytest.raises(OutputError, match=r"8 planned tensors were not written, first 'b\.weight'"):
            writer.commit()
    assert only_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("nobody", torch.ones(2), "'nobody' is not planned"),
        ("old.weight", torch.ones(3), r"'old.weight' is \[3\] torch.float32, planned were \[2\]"),
        ("old.weight", torch.ones(2, dtype=torch.float64), "torch.float64, planned"),
    ],
)
def test_write_refuses_what_is_not_planned(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    with ModelWriter(tmp_path / "out", specs_of(OLD), metadata={}) as writer, pytest.raises(OutputError, match=message):
        writer.write(name, tensor)


def test_write_refuses_a_second_time(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(OLD), metadata={}) as writer:
        writer.write("old.weight", OLD["old.weight"])
        with pytest.raises(OutputError, match="written before"):
            writer.write("old.weight", OLD["old.weight"])
        for filename in ("../escape.txt", "a/b.txt", WEIGHTS_NAME, ".."):
            with pytest.raises(OutputError, match="not a new file's name"):
                writer.write_text(filename, "x")


def test_refuses_impossible_plans(tmp_path: Path) -> None:
    for specs in (
        [TensorSpec("a", (1,), torch.float32)] * 2,
        [TensorSpec("a\n", (1,), torch.float32)],
        [TensorSpec("a", (1,), torch.complex128)],
    ):
        with pytest.raises(OutputError, match=r"printable|complex128"):
            ModelWriter(tmp_path / "out", specs, metadata={})


def test_existing_output_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", OLD)
    with pytest.raises(OutputError, match="exists; choose another path, or pass --overwrite"):
        ModelWriter(tmp_path / "out", specs_of(STATE), metadata={})
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), OLD)


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", OLD)
    (tmp_path / "out" / "stale.txt").write_text("x")
    write_folder(tmp_path / "out", STATE, overwrite=True)
    assert only_in(tmp_path) == ["out"]
    assert only_in(tmp_path / "out") == ["config.json", WEIGHTS_NAME]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), STATE)


def test_overwrite_keeps_the_old_model_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out", OLD)
    with pytest.raises(KeyboardInterrupt), ModelWriter(tmp_path / "out", specs_of(STATE), metadata={}, overwrite=True):
        raise KeyboardInterrupt
    assert only_in(tmp_path) == ["out"]

    rename = Path.rename

    def fail_at_the_swap(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_swap)
    with pytest.raises(OutputError, match="Input/output error"):
        write_folder(tmp_path / "out", STATE, overwrite=True)
    assert only_in(tmp_path) == ["out"]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), OLD)


def test_overwrite_spares_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(OutputError, match="not a model folder"):
            ModelWriter(tmp_path / name, specs_of(STATE), metadata={}, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", STATE, overwrite=True)


def test_another_runs_staging_is_left_alone(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(OLD), metadata={}) as writer:
        with pytest.raises(OutputError, match=r"\.out\.partial is there: another run"):
            ModelWriter(tmp_path / "out", specs_of(STATE), metadata={}, overwrite=True)
        writer.write("old.weight", OLD["old.weight"])
        writer.commit()
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), OLD)


def test_missing_parent_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"parent folder .* does not exist"):
        ModelWriter(tmp_path / "no" / "out", specs_of(OLD), metadata={})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 1_500_000_000))
    big = [TensorSpec("w", (30_000, 20_000), torch.float32)]
    with pytest.raises(OutputError, match=r"2\.4 GB are needed, 1\.5 GB are free"):
        ModelWriter(tmp_path / "out", big, metadata={})
    assert only_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(OLD), metadata={}) as writer:
        _, offset = writer._files._places["old.weight"]
        writer._files._places["old.weight"] = Path("/dev/full"), offset
        with pytest.raises(OutputError, match="No space left"):
            writer.write("old.weight", OLD["old.weight"])
    assert only_in(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems promise no blocks")
def test_room_is_taken_before_anything_is_written(tmp_path: Path) -> None:
    specs = [TensorSpec("weight", (3_000_001,), torch.float32)]
    ModelFiles(tmp_path, specs, metadata={}, where=tmp_path).create()
    assert 512 * (tmp_path / WEIGHTS_NAME).stat().st_blocks > 12_000_004
    with (tmp_path / "huge").open("wb") as stream, pytest.raises(OSError, match=r"large|space"):
        reserve(stream.fileno(), 1 << 60)
    assert (tmp_path / "huge").stat().st_size == 0


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    """Its lock is free, whatever it had written."""
    write_folder(tmp_path / "out", OLD)
    left = tmp_path / ".out.partial"
    (left / "model").mkdir(parents=True)
    (left / "lock").touch()
    (left / "model" / WEIGHTS_NAME).write_bytes(b"half")
    (left / "model" / "stale.txt").write_text("x")
    write_folder(tmp_path / "out", STATE, overwrite=True)
    assert only_in(tmp_path) == ["out"]
    assert only_in(tmp_path / "out") == ["config.json", WEIGHTS_NAME]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), STATE)


def test_what_is_no_staging_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "video.safetensors").write_text("hours of work")
    with pytest.raises(OutputError, match=r"\.out\.partial is in the way: delete it"):
        ModelWriter(tmp_path / "out", specs_of(OLD), metadata={})
    assert only_in(tmp_path / ".out.partial") == ["video.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("place", [".out.partial", ".out.partial/model", f".out.partial/model/{WEIGHTS_NAME}"])
def test_nothing_is_written_through_links(tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("theirs")
    link = tmp_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere / "lock" if place.endswith("safetensors") else elsewhere)
    if place != ".out.partial":
        (tmp_path / ".out.partial" / "lock").touch()
    with pytest.raises(OutputError, match=r"is a link|is in the way"):
        write_folder(tmp_path / "out", OLD)
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"lock": "theirs"}


@pytest.mark.parametrize("swapped", [False, True])
def test_a_kill_in_the_middle_of_replacing(tmp_path: Path, swapped: bool) -> None:
    """The old model is set aside; the new one is in place already, or not."""
    write_folder(tmp_path / "out", OLD)
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")
    if not swapped:
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(OutputError, match=r"\.out\.replaced is the model that an interrupted run was replacing"):
            ModelWriter(tmp_path / "out", specs_of(STATE), metadata={})
    with pytest.raises(KeyboardInterrupt), ModelWriter(tmp_path / "out", specs_of(STATE), metadata={}, overwrite=True):
        raise KeyboardInterrupt
    assert only_in(tmp_path) == ["out"]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_NAME), OLD)
