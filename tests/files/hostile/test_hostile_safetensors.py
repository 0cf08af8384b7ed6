"""Broken and hostile model files: every one ends in one plain message and exit code 2, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    Cases,
    Shelf,
    Spoil,
    arguments,
    change_header,
    change_json,
    instead,
    packed,
    parts,
    refused,
    setting,
    write,
)
from hostile_cases import BEYOND, COMMANDS, HUGE, SHARDS, named, spoiled
from safetensors.torch import load_file, save_file

from mlaconvert.files.names import WEIGHTS_NAME

pytestmark = pytest.mark.timeout(60)
INDEX = f"{WEIGHTS_NAME}.index.json"
FIRST = "patch_embedding.bias"


def raw(content: bytes) -> Spoil:
    return write(WEIGHTS_NAME, content)


def entry(field: str, value: Any, name: str = FIRST) -> Spoil:
    return change_header(lambda header: header[name].update({field: value}))


def drop(field: str) -> Spoil:
    return change_header(lambda header: header[FIRST].pop(field))


def rename(old: str, new: str) -> Spoil:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        return {new if name == old else name: value for name, value in header.items()}

    return change_header(change)


def twice(folder: Path) -> None:
    header, data = parts(folder / WEIGHTS_NAME)
    text = json.dumps(header)[:-1] + f', "{FIRST}": {json.dumps(header[FIRST])}}}'
    (folder / WEIGHTS_NAME).write_bytes(packed(text.encode(), data))


def sparse(folder: Path) -> None:
    """A file of 64 GB that takes no room."""
    header, _ = parts(folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).write_bytes(packed(header))
    os.truncate(folder / WEIGHTS_NAME, 1 << 36)


def long_header(fill: bytes) -> bytes:
    return packed(b'{"a": ' + fill + b"}")


HEADERS: Cases = {
    "empty": (raw(b""), "truncated"),
    "html": (raw(b"<!DOCTYPE html><html>Sign in</html>"), "an HTML or XML page, not the file itself"),
    "lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), "a Git LFS pointer"),
    "length 0": (raw(packed({}, b"", 0)), "header cannot be read"),
    "length 2**63": (raw(packed({}, b"", 1 << 63)), "truncated"),
    "length 2**64 - 1": (raw(packed({}, b"", (1 << 64) - 1)), "truncated"),
    "length one too long": (raw(packed({"a": 1}, b"", 9)), "truncated"),
    "length one too short": (raw(packed(b'{"a": 1}', b"", 7)), "header cannot be read"),
    "header of a long text": (raw(packed(b'{"a":"' + b"x" * (1 << 22) + b'"}')), "malformed header entry"),
    "header null": (raw(packed(b"null")), "not a JSON object"),
    "header number": (raw(packed(b"17")), "not a JSON object"),
    "header text": (raw(packed(b'"text"')), "not a JSON object"),
    "header list": (raw(packed(b"[{}]")), "not a JSON object"),
    "header blank": (raw(packed(b"        ")), "header cannot be read"),
    "header NULs": (raw(packed(bytes(64))), "header cannot be read"),
    "header not UTF-8": (raw(packed(b'{"\xff\xfe": 1}')), "header cannot be read"),
    "header UTF-16": (raw(packed('{"a": 1}'.encode("utf-16"))), "header cannot be read"),
    "header with a BOM": (raw(packed(b"\xef\xbb\xbf{}")), "header cannot be read"),
    "header cut": (raw(packed(b'{"a": {"dtype": "F32", "shape"')), "header cannot be read"),
    "header with more after it": (raw(packed(b"{} {}")), "header cannot be read"),
    "deep lists": (raw(long_header(b"[" * 99_999 + b"]" * 99_999)), "nested too deeply"),
    "deep objects": (raw(long_header(b'{"a":' * 99_999 + b"1" + b"}" * 99_999)), "nested too deeply"),
    "lists just too deep": (raw(long_header(b"[" * 40 + b"]" * 40)), "nested too deeply"),
    "a number of 5000 digits": (raw(long_header(b"1" * 5000)), "header cannot be read"),
    "no tensors": (raw(packed({})), "no tensors"),
    "metadata alone": (raw(packed({"__metadata__": {"format": "pt"}})), "no tensors"),
    "metadata of lists": (change_header(setting("__metadata__", {"a": []})), "__metadata__"),
    "metadata a text": (change_header(setting("__metadata__", "pt")), "__metadata__"),
    "metadata nested": (change_header(setting("__metadata__", {"a": {"b": "c"}})), "__metadata__"),
    "a tensor twice": (twice, "is in it twice"),
    "many tensors": (raw(packed({str(i): 0 for i in range(100_001)})), "100,001 tensors"),
    "many lists": (raw(long_header(b"[" + b"[]," * 600_000 + b"0]")), "lists and objects"),
    "entry null": (change_header(setting("head\0head", None)), "printable"),
    "entry list": (change_header(lambda h: h.update({FIRST: []})), "malformed"),
    "entry text": (change_header(lambda h: h.update({FIRST: "F32"})), "malformed"),
    "no dtype": (drop("dtype"), "dtype None"),
    "no shape": (drop("shape"), "malformed"),
    "no offsets": (drop("data_offsets"), "malformed"),
    "dtype in small letters": (entry("dtype", "f32"), "dtype 'f32'"),
    "dtype Q4": (entry("dtype", "Q4_K_M"), "dtype 'Q4_K_M'"),
    "dtype number": (entry("dtype", 32), "dtype 32"),
    "dtype list": (entry("dtype", ["F32"]), "dtype"),
    "dtype with an escape": (entry("dtype", "\x1b[2J"), "dtype"),
    "shape text": (entry("shape", "24"), "malformed"),
    "shape float": (entry("shape", [24.0]), "malformed"),
    "shape true": (entry("shape", [True]), "malformed"),
    "shape negative": (entry("shape", [-24]), "malformed"),
    "shape nested": (entry("shape", [[24]]), "malformed"),
    "shape huge": (entry("shape", [HUGE]), "takes 4000000000000000000 bytes"),
    "shape beyond 64 bits": (entry("shape", [BEYOND]), "malformed"),
    "shape product beyond 64 bits": (entry("shape", [1 << 40, 1 << 40]), "takes"),
    "shape of many dims": (entry("shape", [1] * 100_000), "malformed"),
    "shape of huge dims": (entry("shape", [HUGE] * 100_000), "malformed"),
    "shape too small": (entry("shape", [23]), "takes 92 bytes, but its header gives it 96"),
    "shape empty": (entry("shape", []), "takes 4 bytes"),
    "shape zero": (entry("shape", [0]), "takes 0 bytes"),
    "offsets text": (entry("data_offsets", "0,96"), "malformed"),
    "offsets of one": (entry("data_offsets", [96]), "malformed"),
    "offsets of three": (entry("data_offsets", [0, 48, 96]), "malformed"),
    "offsets floats": (entry("data_offsets", [0.0, 96.0]), "malformed"),
    "offsets negative": (entry("data_offsets", [-96, 0]), "malformed"),
    "offsets reversed": (entry("data_offsets", [96, 0]), "gives it -96"),
    "offsets huge": (entry("data_offsets", [HUGE, HUGE + 96]), "overlaps another or leaves a gap"),
    "offsets beyond 64 bits": (entry("data_offsets", [BEYOND, BEYOND + 96]), "malformed"),
    "offsets one on": (
        change_header(lambda h: h[FIRST].update(data_offsets=[x + 1 for x in h[FIRST]["data_offsets"]])),
        "overlaps",
    ),
    "two tensors share data": (
        change_header(
            lambda h: h["blocks.0.cross_attn.q.bias"].update(
                data_offsets=h["blocks.0.cross_attn.k.bias"]["data_offsets"]
            )
        ),
        "overlaps",
    ),
    "all at the beginning": (
        change_header(
            lambda h: (
                [
                    e.update(data_offsets=[0, e["data_offsets"][1] - e["data_offsets"][0]])
                    for n, e in h.items()
                    if n != "__metadata__"
                ]
                and None
            )
        ),
        "overlaps",
    ),
    "a name with an escape": (rename(FIRST, "\x1b]0;owned\x07"), "printable"),
    "a name with a line break": (rename(FIRST, "a\nerror: b"), "printable"),
    "a name that reads backwards": (rename(FIRST, "\u202etxt.exe"), "printable"),
    "a name of a lone surrogate": (rename(FIRST, "\ud800"), "printable|surrogates"),
    "a name of nothing": (rename(FIRST, ""), "printable"),
    "a name of a million letters": (rename(FIRST, "x" * 1_000_000), "not part of a Wan model|missing"),
    "a name that is a path": (rename(FIRST, "../../" + FIRST), "not part of a Wan model|missing|state"),
    "sparse": (sparse, "the header promises"),
}


@pytest.mark.parametrize(("case", "command"), named(HEADERS))
def test_headers(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = HEADERS[case]
    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, spoil)
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)
    assert WEIGHTS_NAME in message or str(model) in message


def boundaries() -> list[int]:
    """Where a file of this structure can be cut: in the length, in the header, and where each tensor ends."""
    return list(range(70))


@pytest.mark.parametrize("boundary", boundaries())
def test_cut_at_every_boundary(tmp_path: Path, shelf: Shelf, boundary: int) -> None:
    good = shelf.converted / WEIGHTS_NAME
    header, data = parts(good)
    start = good.stat().st_size - len(data)
    ends = sorted({e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"})
    cuts = [
        0,
        1,
        7,
        8,
        9,
        start // 2,
        start - 1,
        start,
        start + 1,
        *(start + end for end in ends[:-1]),
        start + ends[-1] - 1,
    ]
    if boundary >= len(cuts):
        assert len(cuts) > 60
        return
    model = spoiled(tmp_path, shelf.converted, raw(good.read_bytes()[: cuts[boundary]]))
    command = COMMANDS[boundary % 6]
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=f"{WEIGHTS_NAME}.*(truncated|promises)")


def shards(folder: Path) -> dict[str, str]:
    """Split the weights into two shards with an index."""
    state = load_file(folder / WEIGHTS_NAME)
    names = sorted(state)
    placed = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: state[name] for name in names if placed[name] == shard}, folder / shard)
    (folder / WEIGHTS_NAME).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return change_json(INDEX, change)


def outside(target: str) -> Spoil:
    """The index's first tensor lies in a good file outside the folder."""

    def spoil(folder: Path) -> None:
        shutil.copy(folder / SHARDS[0], folder.parent / "outside.safetensors")
        index(lambda i: i["weight_map"].update({FIRST: target.format(folder.parent)}))(folder)

    return spoil


