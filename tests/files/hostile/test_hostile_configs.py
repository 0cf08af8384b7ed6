"""Broken and hostile model files: every one ends in one plain message and exit code 2, and changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Cases, Shelf, Spoil, arguments, change_json, change_state, refused, setting, write
from hostile_cases import BEYOND, CONFIG_VALUES, HUGE, named, spoiled

from mlaconvert.files.names import CONFIG_NAME

pytestmark = pytest.mark.timeout(60)
QUERY = "blocks.1.self_attn.q.weight"


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
    "version 0": (section("format_version", 0), "format_version is 0"),
    "present of version 1": (section("present", "exact"), "mla.present is of format_version 2"),
    "version 4": (section("format_version", 4), "format_version is 4"),
    "bits of version 1": (section("layers.0.cache_bits", [[4, 5]]), "cache_bits, of format_version 3"),
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
    "a BOM in the middle": (b'{"dim": \xef\xbb\xbf24}', "not readable JSON"),
    "two BOMs": (b'\xef\xbb\xbf\xef\xbb\xbf{"dim": 24}', "not readable JSON"),
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


def swap(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return change_state(lambda state: state.update({name: make(state[name]).contiguous()}))


def move(old: str, new: str) -> Spoil:
    return change_state(lambda state: state.update({new: state.pop(old)}))


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return make


FFN, E4M3 = "blocks.0.ffn.0.weight", torch.float8_e4m3fn
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
        for dtype in ("int8", "bool", "complex64")
    },
    "a scale for nothing": (change_state(lambda s: s.update({f"{FFN}_scale": torch.ones(1)})), "scale of a weight"),
    "a scale of scales": (
        change_state(lambda s: s.update({FFN: s[FFN].to(E4M3), f"{FFN}_scale": torch.ones(1).to(E4M3)})),
        r"_scale' is \[1\] of torch.float8",
    ),
    "scales of blocks": (
        change_state(lambda s: s.update({FFN: s[FFN].to(E4M3), f"{FFN}_scale": torch.ones(2, 2)})),
        r"_scale' is \[2, 2\] of",
    ),
    "float8 of another shape": (swap(FFN, lambda t: t.T.to(torch.float8_e5m2)), r"\[24, 20\]|dimensions"),
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
    "patches of two dims": (swap("patch_embedding.weight", lambda t: t.flatten(1)[:, 1:]), "expected 5 dimensions"),
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
    "a gate of self-attention": (
        change_state(lambda s: s.update({"blocks.0.self_attn.gate": torch.ones(1)})),
        "gated attention",
    ),
    "self-attention of a block that is not counted": (
        change_state(lambda s: s.update({"blocks.x.self_attn.q.weight": torch.ones(1)})),
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
        "is the scale of a weight that is torch.float32, not float8",
    ),
    "a LoRA": (change_state(lambda s: s.update({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)})), "a LoRA"),
}
PASSENGERS = {  # carried along by a conversion; what runs the model refuses them
    case: (change_state(lambda s, name=name: s.update({name: torch.ones(2)})), rf"1 tensor beyond Wan's, of {says}\)")
    for case, name, says in (
        ("an extra tensor", "extra", "extra"),
        ("an extra bias", "blocks.0.ffn.0.gate", "ffn"),
        ("a tensor of a block itself", "blocks.0", "blocks"),
        ("a tensor of no block", "blocks.x", "blocks"),
        ("a VACE", "vace_blocks.0.x", "VACE's control blocks"),
        ("a name of a hundred thousand letters", "y" * 100_000, "y{40}"),
    )
}


@pytest.mark.parametrize(("case", "command"), named(TENSORS))
def test_tensors(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = TENSORS[case]
    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, spoil)
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)
    assert "model" in message


@pytest.mark.parametrize(("case", "command"), named(PASSENGERS, ("generate", "heal", "evaluate")))
def test_passengers(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = PASSENGERS[case]
    refused(
        tmp_path, *arguments(command, spoiled(tmp_path, shelf.converted, spoil), shelf, tmp_path / "out"), says=says
    )


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
