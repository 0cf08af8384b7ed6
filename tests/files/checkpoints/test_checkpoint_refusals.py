"""Reading checkpoints: files, folders, shards, pickles, the Hub; and every way in which they can be bad."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import INDEX, SHARDS, STATE, save_shards
from safetensors.torch import save_file

from mlaconvert.errors import CheckpointError
from mlaconvert.files.find import open_store
from mlaconvert.files.names import WEIGHTS_NAME


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "zero length": (b"", "truncated"),
    "seven bytes": (b"\x01" * 7, "truncated"),
    "header longer than the file": (safetensors_bytes({}, length=1 << 60), "truncated"),
    "data cut off": (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 7), "promises 8 bytes of data, the file has 7"),
    "data to spare": (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 9), "promises 8"),
    "not JSON": (safetensors_bytes(b"{nonsense"), "header cannot be read"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "header cannot be read"),
    "nested beyond reason": (safetensors_bytes(b"[" * 100_000), "header cannot be read"),
    "a list": (safetensors_bytes([1]), "not a JSON object"),
    "no tensors": (safetensors_bytes({"__metadata__": {}}), "no tensors"),
    "the same name twice": (
        safetensors_bytes(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": 2}', b"\0"),
        "'a' is in it twice",
    ),
    "overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "'b' overlaps"),
    "gap": (safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "'b' overlaps .* or leaves a gap"),
    "shape that lies": (safetensors_bytes({"a": entry(0, 8, [3])}, b"\0" * 8), r"'a' of shape \[3\] .* 12 bytes"),
    "negative size": (safetensors_bytes({"a": entry(0, 8, [-2])}, b"\0" * 8), "'a' has a malformed"),
    "boolean size": (safetensors_bytes({"a": entry(0, 4, [True])}, b"\0" * 4), "'a' has a malformed"),
    "offsets reversed": (safetensors_bytes({"a": entry(8, 0, [2])}, b"\0" * 8), "gives it -8"),
    "entry of text": (safetensors_bytes({"a": "b"}), "'a' has a malformed"),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 8, dtype="F6_E2M3")}, b"\0" * 8), "'a' has dtype 'F6_E2M3'"),
    "dtype of a wrong type": (safetensors_bytes({"a": entry(0, 8, dtype=["F32"])}, b"\0" * 8), "'a' has dtype"),
    "empty name": (safetensors_bytes({"": entry(0, 8)}, b"\0" * 8), "named ''"),
    "control character": (safetensors_bytes({"a\n": entry(0, 8)}, b"\0" * 8), "printable"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": {}}'), "printable"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", "an HTML or XML page, not the file itself; download"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path: Path, case: str) -> None:
    data, message = BAD_SAFETENSORS[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    for zipped in (True, False):
        state = {"generator": STATE, "args": RunsCode(tmp_path / "owned")}
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"m\.pt: it pickles more than tensors") as caught:
            open_store(tmp_path / "m.pt")
        assert "weights_only" not in str(caught.value)  # torch's own advice is to run it
    (tmp_path / "m.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_store(tmp_path / "m.pt")
    assert not (tmp_path / "owned").exists()


def test_what_torch_warns_of_a_pickle_is_not_the_users_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions warn of sparse tensors, before they are refused here."""
    plain = torch.load

    def warned(*arguments: Any, **options: Any) -> Any:
        warnings.warn("validating sparse tensor invariants", UserWarning, stacklevel=2)
        return plain(*arguments, **options)

    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", warned)
    with pytest.raises(CheckpointError, match="'w' is not a plain dense"):
        open_store(tmp_path / "model.pt")


