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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import (
    Cases,
    Shelf,
    Spoil,
    arguments,
    change_header,
    change_json,
    change_state,
    check_refusal,
    instead,
    invoke,
    make_shelf,
    packed,
    parts,
    refused,
    setting,
    tree,
    write,
)
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.timeout(60)

INDEX = f"{WEIGHTS_NAME}.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HUGE, BEYOND = 10**18, 10**400
FIRST = "patch_embedding.bias"
QUERY = "blocks.1.self_attn.q.weight"
COMMANDS = ("analyze", "convert", "generate", "heal", "evaluate", "push")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def spoiled(tmp_path: Path, source: Path, spoil: Spoil) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    spoil(folder)
    return folder


def named(cases: Cases, commands: Sequence[str] = COMMANDS) -> list[Any]:
    """Each case by one of the commands that read a model, in turn."""
    return [
        pytest.param(case, commands[i % len(commands)], id=f"{commands[i % len(commands)]}-{case}")
        for i, case in enumerate(cases)
    ]


# --- safetensors: the header -----------------------------------------------------------------------------------------


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
    "html": (raw(b"<!DOCTYPE html><html>Sign in</html>"), "truncated or not safetensors"),
    "lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), "truncated"),
    "length 0": (raw(packed({}, b"", 0)), "header cannot be read"),
    "length 2**63": (raw(packed({}, b"", 1 << 63)), "truncated"),
    "length 2**64 - 1": (raw(packed({}, b"", (1 << 64) - 1)), "truncated"),
    "length one too long": (raw(packed({"a": 1}, b"", 9)), "truncated"),
    "length one too short": (raw(packed(b'{"a": 1}', b"", 7)), "header cannot be read"),
    "header above the limit": (raw(packed(b'{"a":"' + b"x" * (1 << 22) + b'"}')), "4,194,3.. bytes, expected at most"),
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


# --- config.json -----------------------------------------------------------------------------------------------------

SIZES = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")
ABSURD: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "huge": HUGE,
    "beyond 64 bits": 10**30,
    "half": 0.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "text": "24",
    "list": [24],
    "object": {"value": 24},
}
NOT_SIZES = {
    "patch_size": ([], [1, 2], [1, 2, 0], [1, 2, -2], [1, 2, HUGE], [1, 2, 2, 2], [1.0, 2, 2], "1x2x2", True, {"t": 1}),
    "eps": (0, -1, 1, 1e300, float("nan"), float("inf"), "1e-6", True, [1e-6]),
    "model_type": (7, True, ["t2v"], {}, "x" * 1000, "\x1b[31m", "t2v\nowned"),
    "cross_attn_norm": (0, "no", [], False),
    "image_dim": (0, -1, 3, HUGE, "1280", True),
    "qk_norm": (False, "layer_norm", 7, [], {}),
    "window_size": ([3, 3], HUGE, "all", [-1], {}),
    "streaming": (
        3,
        True,
        [],
        "yes",
        {"chunk": 3},
        {"chunk_frames": 0},
        {"window_frames": HUGE},
        {"sink_frames": -1},
        {"chunk_frames": True},
        {"window_frames": 3},
        {"sink_frames": HUGE},
        {"positions": "other"},
    ),
}
CONFIG_VALUES = {f"{field} {name}": (field, value) for field in SIZES for name, value in ABSURD.items()}
CONFIG_VALUES |= {f"{name} {i}": (name, value) for name, values in NOT_SIZES.items() for i, value in enumerate(values)}


@pytest.mark.parametrize("case", CONFIG_VALUES)
def test_config_values(tmp_path: Path, shelf: Shelf, case: str) -> None:
    field, value = CONFIG_VALUES[case]
    model = spoiled(tmp_path, shelf.dense, change_json(CONFIG_NAME, setting(field, value)))
    command = ("analyze", "convert")[len(case) % 2]
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"))
    assert "model" in message


def section(field: str, value: Any) -> Spoil:
    return change_json(CONFIG_NAME, setting(f"mla.{field}", value))