SHARDED: Cases = {
    "an index above its folder": (outside("../outside.safetensors"), "not a .safetensors file beside it"),
    "an absolute index": (outside("{}/outside.safetensors"), "not a .safetensors file beside it"),
    "an index with a backslash": (outside("..\\outside.safetensors"), "not a .safetensors file beside it"),
    "an index of a folder": (outside("./" + SHARDS[0]), "not a .safetensors file beside it"),
    "an index of an address": (outside("https://example.com/a.safetensors"), "not a .safetensors file beside it"),
    "an index of a pickle": (outside("model.pt"), "not a .safetensors file beside it"),
    "an index of a NUL": (outside("a\0.safetensors"), "not a .safetensors file beside it"),
    "an index of a number": (index(lambda i: i["weight_map"].update({FIRST: 7})), "points to 7"),
    "an index of null": (index(lambda i: i["weight_map"].update({FIRST: None})), "points to None"),
    "an index of a list": (index(lambda i: i["weight_map"].update({FIRST: [SHARDS[0]]})), "points to"),
    "an index of a long name": (outside("x" * 5000 + ".safetensors"), "cannot be read"),
    "an index with an escape": (outside("\x1b[2J.safetensors"), "no such file|plain"),
    "an index of a missing shard": (outside("gone.safetensors"), "there is no such file"),
    "an index of the wrong shard": (index(lambda i: i["weight_map"].update({"extra": SHARDS[0]})), "lists 'extra'"),
    "an index that leaves out": (index(lambda i: i["weight_map"].pop(FIRST)), f"leaves out '{FIRST}'"),
    "an index of nothing": (index(lambda i: i.update(weight_map={})), "no weight_map"),
    "an index without a map": (index(lambda i: i.pop("weight_map")), "no weight_map"),
    "an index with a list": (index(lambda i: i.update(weight_map=[])), "no weight_map"),
    "an index cut": (write(INDEX, '{"weight_map": {'), "not readable JSON"),
    "an index of 17 million bytes": (write(INDEX, " " * ((1 << 24) + 1)), "expected at most"),
    "an index with a key twice": (
        write(INDEX, f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}'),
        "twice",
    ),
    "an index in a loop": (instead(INDEX, "loop"), "shards but no|holds shards"),
    "a shard in a loop": (instead(SHARDS[0], "loop"), "cannot be read"),
    "a shard to nowhere": (instead(SHARDS[1], "nowhere"), "link to nowhere"),
    "a shard that is a pipe": (instead(SHARDS[0], "pipe"), "a pipe, socket or device"),
    "a shard that is a device": (instead(SHARDS[0], "device"), "a pipe, socket or device"),
    "a shard that is a folder": (instead(SHARDS[0], "folder"), "a folder"),
    "a shard cut": (lambda f: os.truncate(f / SHARDS[1], 900), "truncated|promises"),
    "a shard twice": (
        lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1]),
        "too; remove the stale file",
    ),
    "no shard": (lambda f: (f / SHARDS[0]).unlink(), "there is no such file"),
    "no index": (lambda f: (f / INDEX).unlink(), "holds shards but no"),
    "two indexes": (
        lambda f: shutil.copy(f / INDEX, f / ("a" + INDEX)) and (f / INDEX).rename(f / ("b" + INDEX)),
        "several weight files",
    ),
}


@pytest.mark.parametrize(("case", "command"), named(SHARDED))
def test_shards(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = SHARDED[case]

    def both(folder: Path) -> None:
        shards(folder)
        spoil(folder)

    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, both)
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)
