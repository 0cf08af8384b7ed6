"""Broken and hostile model files: every one ends in one plain message and exit code 2, and changes nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from hostile import Shelf, arguments, check_refusal, packed, parts, refused, tree
from hostile_cases import named
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.timeout(60)


class RunsCode:
    """Unpickling this would make a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.target,)


def saved(content: Any, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def rezipped(change: Callable[[list[tuple[str, bytes]]], Any], how: int = zipfile.ZIP_STORED) -> bytes:
    """A good PyTorch file with its records changed, or packed."""
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(3)}))) as file:
        records = [(name, file.read(name)) for name in file.namelist()]
    records = change(records) or records
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as out:
        for name, content in records:
            out.writestr(name, content)
    return stream.getvalue()


def bomb() -> bytes:
    """Thirty kilobytes that unpack to thirty megabytes."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as out,
        out.open("archive/data.pkl", "w", force_zip64=True) as record,
    ):
        for _ in range(2):
            record.write(bytes(1 << 24))
    return stream.getvalue()


def lying_zip(field: int, value: int) -> bytes:
    """A good file whose central directory gives its first record another size."""
    content = bytearray(saved({"w": torch.ones(3)}))
    at = content.index(b"PK\x01\x02")
    content[at + field : at + field + 4] = value.to_bytes(4, "little")
    return bytes(content)


def many_times() -> Any:
    """A dictionary that holds the same one a hundred times, eight levels deep."""
    found: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(7):
        found = {str(i): found for i in range(100)}
    return found


def cyclic() -> Any:
    found: dict[str, Any] = {}
    found["again"] = found
    return found


PICKLES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda _: b"", "not a PyTorch checkpoint"),
    "text": (lambda _: b"hello", "not a PyTorch checkpoint"),
    "a zip of nothing": (lambda _: b"PK\x05\x06" + bytes(18), "not a PyTorch checkpoint"),
    "a zip of another kind": (lambda _: rezipped(lambda r: [("readme.txt", b"hello")]), "not a PyTorch checkpoint"),
    "a bare pickle": (lambda _: pickle.dumps({"w": 1}), "pickles more than tensors"),
    "code": (lambda target: saved({"w": torch.ones(1), "x": RunsCode(target)}), "pickles more than tensors"),
    "code in the old format": (
        lambda target: saved({"x": RunsCode(target)}, zipped=False),
        "pickles more than tensors",
    ),
    "code in a bare pickle": (
        lambda target: pickle.dumps(RunsCode(target)),
        "not a PyTorch checkpoint|more than tensors",
    ),
    "code by name": (
        lambda target: rezipped(
            lambda r: [
                (n, b"cos\nsystem\n(S'mkdir " + target.encode() + b"'\ntR." if n.endswith(".pkl") else c) for n, c in r
            ]
        ),
        "more than tensors|not a PyTorch",
    ),
    "a builtin by name": (
        lambda _: rezipped(
            lambda r: [(n, b"c__builtin__\neval\n(S'1'\ntR." if n.endswith(".pkl") else c) for n, c in r]
        ),
        "more than tensors|not a PyTorch",
    ),
    "a module": (lambda _: saved(torch.nn.Linear(2, 2)), "pickles more than tensors"),
    "packed": (lambda _: rezipped(lambda r: None, zipfile.ZIP_DEFLATED), "compressed"),
    "packed by lzma": (lambda _: rezipped(lambda r: None, zipfile.ZIP_LZMA), "compressed"),
    "a zip bomb": (lambda _: bomb(), "compressed"),
    "a record twice": (lambda _: rezipped_twice(), "come twice"),
    "a size that lies": (lambda _: lying_zip(24, 1 << 30), "compressed|overlap|not a PyTorch"),
    "both sizes lie": (lambda _: both_sizes_lie(), "overlap|not a PyTorch"),
    "a method that lies": (lambda _: lying_zip(10, 8), "compressed"),
    "an offset that lies": (lambda _: lying_zip(42, 1 << 30), "not a PyTorch checkpoint"),
    "a pickle without its data": (
        lambda _: rezipped(lambda r: [x for x in r if "/data/" not in x[0]]),
        "not a PyTorch checkpoint",
    ),
    "data cut": (
        lambda _: rezipped(lambda r: [(n, c[:5] if "/data/" in n else c) for n, c in r]),
        "promises more data",
    ),
    "a pickle cut": (
        lambda _: rezipped(lambda r: [(n, c[:-20] if n.endswith(".pkl") else c) for n, c in r]),
        "not a PyTorch checkpoint|more than tensors",
    ),
    "a pickle of zeros": (
        lambda _: rezipped(lambda r: [(n, bytes(1000) if n.endswith(".pkl") else c) for n, c in r]),
        "not a PyTorch checkpoint|more than tensors",
    ),
    "a pickle of 2 million bytes": (
        lambda _: rezipped(lambda r: [(n, c + bytes(1 << 21) if n.endswith(".pkl") else c) for n, c in r]),
        "its pickle is larger",
    ),
    "names outside": (lambda _: rezipped(lambda r: [("../" + n, c) for n, c in r]), "not a PyTorch checkpoint|family"),
    "no tensors": (lambda _: saved({"step": 1}), "no tensors"),
    "a list": (lambda _: saved([torch.ones(1)]), "no tensors"),
    "a tensor alone": (lambda _: saved(torch.ones(1)), "printable|family"),
    "cyclic": (lambda _: saved(cyclic()), "nested too deeply"),
    "the same dictionary 100**7 times": (lambda _: saved(many_times()), "nested too deeply"),
    "sparse": (lambda _: saved({"w": torch.eye(3).to_sparse()}), "not a plain dense"),
    "expanded": (lambda _: saved({"w": torch.ones(1).expand(10**6, 10**6)}), "repeats the values"),
    "the same name twice": (
        lambda _: saved({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}),
        "two tensors are named",
    ),
    "an escape": (lambda _: saved({"\x1b[2J": torch.ones(1)}), "printable"),
    "a line break": (lambda _: saved({"a\nerror: b": torch.ones(1)}), "printable"),
    "no model": (lambda _: saved({"w": torch.ones(1)}), "family is not known"),
    "several state dicts": (
        lambda _: saved({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}),
        "Choose with --state-key",
    ),
}


def rezipped_twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the name that is written twice
        return rezipped(lambda r: [*r, r[0]])


def both_sizes_lie() -> bytes:
    content = bytearray(lying_zip(24, 1 << 30))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 24] = (1 << 30).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize(("case", "command"), named(PICKLES, ("analyze", "convert")))
def test_pickles(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    make, says = PICKLES[case]
    model = tmp_path / "model.pt"
    model.write_bytes(make(str(tmp_path / "owned")))
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)
    assert "model.pt" in message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("part", range(24))
def test_pickles_cut_anywhere(tmp_path: Path, shelf: Shelf, part: int) -> None:
    state = OrderedDict(load_file(shelf.dense / WEIGHTS_NAME))
    content = saved({"generator": {name: state[name] for name in sorted(state)[:6]}}, zipped=part % 2 == 0)
    starts = [i for i in range(len(content)) if content[i : i + 2] == b"PK"] if part % 2 == 0 else []
    at = starts[part % len(starts)] + part % 5 if starts else len(content) * (part + 1) // 26
    (tmp_path / "model.pt").write_bytes(content[:at])
    refused(tmp_path, *arguments("analyze", tmp_path / "model.pt", shelf, tmp_path / "out"), says=r"model\.pt: ")


# What a file just within the limits can cost: bytes that become many small objects.
FILLED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "keys of JSON": (
        CONFIG_NAME,
        lambda: b"{" + b",".join(b'"%d":0' % i for i in range(1_600_000))[: (1 << 24) - 2] + b"}",
    ),
    "lists of a pickle": (
        "model.pt",
        lambda: rezipped(lambda r: [("archive/data.pkl", b"\x80\x02(" + b"]" * ((1 << 21) - 10) + b"t."), *r[1:]]),
    ),
    "a zip bomb": ("model.pt", bomb),
    "a long string of a pickle": (
        "model.pt",
        lambda: rezipped(
            lambda r: [("archive/data.pkl", b"\x80\x02X" + (1 << 31).to_bytes(4, "little") + b"."), *r[1:]]
        ),
    ),
}
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from command_line import invoke
from hostile import check_refusal
for model in sorted(Path(sys.argv[2]).iterdir()):
    code, _, stderr = invoke("analyze", model)
    check_refusal(code, stderr)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])  # not getrusage, which counts what the process was forked from
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes")
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_a_file_can_cost(tmp_path: Path, shelf: Shelf) -> None:
    for case, (name, make) in FILLED.items():
        folder = tmp_path / case
        shutil.copytree(shelf.dense, folder)
        if name == "model.pt":
            (folder / WEIGHTS_NAME).unlink()
        (folder / name).write_bytes(make())
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_000_000


many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**40)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def survives(folder: Path, *command: Path | str) -> None:
    """Done, or refused; never a failure on our side, and never half of it."""
    before = tree(folder)
    code, _, stderr = invoke(*command)
    if code != 0:
        check_refusal(code, stderr)
    assert tree(folder) == before


@many
@given(place=st.integers(0, 60), field=st.sampled_from(("dtype", "shape", "data_offsets", None)), value=plain)
def test_any_header_entry(shelf: Shelf, model: Path, place: int, field: str | None, value: Any) -> None:
    header, data = parts(shelf.converted / WEIGHTS_NAME)
    name = sorted(header)[place % len(header)]
    header[name] = value if field is None or name == "__metadata__" else header[name] | {field: value}
    (model / WEIGHTS_NAME).write_bytes(packed(header, data))
    survives(model.parent, "analyze", model)


@many
@given(cut=st.integers(0, 80_000), at=st.lists(st.integers(0, 6000), max_size=4), byte=st.integers(0, 255))
def test_any_bytes_of_weights(shelf: Shelf, model: Path, cut: int, at: list[int], byte: int) -> None:
    content = bytearray((shelf.converted / WEIGHTS_NAME).read_bytes())
    for place in at:
        content[place] = byte
    (model / WEIGHTS_NAME).write_bytes(content[: len(content) - cut if at else cut])
    survives(model.parent, "analyze", model, "--layers", "0")


@many
@given(data=st.data(), value=plain)
def test_any_value_of_a_config(shelf: Shelf, model: Path, data: st.DataObject, value: Any) -> None:
    shutil.copy(shelf.converted / WEIGHTS_NAME, model / WEIGHTS_NAME)
    config = inner = json.loads((shelf.converted / CONFIG_NAME).read_text())
    while True:
        keys: Any = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = value
    (model / CONFIG_NAME).write_text(json.dumps(config))
    survives(model.parent, "analyze", model, "--layers", "0")


@many
@given(content=st.binary(max_size=60) | st.text('{}[]":,0e\\u-.tfn ', max_size=60).map(str.encode))
def test_any_json(shelf: Shelf, model: Path, content: bytes) -> None:
    (model / CONFIG_NAME).write_bytes(content)
    survives(model.parent, "analyze", shelf.dense, "--config", model / CONFIG_NAME, "--layers", "0")


@many
@given(at=st.lists(st.integers(0, 900), min_size=1, max_size=6), byte=st.integers(0, 255), zipped=st.booleans())
def test_any_pickle(model: Path, at: list[int], byte: int, zipped: bool) -> None:
    content = bytearray(saved({"generator": {"blocks.0.x": torch.ones(5)}}, zipped=zipped))
    for place in at:
        content[place % len(content)] = byte
    file = model.parent / "model.pt"
    file.write_bytes(content)
    survives(model.parent, "analyze", file)