LAYER = {"kv_lora_rank": 5, "qk_nope_head_dim": 8, "v_head_dim": 7, "rope_components": [[0, 1], [4, 1]]}
SECTIONS: Cases = {
    "mla text": (change_json(CONFIG_NAME, setting("mla", "yes")), "mla must be a mapping"),
    "mla list": (change_json(CONFIG_NAME, setting("mla", [])), "mla must be a mapping"),
    "mla empty": (change_json(CONFIG_NAME, setting("mla", {})), "format_version"),
    "mla null": (change_json(CONFIG_NAME, setting("mla", None)), "missing"),
    "mla gone": (change_json(CONFIG_NAME, lambda c: {name: c[name] for name in c if name != "mla"}), "missing"),
    "version 2": (section("format_version", 2), "format_version is 2"),
    "version huge": (section("format_version", BEYOND), "format_version|digits"),
    "version true": (section("format_version", True), "format_version"),
    "unknown field": (section("rank", 5), "unknown field 'rank'"),
    "layers text": (section("layers", "all"), "mla.layers must be a list"),
    "layers object": (section("layers", {"0": LAYER}), "mla.layers must be a list"),
    "no layers": (section("layers", []), "0 entries for 2 layers"),
    "one layer": (section("layers", [LAYER]), "1 entries for 2 layers"),
    "many layers": (section("layers", [0] * 100_000), "mla.layers must be a list"),
    "999 layers": (section("layers", [{"dense": True}] * 999), "999 entries for 2 layers"),
    "a layer null": (section("layers.0", None), r"mla.layers\[0\]"),
    "a layer false": (section("layers.0", {"dense": False}), r"mla.layers\[0\]: kv_lora_rank"),
    "a layer empty": (section("layers.0", {}), r"mla.layers\[0\]: kv_lora_rank"),
    "dense that is not": (section("layers.0", {"dense": True}), "missing"),
    "all converted": (section("layers.1", LAYER), "missing"),
    "rank 0": (section("layers.0.kv_lora_rank", 0), r"mla.layers\[0\]: kv_lora_rank is 0: give 1 or more"),
    "rank -1": (section("layers.0.kv_lora_rank", -1), "kv_lora_rank is -1: give 1 or more"),
    "rank huge": (section("layers.0.kv_lora_rank", HUGE), "kv_lora_rank is .*: give at most"),
    "rank text": (section("layers.0.kv_lora_rank", "5"), "kv_lora_rank"),
    "rank true": (section("layers.0.kv_lora_rank", True), "kv_lora_rank"),
    "rank NaN": (section("layers.0.kv_lora_rank", float("nan")), "kv_lora_rank"),
    "rank another": (section("layers.0.kv_lora_rank", 6), "shape"),
    "values 0": (section("layers.0.v_head_dim", 0), "v_head_dim is 0"),
    "content -1": (section("layers.0.qk_nope_head_dim", -1), "qk_nope_head_dim is -1: give 0 or more"),
    "content huge": (section("layers.0.qk_nope_head_dim", HUGE), "qk_nope_head_dim is .*: give at most"),
    "components text": (section("layers.0.rope_components", "01"), "rope_components"),
    "components flat": (section("layers.0.rope_components", [0, 1]), "rope_components"),
    "components of three": (section("layers.0.rope_components", [[0, 1, 2]]), "rope_components"),
    "components descend": (section("layers.0.rope_components", [[4, 1], [0, 1]]), "ascend"),
    "components twice": (section("layers.0.rope_components", [[0, 1], [0, 1]]), "ascend"),
    "components none of one": (
        section("layers.0.rope_components", [[0, 0], [4, 1]]),
        r"rope_components\.0\.1 is 0: give 1 or more",
    ),
    "components negative": (
        section("layers.0.rope_components", [[-1, 1], [4, 1]]),
        r"rope_components\.0\.0 is -1: give 0 or more",
    ),
    "components beyond the head": (section("layers.0.rope_components", [[0, 1], [6, 1]]), "pairs 0 to 5"),
    "components far beyond": (section("layers.0.rope_components", [[0, 1], [HUGE, 1]]), "pairs 0 to 5"),
    "components huge": (section("layers.0.rope_components", [[0, HUGE]]), "shape"),
    "components many": (section("layers.0.rope_components", [[i, 1] for i in range(10_000)]), "pairs 0 to 5"),
    "query rank 0": (section("q_lora_rank", 0), "q_lora_rank is 0"),
    "query rank huge": (section("q_lora_rank", HUGE), "shape"),
    "query rank exact": (section("q_lora_rank", None), "shape"),
    "query rank text": (section("q_lora_rank", "none"), "q_lora_rank"),
    "scale 0": (section("softmax_scale", 0), "softmax_scale"),
    "scale negative": (section("softmax_scale", -0.3), "softmax_scale"),
    "scale NaN": (section("softmax_scale", float("nan")), "softmax_scale"),
    "scale infinite": (section("softmax_scale", float("inf")), "softmax_scale"),
    "scale text": (section("softmax_scale", "0.3"), "softmax_scale"),
    "scale null": (section("softmax_scale", None), "softmax_scale"),
    "norm unknown": (section("key_norm", "rms"), "key_norm"),
    "norm another": (section("key_norm", "token"), "missing"),
    "norm list": (section("key_norm", ["latent"]), "key_norm"),
    "rope unknown": (section("rope", "none"), "rope"),
    "rope head": (section("rope", "head"), "rope head shares no rotary key"),
    "rope latent": (section("rope", "latent"), "missing|shape"),
    "calibration text": (section("calibration", "clips"), "calibration"),
    "calibration list": (section("calibration", [1]), "calibration"),
}