def test_bad_pickles(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {}
    cyclic["again"] = cyclic
    cases = {
        "no tensors": ({"step": 1, "names": ["a"]}, "no tensors"),
        "a bare list": ([torch.ones(1)], "no tensors"),
        "cyclic": (cyclic, "nested too deeply"),
        "sparse": ({"w": torch.eye(3).to_sparse()}, "'w' is not a plain dense"),
        "ambiguous": ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "two tensors are named 'a/b'"),
        "odd name": ({"a\0": torch.ones(1)}, "printable"),
    }
    for case, (content, message) in cases.items():
        file = tmp_path / f"{case}.pt"
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_store(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 500, -1, -200])
def test_truncated_and_foreign_pickles(tmp_path: Path, keep: int) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for content in (data[:keep], b"PK\x03\x04" + data[4:keep], b"\x80\x02." + bytes(50), b"<html>no</html>"):
        (tmp_path / "m.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.pt: "):
            open_store(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "../evil.safetensors", "b": SHARDS[1]}, "'a.weight' points to '../evil.safetensors'"),
        ({"a.weight": "/etc/evil.safetensors"}, "not a .safetensors file beside it"),
        ({"a.weight": "c:\\evil.safetensors"}, "not a .safetensors file beside it"),
        ({"a.weight": 3}, "points to 3"),
        ({"a.weight": "evil.pt"}, "points to 'evil.pt'"),
        ({"a.weight": SHARDS[0], "b": "gone.safetensors"}, "gone.safetensors: there is no such file"),
        ({"a.weight": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "lists 'c', against its shards"),
        ({"a.weight": SHARDS[0], "c": SHARDS[1]}, "against its shards"),
        ({}, "no weight_map"),
    ],
)
def test_bad_indexes(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "evil.safetensors")
    folder = save_shards(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(folder)
    assert str(folder) in str(caught.value)


def test_a_tensor_that_the_index_leaves_out(tmp_path: Path) -> None:
    folder = save_shards(tmp_path, {"a.weight": SHARDS[0]})
    save_file(STATE, folder / SHARDS[0])
    with pytest.raises(CheckpointError, match="it leaves out 'b', against its shards"):
        open_store(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_shards(tmp_path)
    save_file(STATE, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor 'a.weight' is in {SHARDS[0]} too"):
        open_store(tmp_path)


def test_bad_folders_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_shards(tmp_path / "shards")
    (tmp_path / "shards" / INDEX).unlink()
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(STATE, tmp_path / "two" / name)
    (tmp_path / "broken").mkdir()
    save_file(STATE, tmp_path / "broken" / WEIGHTS_NAME)
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "notes.txt").write_text("hello")
    cases: list[tuple[str | Path, dict[str, str], str]] = [
        ("empty", {}, "empty: it holds no weights"),
        ("shards", {}, r"no \*.safetensors.index.json"),
        (f"shards/{SHARDS[0]}", {}, "one shard of several; give its folder shards"),
        ("two", {}, r"several weight files \(a.safetensors, b.safetensors\)"),
        ("broken", {}, r"broken.config\.json: it is not readable JSON"),
        ("notes.txt", {}, r"notes\.txt: not a weight file"),
        ("gone.safetensors", {}, r"gone\.safetensors: there is no such file"),
        ("folder/gone.pt", {}, r"folder/gone\.pt: there is no such file"),
        (tmp_path / "user" / "repo", {}, "there is no such file"),
        (Path("user/repo"), {}, "there is no such file"),
        ("x" * 5000, {}, "is not a path|no such file"),
        ("nul\0", {}, "is not a path|no such file"),
        ("two", {"subfolder": "../broken"}, "leads outside"),
        ("two", {"subfolder": "gone"}, "two: it has no folder 'gone'"),
        ("notes.txt", {"subfolder": "gone"}, "a file has no subfolder"),
        ("two", {"revision": "main"}, "no revision 'main'"),
    ]
    for source, options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            open_store(source, **options)


def test_unknown_tensor(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / WEIGHTS_NAME)
    with open_store(tmp_path) as store, pytest.raises(CheckpointError, match="no tensor 'c'"):
        store.read("c")