@pytest.mark.parametrize(("case", "command"), named(SECTIONS, ("analyze", "generate", "heal", "evaluate", "push")))
def test_latent_sections(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = SECTIONS[case]
    model = spoiled(tmp_path, shelf.converted, spoil)
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)


JSON_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not readable JSON"),
    "blank": (b" \n", "not readable JSON"),
    "cut": (b'{"dim": 24', "not readable JSON"),
    "two objects": (b"{}{}", "not readable JSON"),
    "single quotes": (b"{'dim': 24}", "not readable JSON"),
    "a trailing comma": (b'{"dim": 24,}', "not readable JSON"),
    "a comment": (b'{"dim": 24} // width', "not readable JSON"),
    "a list": (b"[]", "must hold a JSON object"),
    "null": (b"null", "must hold a JSON object"),
    "a number": (b"7", "must hold a JSON object"),
    "a key twice": (b'{"dim": 24, "dim": 48}', "'dim' is in it twice"),
    "not UTF-8": (b'{"model_type": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"dim": 24}'.encode("utf-16"), "not UTF-8"),
    "a BOM": (b'\xef\xbb\xbf{"dim": 24}', "not readable JSON"),
    "NULs": (bytes(100), "not readable JSON"),
    "a number of 5000 digits": (b'{"dim": ' + b"9" * 5000 + b"}", "not readable JSON"),
    "lists of lists": (b'{"dim": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    "lists 40 deep": (b'{"dim": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
    "objects of objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "17 million bytes": (b'{"dim": "' + b"9" * (1 << 24) + b'"}', "expected at most 16,777,216"),
    "a million lists": (b'{"a": [' + b"[]," * 600_000 + b"0]}", "lists and objects"),
    "a pickle": (pickle.dumps({"dim": 24}), "not UTF-8"),
    "a class of another family": (b'{"_class_name": "LTXVideoTransformer3DModel"}', "LTX-Video"),
    "a class with an escape": (b'{"_class_name": "\\u001b[2JMochi"}', "Mochi"),
    "classes that are no texts": (b'{"architectures": [["T5"], {"a": "CLIP"}]}', "a text encoder"),
}


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "option"])
@pytest.mark.parametrize("case", JSON_FILES)
def test_json_files(tmp_path: Path, shelf: Shelf, case: str, beside: bool) -> None:
    content, says = JSON_FILES[case]
    if beside:
        model = spoiled(tmp_path, shelf.dense, write(CONFIG_NAME, content))
        refused(tmp_path, *arguments("convert", model, shelf, tmp_path / "out"), says=says)
    else:
        (tmp_path / "other.json").write_bytes(content)
        refused(tmp_path, "analyze", shelf.dense, "--config", tmp_path / "other.json", says=says)


# --- tensors that do not make a model --------------------------------------------------------------------------------


def swap(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return change_state(lambda state: state.update({name: make(state[name]).contiguous()}))


def move(old: str, new: str) -> Spoil:
    return change_state(lambda state: state.update({new: state.pop(old)}))


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return make


FFN = "blocks.0.ffn.0.weight"
TENSORS: Cases = {
    **{
        f"dtype {dtype}": (
            swap(QUERY, lambda t, dtype=dtype: t.to(getattr(torch, dtype))),
            f"is torch.{dtype}, expected",
        )  # type: ignore[misc]
        for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    },
    **{
        f"dtype {dtype} outside attention": (
            swap(FFN, lambda t, dtype=dtype: t.to(getattr(torch, dtype))),
            f"is torch.{dtype}, expected",
        )  # type: ignore[misc]
        for dtype in ("int8", "bool", "float8_e4m3fn", "float8_e5m2", "complex64")
    },
    "dtype float8_e4m3fn": (swap(QUERY, lambda t: t.to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn, expected"),
    "dtype float8_e5m2": (swap(QUERY, lambda t: t.to(torch.float8_e5m2)), "is torch.float8_e5m2, expected"),
    "dtype complex64": (swap(QUERY, lambda t: t.to(torch.complex64)), "is torch.complex64, expected"),
    "transposed": (swap(FFN, lambda t: t.T), r"shape \[24, 20\], expected \[20, 24\]|dimensions"),
    "transposed query up": (swap("text_embedding.0.weight", lambda t: t.T), "shape"),
    "flat": (swap(QUERY, lambda t: t.flatten()), "shape|rows"),
    "one row short": (swap(QUERY, lambda t: t[1:]), "shape"),
    "one row more": (swap(QUERY, lambda t: torch.cat((t, t[:1]))), "shape|rows"),
    "one dimension more": (swap(QUERY, lambda t: t[None]), "shape"),
    "a scalar": (swap(QUERY, lambda t: t[0, 0]), "shape"),
    "no rows": (swap(QUERY, lambda t: t[:0]), "shape"),
    "grouped queries": (swap("blocks.1.self_attn.k.weight", lambda t: t[:12]), "grouped-query"),
    "norms of heads": (swap("blocks.1.self_attn.norm_q.weight", lambda t: t[:12]), "norms each head"),
    "patches of two dims": (swap("patch_embedding.weight", lambda t: t.flatten(1)), "expected 5 dimensions"),
    "patches of no size": (swap("patch_embedding.weight", lambda t: t[:, :0]), "expected 5 dimensions"),
    "no head": (change_state(lambda s: s.pop("head.head.weight")), "'head.head.weight' is missing"),
    "no patches": (change_state(lambda s: s.pop("patch_embedding.weight")), "family is not known"),
    "no query": (change_state(lambda s: s.pop(QUERY)), "missing"),
    "no bias": (change_state(lambda s: s.pop("blocks.1.self_attn.o.bias")), "missing"),
    "no last block": (change_state(lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")]), "num_layers 2"),
    "no blocks": (
        change_state(lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.")]),
        "family is not known",
    ),
    "a block too many": (
        change_state(
            lambda s: s.update(
                {n.replace("blocks.1", "blocks.2"): s[n].clone() for n in list(s) if n.startswith("blocks.1.")}
            )
        ),
        "num_layers 2",
    ),
    "a gap between blocks": (
        change_state(
            lambda s: s.update(
                {n.replace("blocks.1", "blocks.7"): s.pop(n) for n in list(s) if n.startswith("blocks.1.")}
            )
        ),
        "missing",
    ),
    "a block of many digits": (
        move(QUERY, "blocks." + "9" * 5000 + ".self_attn.q.weight"),
        "num_layers|layers|missing",
    ),
    "a negative block": (move(QUERY, "blocks.-1.self_attn.q.weight"), "missing"),
    "an extra tensor": (change_state(lambda s: s.update({"extra": torch.ones(1)})), "'?extra"),
    "an extra bias": (
        change_state(lambda s: s.update({"blocks.0.ffn.0.gate": torch.ones(1)})),
        "not part of a Wan model",
    ),
    "another case": (move(QUERY, QUERY.upper()), "missing"),
    "blocks in capitals": (
        change_state(lambda s: s.update({n.capitalize(): s.pop(n) for n in list(s)})),
        "family is not known",
    ),
    "a blank at the end": (move(QUERY, QUERY + " "), "missing"),
    "a letter that looks alike": (move(QUERY, QUERY.replace("q.", "\u051b.")), "missing"),
    "the same once unwrapped": (
        change_state(lambda s: s.update({"model." + QUERY: s[QUERY].clone()})),
        "once unwrapped",
    ),
    "the same in two layouts": (
        change_state(lambda s: s.update({"blocks.1.attn1.to_q.weight": s[QUERY].clone()})),
        "not part of a Wan model",
    ),
    "a quantised weight": (
        change_state(lambda s: s.update({QUERY + "_scale": torch.ones(1)})),
        "not part of a Wan model",
    ),
    "a LoRA": (change_state(lambda s: s.update({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)})), "a LoRA"),
    "a VACE": (change_state(lambda s: s.update({"vace_blocks.0.x": torch.ones(2)})), "VACE"),
}


@pytest.mark.parametrize(("case", "command"), named(TENSORS))
def test_tensors(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = TENSORS[case]
    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, spoil)
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)
    assert "model" in message


NOT_FINITE = {
    f"{value} in {name} ({dtype})": (name, float(value), dtype)
    for name, dtypes in (
        ("blocks.1.self_attn.q.weight", ("float32", "bfloat16", "float16", "float64")),
        ("blocks.1.self_attn.k.weight", ("float32", "bfloat16")),
        ("blocks.1.self_attn.v.bias", ("float32",)),
        ("blocks.1.self_attn.norm_k.weight", ("float32",)),
        ("blocks.0.cross_attn.norm_q.weight", ("float32",)),
        ("blocks.0.ffn.0.weight", ("float32", "bfloat16")),
        ("head.modulation", ("float32",)),
        ("time_embedding.0.bias", ("float32",)),
    )
    for dtype in dtypes
    for value in ("nan", "inf", "-inf")
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_values_that_are_not_finite(tmp_path: Path, shelf: Shelf, case: str) -> None:
    name, value, dtype = NOT_FINITE[case]
    commands = ["convert", "generate", "heal", "evaluate"] + ["analyze"] * name.endswith("k.weight")
    command = commands[list(NOT_FINITE).index(case) % len(commands)]
    source = shelf.converted if command in ("generate", "heal", "evaluate") else shelf.dense
    model = spoiled(tmp_path, source, swap(name, lambda t: poison(value)(t.to(getattr(torch, dtype)))))
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says="NaN or infinite")
    assert name in message


# --- indexes and shards ----------------------------------------------------------------------------------------------


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


# --- what lies at a path ---------------------------------------------------------------------------------------------


PLACES: Cases = {
    "weights in a loop": (instead(WEIGHTS_NAME, "loop"), "holds no weights"),
    "weights to nowhere": (instead(WEIGHTS_NAME, "nowhere"), "holds no weights"),
    "weights a pipe": (instead(WEIGHTS_NAME, "pipe"), "holds no weights"),
    "weights a device": (instead(WEIGHTS_NAME, "device"), "holds no weights"),
    "weights a folder": (instead(WEIGHTS_NAME, "folder"), "holds no weights"),
    "config in a loop": (instead(CONFIG_NAME, "loop"), "config.json: it cannot be read"),
    "config to nowhere": (instead(CONFIG_NAME, "nowhere"), "config.json: is a link to nowhere"),
    "config a pipe": (instead(CONFIG_NAME, "pipe"), "config.json: it is a pipe"),
    "config a device": (instead(CONFIG_NAME, "device"), "config.json: it is a pipe, socket or device"),
    "config a folder": (instead(CONFIG_NAME, "folder"), "config.json: it is a folder"),
    "a file name that is no text": (
        lambda f: (f / WEIGHTS_NAME).rename(f / os.fsdecode(b"\xff.safetensors")),
        "plain UTF-8",
    ),
    "a file name with an escape": (
        lambda f: (f / WEIGHTS_NAME).rename(f / "\x1b[2J.safetensors"),
        "plain UTF-8",
    ),
    "two files": (
        lambda f: (
            (f / WEIGHTS_NAME).rename(f / "a.safetensors") and shutil.copy(f / "a.safetensors", f / "b.safetensors")
        ),
        "several weight files",
    ),
    "nothing": (lambda f: (f / WEIGHTS_NAME).unlink(), "holds no weights"),
    "experts without themselves": (
        lambda f: (
            [(f / n).mkdir() or (f / n / "a.safetensors").write_bytes(b"") for n in ("transformer", "transformer_2")]
            and None
        ),
        "two experts|truncated|experts",
    ),
}


@pytest.mark.parametrize(("case", "command"), named(PLACES))
def test_places(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = PLACES[case]
    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, spoil)
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)


SOURCES: dict[str, tuple[str, str]] = {
    "nothing": ("", "not a path"),
    "blank": (" ", "not a path"),
    "gone": ("gone.safetensors", "no such file"),
    "absolute": ("/nowhere/at/all", "no such file"),
    "a long name": ("x" * 5000, "is not a path"),
    "a long path": ("x/" * 3000, "is not a path|no such file"),
    "a NUL": ("a\0b", "plain UTF-8"),
    "a line break": ("a\nb/c", "plain UTF-8"),
    "an escape": ("\x1b[2J/a", "plain UTF-8"),
    "undecoded bytes": ("\udcff/model", "plain UTF-8"),
    "a text turned round": ("user/\u202emodel", "plain UTF-8"),
    "an unknown home": ("~nobody-is-called-this/model", "not a path|no such file"),
    "a loop": ("loop", "leads nowhere"),
    "a loop like a Hub id": ("links/loop", "leads nowhere"),
    "a pipe": ("pipe", "a pipe, socket or device"),
    "a device": ("/dev/zero", "a pipe, socket or device"),
    "a text file": ("notes.txt", "not a weight file"),
    "a shard alone": (SHARDS[0], "one shard of several"),
    "an archive": ("model.zip", "not a weight file"),
    "an empty folder": ("empty", "holds no weights"),
    "an address": ("https://huggingface.co/user/repo", "no such file"),
    "a Hub id above itself": ("user/repo/../other", "leads outside its repository"),
    "a Hub id that is all dots": ("user/..", "leads outside its repository"),
    "a Hub id with a dot": ("user/repo/./a", "leads outside its repository"),
    "a Hub id above the Hub": ("user/repo/../../../../etc", "leads outside its repository"),
    "a Hub id with a backslash": ("user/repo\\..\\..", "no such file"),
    "a Hub id with a query": ("user/repo?x=1", "no such file"),
    "a Hub id with a fragment": ("user/repo#x", "no such file"),
    "a Hub id in percents": ("user/%2e%2e", "no such file"),
    "a Hub id that begins with a dash": ("-user/repo", "no such file|No such option|Usage"),
    "a Hub id with blanks": ("us er/repo", "no such file"),
    "a Hub id of one name": ("repo", "no such file"),
    "a Hub id with two dots inside": ("user/re..po", "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id with dashes": ("user/--repo", "neither a path here nor a Hub id"),
    "a Hub id that ends in .git": ("user/repo.git", "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id of other letters": ("\u00fcser/r\u00e9po", "neither a path|no such file"),
    "a long Hub id": ("user/" + "x" * 97, "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id": ("user/repo", "cannot be fetched"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    source, says = SOURCES[case]
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("links").mkdir()
    Path("links/loop").symlink_to("../loop")
    Path("empty").mkdir()
    for name in ("notes.txt", SHARDS[0], "model.zip"):
        Path(name).write_bytes(b"notes")
    before = arguments(("analyze", "convert")[len(case) % 2], source, shelf, tmp_path / "out")
    command = [before[0], *before[2:], "--", source]
    refused(tmp_path, *command, says=says)


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        f"revision {i}": (("user/repo", "--revision", revision), "no branch, tag or commit")
        for i, revision in enumerate(
            ("../../etc", "a/../b", "a b", "", "-x", "a?b=c", "a#b", "a\\b", "/main", "a\nb", "\t")
        )
    },
    "a revision of this disk": (("MODEL", "--revision", "main"), "has no revision"),
    **{
        f"subfolder {i}": ((source, "--subfolder", folder), "leads outside|no folder")
        for i, (source, folder) in enumerate(
            [(s, f) for s in ("MODEL", "user/repo") for f in ("..", "../other", "a/../../b", "/etc")]
            + [("MODEL", "x" * 5000), ("MODEL", "gone"), ("MODEL", "a\nb"), ("MODEL", "a\0b"), ("MODEL", "config.json")]
        )
    },
    "a subfolder of a file": (("WEIGHTS", "--subfolder", "a"), "a file has no subfolder"),
    "a state key": (("MODEL", "--state-key", "generator"), "no state key 'generator'"),
    "a state key with an escape": (("MODEL", "--state-key", "\x1b[2J"), "no state key"),
    **{
        f"layers {i}": (("MODEL", "--layers", layers), "layer")
        for i, layers in enumerate(
            ("", "a", "-1", "1-0", "0-", "2", "0-999999", "9" * 50, "0,,1", "0;1", "\u0663", "1e3", "0\n1")
        )
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tmp_path: Path, shelf: Shelf, case: str) -> None:
    (source, *rest), says = OPTIONS[case]
    known = {"MODEL": str(shelf.dense), "WEIGHTS": str(shelf.dense / WEIGHTS_NAME)}
    refused(tmp_path, "analyze", known.get(source, source), *rest, says=says)


# --- pickles ---------------------------------------------------------------------------------------------------------


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
    "a bare pickle": (lambda _: pickle.dumps({"w": 1}), "not a PyTorch checkpoint|no tensors"),
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


# --- memory ----------------------------------------------------------------------------------------------------------

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
from hostile import check_refusal, invoke
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
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_000_000


# --- anything --------------------------------------------------------------------------------------------------------

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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Path:
    """A model folder to spoil again and again."""
    folder = tmp_path_factory.mktemp("anything") / "model"
    shutil.copytree(shelf.converted, folder)
    return folder


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
