"""Broken and hostile recipes, clips, embeddings, prompts, scores and records: refused like broken model files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import (
    Shelf,
    arguments,
    change_json,
    check_refusal,
    invoke,
    make_shelf,
    packed,
    refused,
    setting,
    special,
    tree,
)
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.timeout(60)

HUGE = 10**18


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


SPECIAL = ("loop", "nowhere", "pipe", "device", "folder", "gone")

# --- recipes ---------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "mapping of fields"),
    "null": ("null", "mapping of fields"),
    "text": ("svd", "mapping of fields"),
    "list": ("- init: svd", "mapping of fields"),
    "two documents": ("init: svd\n---\ninit: random\n", "not a readable YAML"),
    "an open quote": ('init: "svd', "not a readable YAML"),
    "an open list": ("init: [svd", "not a readable YAML"),
    "a tab": ("a:\n\tinit: svd", "not a readable YAML"),
    "a lone anchor": ("init: &a svd", "anchor, an alias or a tag"),
    "an alias": ("init: &a svd\nrope: *a", "anchor, an alias or a tag"),
    "an alias of nothing": ("init: *a", "anchor, an alias or a tag|not a readable"),
    "a billion laughs": (LAUGHS, "anchor, an alias or a tag"),
    "itself": ("&a\ninit: *a", "anchor, an alias or a tag"),
    "a merge": ("a: &a {init: svd}\n<<: *a", "anchor, an alias or a tag"),
    "code": ("init: !!python/object/apply:os.system ['true']", "anchor, an alias or a tag"),
    "a class": ("!!python/object:mlaconvert.config.ConvertRecipe {init: svd}", "anchor, an alias or a tag"),
    "a name": ("init: !!python/name:os.system", "anchor, an alias or a tag"),
    "bytes": ("init: !!binary c3Zk", "anchor, an alias or a tag"),
    "a set": ("init: !!set {svd}", "anchor, an alias or a tag"),
    "a forced number": ("kv_rank: !!int '5'", "anchor, an alias or a tag"),
    "a tag of one's own": ("init: !svd {}", "anchor, an alias or a tag"),
    "a plain tag": ("init: ! svd", "anchor, an alias or a tag"),
    "a directive": ("%TAG ! tag:example.com,2000:\n---\ninit: !x svd", "anchor, an alias or a tag|not a readable"),
    "a version": ("%YAML 9.9\n---\ninit: svd", "not a readable YAML"),
    "a key twice": ("init: svd\ninit: random", "'init' is in it twice"),
    "a key twice inside": ("streaming: {sink_frames: 1, sink_frames: 2}", "'sink_frames' is in it twice"),
    "a key that is a list": ("? [init]\n: svd", "not a readable YAML"),
    "a key that is a mapping": ("? {init: svd}\n: svd", "not a readable YAML"),
    "a key that is a number": ("7: svd", "unknown field '7'"),
    "a key that is null": ("~: svd", "unknown field"),
    "a key with an escape": ('"\\e[2J": svd', "unknown field"),
    "a long key": ("x" * 100_000 + ": svd", "unknown field|not a readable"),
    "deep lists": ("init: " + "[" * 10_000 + "]" * 10_000, "nested too deeply"),
    "deep mappings": ("init: " + "{a: " * 5_000 + "}" * 5_000, "nested too deeply"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(200)), "nested too deeply"),
    "200 thousand bytes": ("# " + "x" * 200_000 + "\ninit: svd", "expected at most 131,072"),
    "not UTF-8": (b"init: \xff\xfe", "not UTF-8"),
    "UTF-16": ("init: svd".encode("utf-16"), "not UTF-8"),
    "NULs": (bytes(50), "not a readable YAML"),
    "control characters": ("init: \x1b[2J", "not a readable YAML"),
    "a number of 5000 digits": ("kv_rank: " + "9" * 5000, "not a readable YAML|kv_rank"),
    "a date": ("init: 2026-01-01", "plain data"),
    "a date that is none": ("init: 2026-13-45", "not a readable YAML"),
    "an unknown field": ("rank: 5", "unknown field 'rank'"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(tmp_path: Path, shelf: Shelf, case: str) -> None:
    content, says = YAML[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content.encode() if isinstance(content, str) else content)
    command, model = ("heal", shelf.converted) if len(case) % 2 and "unknown" not in says else ("convert", shelf.dense)
    message = refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), "--recipe", recipe, says=says)
    assert "recipe.yaml" in message


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("command", ["convert", "heal"])
def test_recipes_that_are_no_files(tmp_path: Path, shelf: Shelf, kind: str, command: str) -> None:
    special(tmp_path / "recipe.yaml", kind)
    refused(
        tmp_path, *arguments(command, shelf.converted, shelf, tmp_path / "out"), "--recipe", tmp_path / "recipe.yaml"
    )


NAMES = (
    "",
    " ",
    "../tiny",
    "recipes/tiny",
    "tiny.yaml",
    "TINY",
    "x" * 5000,
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "~nobody/x",
    ".",
)


@pytest.mark.parametrize("command", ["convert", "heal"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_recipes(tmp_path: Path, shelf: Shelf, name: str, command: str) -> None:
    refused(
        tmp_path, *arguments(command, shelf.converted, shelf, tmp_path / "out"), "--recipe", name, says="no such recipe"
    )


BAD_NUMBERS = ("0", "-1", "1000000000000000000", "1.5", ".nan", "true", "five")
CONVERT_FIELDS = {
    **dict.fromkeys(("kv_rank", "rope_dim", "v_dim", "clips", "frames", "height", "width", "vae_stride"), BAD_NUMBERS),
    "q_rank": ("0", "-1", "1000000000000000000", "1.5", "true", "all", "[5]"),
    "nope_dim": ("-1", "1000000000000000000", "1.5", "true", "'5'"),
    "seed": ("-1", "4294967296", "1000000000000000000", "1.5", "true", "null", "'5'"),
    "init": ("null", "SVD", "7", "true", "[svd]", "{a: svd}", "loss"),
    "rope": ("none", "7", "true", "[head]"),
    "key_norm": ("rms", "7", "true"),
    "rope_selection": ("lowest", "7", "energy"),
    "allocation": ("greedy", "7", "adaptive"),
    "without": ("refit", "[nothing]", "[refit]", "7", "true"),
    "dtype": ("float8", "int8", "32", "FLOAT32"),
    "layers": ("'5'", "a", "7", "'1-0'", "'0-999999'", "''", "[0]"),
    "streaming": (
        "7",
        "true",
        "[]",
        "{chunk_frames: 0}",
        "{window_frames: 1}",
        "{sink_frames: -1}",
        "{positions: x}",
        "{chunk_frames: true}",
        "{window_frames: 1000000000000000000}",
        "{frames: 3}",
    ),
    "layout": ("other", "7"),
}
HEAL_NUMBERS = (
    *("steps", "batch", "accumulate", "solver_steps", "critic_steps", "clips", "validation_clips", "validate_every"),
    *("save_every", "frames"),
)
HEAL_FIELDS = {
    **dict.fromkeys(HEAL_NUMBERS, BAD_NUMBERS),
    **dict.fromkeys(("lr", "critic_lr", "clip"), ("0", "-1", ".nan", ".inf", "true", "'5'", "[5]")),
    **dict.fromkeys(("warmup", "weight_decay", "guidance"), ("-1", ".nan", ".inf", "true", "'5'")),
    "ema": ("-0.1", "1", ".nan", "true", "'0.9'"),
    "betas": ("0.9", "[0.9]", "[0.9, 1]", "[-1, 0.9]", "[.nan, 0.9]", "[0.9, 0.9, 0.9]", "[true, false]"),
    "max_loss_ratio": ("1", "0", "-5", ".nan", ".inf", "true"),
    "seed": ("-1", "4294967296", "true", "1.5"),
    "train": ("nothing", "7", "[all]"),
    "stage": ("heal", "7", "null"),
    "schedule": ("linear", "7"),
    "precision": ("fp8", "7"),
    "bad_shards": ("ignore", "7", "true"),
    "gradient_checkpointing": ("'yes'", "1"),
    "attention_steps": ("-1", "1000000000000000000", "1.5", "true"),
}
FIELDS = [("convert", field, value) for field, values in CONVERT_FIELDS.items() for value in values]
FIELDS += [("heal", field, value) for field, values in HEAL_FIELDS.items() for value in values]


@pytest.mark.parametrize(("command", "field", "value"), FIELDS)
def test_fields_of_recipes(tmp_path: Path, shelf: Shelf, command: str, field: str, value: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = {"init": "svd"} if command == "convert" else {"stage": "teacher-forcing", "batch": "1", "steps": "1"}
    recipe.write_text("".join(f"{name}: {text}\n" for name, text in (lines | {field: value}).items()))
    model = shelf.dense if command == "convert" else shelf.converted
    source: tuple[str | Path, ...] = (command, model, "-o", tmp_path / "out", "--recipe", recipe)
    if command == "heal":
        source += ("--data", shelf.clips, "--teacher", shelf.dense)
    refused(tmp_path, *source, says=f"{field}|_frames" if field == "streaming" else field)


# --- clips -----------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]


def spoil_values(name: str, value: float, at: int = -1) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[at] = value

    return change


def reshape(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


SHARDS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    **{
        f"{name} {str(dtype)[6:]}": (cast(name, dtype), f"is {dtype}, expected")
        for name in ("latents", "context")
        for dtype in (
            torch.int8,
            torch.uint8,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.complex64,
        )
    },
    **{
        f"{value} in {name}": (spoil_values(name, float(value)), "not finite|NaN")
        for name in ("latents", "context")
        for value in ("nan", "inf", "-inf")
    },
    "NaN in the first clip": (spoil_values("latents", float("nan"), 0), "not finite"),
    "no latents": (lambda t: t.pop("latents"), "no tensor 'latents'"),
    "no context": (lambda t: t.pop("context"), "no tensor 'context'"),
    "other names": (lambda t: t.update(Latents=t.pop("latents")), "no tensor 'latents'"),
    "no clips": (lambda t: t.update(latents=torch.zeros(0, 4, 3, 4, 6), context=torch.zeros(0, 3, 10)), "latents are"),
    "no frames": (reshape("latents", 5, 4, 0, 4, 6), "latents are"),
    "no height": (reshape("latents", 5, 4, 3, 0, 6), "latents are"),
    "other channels": (reshape("latents", 5, 3, 3, 4, 6), "latents are"),
    "channels last": (reshape("latents", 5, 3, 4, 6, 4), "latents are"),
    "one clip alone": (reshape("latents", 4, 3, 4, 6), "latents are"),
    "six dimensions": (reshape("latents", 1, 5, 4, 3, 4, 6), "latents are"),
    "a scalar": (lambda t: t.update(latents=torch.tensor(1.0)), "latents are"),
    "an odd height": (reshape("latents", 5, 4, 3, 5, 6), "do not divide"),
    "an odd width": (reshape("latents", 5, 4, 3, 4, 7), "do not divide"),
    "fewer texts": (reshape("context", 4, 3, 10), "context is"),
    "more texts": (reshape("context", 6, 3, 10), "context is"),
    "other texts": (reshape("context", 5, 3, 11), "context is"),
    "no tokens": (reshape("context", 5, 0, 10), "context is"),
    "too many tokens": (reshape("context", 5, 7, 10), "context is"),
    "texts of two dimensions": (reshape("context", 5, 10), "context is"),
    "texts of four dimensions": (reshape("context", 5, 1, 3, 10), "context is"),
}
READERS = ("heal", "evaluate", "convert", "analyze")


def with_clips(command: str, shelf: Shelf, clips: Path, output: Path) -> list[str]:
    """A command that reads a folder of clips."""
    if command == "heal":
        found = arguments("heal", shelf.converted, shelf, output)
        return [str(clips) if part == str(shelf.clips) else part for part in found]
    if command == "evaluate":
        return ["evaluate", str(shelf.converted), "--teacher", str(shelf.dense), "--data", str(clips), "--frames", "0"]
    if command == "convert":
        return ["convert", str(shelf.dense), "-o", str(output), "--data", str(clips)]
    return ["analyze", str(shelf.dense), "--calibrated", "--data", str(clips)]


def copied(tmp_path: Path, shelf: Shelf) -> Path:
    folder = tmp_path / "clips"
    shutil.copytree(shelf.clips, folder)
    return folder


@pytest.mark.parametrize(("case", "command"), [(case, READERS[i % 4]) for i, case in enumerate(SHARDS)])
def test_shards_of_clips(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    change, says = SHARDS[case]
    folder = copied(tmp_path, shelf)
    tensors = dict(load_file(folder / "a.safetensors"))
    change(tensors)
    save_file(tensors, folder / "a.safetensors")
    message = refused(tmp_path, *with_clips(command, shelf, folder, tmp_path / "out"), says=says)
    assert "a.safetensors" in message


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard of another size": (
        lambda f: save_file(
            {"latents": torch.zeros(2, 4, 3, 6, 6), "context": torch.zeros(2, 3, 10)}, f / "b.safetensors"
        ),
        "b.safetensors: latents are",
    ),
    "a shard of other texts": (
        lambda f: save_file(
            {"latents": torch.zeros(2, 4, 3, 4, 6), "context": torch.zeros(2, 4, 10)}, f / "b.safetensors"
        ),
        "b.safetensors: context are",
    ),
    "an empty shard": (lambda f: (f / "b.safetensors").write_bytes(b""), "b.safetensors: truncated"),
    "a shard that is text": (lambda f: (f / "b.safetensors").write_text("hello"), "b.safetensors: truncated"),
    "a shard cut": (lambda f: os.truncate(f / "a.safetensors", 300), "a.safetensors: "),
    "a shard cut in its header": (lambda f: os.truncate(f / "a.safetensors", 30), "a.safetensors: truncated"),
    "a shard with a long header": (
        lambda f: (f / "b.safetensors").write_bytes(packed(b"{}", b"", 1 << 40)),
        "b.safetensors: truncated",
    ),
    "a shard of huge clips": (
        lambda f: (f / "b.safetensors").write_bytes(
            packed(
                {
                    "latents": {
                        "dtype": "F32",
                        "shape": [1, 4, 1 << 20, 1 << 10, 6],
                        "data_offsets": [0, 100663296 * 1024],
                    }
                }
            )
        ),
        "b.safetensors: ",
    ),
    "no shards": (lambda f: (f / "a.safetensors").unlink(), "no .*shards"),
    **{
        f"a shard that is a {kind}": (lambda f, kind=kind: special(f / "b.safetensors", kind), "b.safetensors: ")
        for kind in SPECIAL[:-1]
    },
}


@pytest.mark.parametrize(("case", "command"), [(case, READERS[i % 2]) for i, case in enumerate(FOLDERS)])
def test_folders_of_clips(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    change, says = FOLDERS[case]
    folder = copied(tmp_path, shelf)
    change(folder)
    command_line = with_clips(command, shelf, folder, tmp_path / "out")
    refused(tmp_path, *command_line, *(("--clips", "9") if command == "evaluate" else ()), says=says)


def test_a_clip_too_large_for_the_memory(tmp_path: Path, shelf: Shelf) -> None:
    """A file of zeros of any size takes no room on a disk."""
    latents = {"dtype": "F32", "shape": [1, 4, 3, 1 << 16, 1 << 14], "data_offsets": [0, 3 << 34]}
    context = {"dtype": "F32", "shape": [1, 3, 10], "data_offsets": [3 << 34, (3 << 34) + 120]}
    folder = tmp_path / "clips"
    folder.mkdir()
    content = packed({"latents": latents, "context": context})
    (folder / "a.safetensors").write_bytes(content)
    os.truncate(folder / "a.safetensors", len(content) + (3 << 34) + 120)
    for command in READERS:
        refused(tmp_path, *with_clips(command, shelf, folder, tmp_path / "out"), says="cut it to at most")


NULLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "cut": (lambda p: os.truncate(p, 100), "promises|truncated"),
    "another name": (lambda p: save_file({"null": torch.zeros(1, 2, 10)}, p), "has null; expected context"),
    "two": (lambda p: save_file({"context": torch.zeros(2, 2, 10)}, p), "context is"),
    "other texts": (lambda p: save_file({"context": torch.zeros(1, 2, 9)}, p), "context is"),
    "no tokens": (lambda p: save_file({"context": torch.zeros(1, 0, 10)}, p), "context is"),
    "too many tokens": (lambda p: save_file({"context": torch.zeros(1, 7, 10)}, p), "context is"),
    "integers": (lambda p: save_file({"context": torch.zeros(1, 2, 10, dtype=torch.int32)}, p), "is torch.int32"),
    "NaN": (lambda p: save_file({"context": torch.full((1, 2, 10), torch.nan)}, p), "NaN or infinite"),
    **{kind: (lambda p, kind=kind: special(p, kind), "null_context.safetensors: ") for kind in SPECIAL[:-1]},
}


@pytest.mark.parametrize("case", NULLS)
def test_the_empty_prompt(tmp_path: Path, shelf: Shelf, case: str) -> None:
    change, says = NULLS[case]
    folder = copied(tmp_path, shelf)
    change(folder / "null_context.safetensors")
    message = refused(tmp_path, *with_clips("heal", shelf, folder, tmp_path / "out"), says=says)
    assert "null_context.safetensors" in message


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kind", ["gone", "file", "loop", "pipe", "x" * 5000], ids=range(5))
def test_folders_that_are_none(tmp_path: Path, shelf: Shelf, kind: str, command: str) -> None:
    path = tmp_path / ("clips" if len(kind) < 6 and kind.isalpha() else kind)
    if kind == "file":
        path.write_text("x")
    elif kind in SPECIAL:
        special(path, kind)
    refused(tmp_path, *with_clips(command, shelf, path, tmp_path / "out"))


# --- what generate reads ---------------------------------------------------------------------------------------------

EMBEDDINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "text": (lambda p: p.write_text("a cat"), "truncated"),
    "cut": (lambda p: os.truncate(p, 120), "promises|truncated"),
    "a pickle": (lambda p: torch.save({"context": torch.zeros(1, 3, 10)}, p), "truncated|header"),
    "other names": (lambda p: save_file({"prompt_embeds": torch.zeros(1, 3, 10)}, p), "expected context, null_context"),
    "no tensors": (lambda p: p.write_bytes(packed({})), "no tensors"),
    "other texts": (lambda p: save_file({"context": torch.zeros(1, 3, 9)}, p), "context is"),
    "too many tokens": (lambda p: save_file({"context": torch.zeros(1, 7, 10)}, p), "context is"),
    "no tokens": (lambda p: save_file({"context": torch.zeros(1, 0, 10)}, p), "context is"),
    "no prompts": (lambda p: save_file({"context": torch.zeros(0, 3, 10)}, p), "context|prompt"),
    "two dimensions": (lambda p: save_file({"context": torch.zeros(3, 10)}, p), "context is"),
    "integers": (lambda p: save_file({"context": torch.zeros(1, 3, 10, dtype=torch.int64)}, p), "is torch.int64"),
    "complex": (
        lambda p: save_file({"context": torch.zeros(1, 3, 10, dtype=torch.complex64)}, p),
        "is torch.complex64",
    ),
    "float8": (lambda p: save_file({"context": torch.zeros(1, 3, 10).to(torch.float8_e4m3fn)}, p), "is torch.float8"),
    "NaN": (lambda p: save_file({"context": torch.full((1, 3, 10), torch.nan)}, p), "NaN or infinite"),
    "an infinite empty prompt": (
        lambda p: save_file({"context": torch.zeros(1, 3, 10), "null_context": torch.full((1, 3, 10), torch.inf)}, p),
        "NaN or infinite",
    ),
    **{kind: (lambda p, kind=kind: special(p, kind), "input.safetensors: ") for kind in SPECIAL},
}
GIVEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: os.truncate(p, 20), "truncated|header|promises"),
    "other names": (lambda p: save_file({"video": torch.zeros(1, 4, 3, 4, 6)}, p), "expected latents"),
    "other channels": (lambda p: save_file({"latents": torch.zeros(1, 5, 3, 4, 6)}, p), "latents is"),
    "other size": (lambda p: save_file({"latents": torch.zeros(1, 4, 3, 6, 6)}, p), "latents is"),
    "too long": (lambda p: save_file({"latents": torch.zeros(1, 4, 9, 4, 6)}, p), "latents is"),
    "no frames": (lambda p: save_file({"latents": torch.zeros(1, 4, 0, 4, 6)}, p), "latents is"),
    "half a chunk": (lambda p: save_file({"latents": torch.zeros(1, 4, 2, 4, 6)}, p), "chunk|frames"),
    "other samples": (lambda p: save_file({"latents": torch.zeros(2, 4, 3, 4, 6)}, p), "latents is"),
    "four dimensions": (lambda p: save_file({"latents": torch.zeros(4, 3, 4, 6)}, p), "latents is"),
    "integers": (lambda p: save_file({"latents": torch.zeros(1, 4, 3, 4, 6, dtype=torch.uint8)}, p), "is torch.uint8"),
    "NaN": (lambda p: save_file({"latents": torch.full((1, 4, 3, 4, 6), torch.nan)}, p), "NaN or infinite"),
    "images of a model without": (
        lambda p: save_file({"image_latents": torch.zeros(1, 4, 6, 4, 6)}, p),
        "image_latents is",
    ),
    "features of a model without": (
        lambda p: save_file({"image_features": torch.zeros(1, 4, 6)}, p),
        "image_features is",
    ),
    **{kind: (lambda p, kind=kind: special(p, kind), "input.safetensors: ") for kind in SPECIAL},
}


@pytest.mark.parametrize(
    ("option", "case"), [("--embeddings", case) for case in EMBEDDINGS] + [("--given", case) for case in GIVEN]
)
def test_inputs_of_generate(tmp_path: Path, shelf: Shelf, option: str, case: str) -> None:
    change, says = (EMBEDDINGS if option == "--embeddings" else GIVEN)[case]
    path = tmp_path / "input.safetensors"
    shutil.copy(shelf.embeddings, path)
    change(path)
    command = arguments("generate", shelf.converted, shelf, tmp_path / "out")
    command[command.index("--frames") + 1] = "6"
    assert "input.safetensors" in refused(tmp_path, *command, option, path, says=says) or case == "half a chunk"


SCHEDULES = {
    "timesteps": (
        "",
        "a",
        "nan",
        "inf",
        "1e999",
        "-1",
        "0",
        "1001",
        "500,500",
        "250,500",
        "1000,nan,250",
        "1000,,250",
        "1000;250",
    ),
    "steps": ("0", "-1", "1000000000000"),
    "shift": ("0", "-1", "nan", "inf", "1e300"),
    "guidance": ("-1", "nan", "inf"),
    "seconds": ("0", "-1", "nan", "inf", "1e308"),
    "frames": ("0", "-1", str(HUGE)),
    "samples": ("0", "-1", str(HUGE)),
    "seed": ("-1", "4294967296", str(HUGE)),
    "switch": ("a", "nan", "inf", "-1", "1", "1,1"),
    "height": ("0", "-16", "17", str(HUGE)),
    "width": ("0", "33", str(16 * HUGE)),
    "window-frames": ("0", "-1", "2", str(HUGE)),
    "chunk-frames": ("0", "-1", "7", str(HUGE)),
    "sink-frames": ("-1", "7", str(HUGE)),
    "slice": ("0", "-1"),
    "attention": ("dense", ""),
    "format": ("avi", ""),
    "dtype": ("float8", ""),
    "device": ("gpu", "", "cuda:99", "meta", "cpu\n"),
}


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in SCHEDULES.items() for value in values])
def test_schedules(tmp_path: Path, shelf: Shelf, option: str, value: str) -> None:
    command = arguments("generate", shelf.converted, shelf, tmp_path / "out")
    if option in ("seconds", "frames"):
        at = command.index("--frames")
        del command[at : at + 2]
    refused(tmp_path, *command, f"--{option}={value}")


PROMPTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_text(""), "has no prompts"),
    "blank": (lambda p: p.write_text("\n \n"), "has no prompts"),
    "not UTF-8": (lambda p: p.write_bytes(b"a c\xe4t\n"), "not UTF-8"),
    "UTF-16": (lambda p: p.write_text("a cat", encoding="utf-16"), "not UTF-8"),
    "a path": (lambda p: p.write_text("../../a cat"), "cannot be a file name"),
    "an absolute path": (lambda p: p.write_text("/etc/passwd"), "cannot be a file name"),
    "a NUL": (lambda p: p.write_text("a\0cat"), "cannot be a file name"),
    "an escape": (lambda p: p.write_text("a \x1b[2J cat"), "cannot be a file name"),
    "a text turned round": (lambda p: p.write_text("a \u202ecat"), "cannot be a file name"),
    "a long prompt": (lambda p: p.write_text("cat " * 200), "cannot be a file name"),
    "twice": (lambda p: p.write_text("a cat\na cat\n"), "there twice"),
    "too many": (lambda p: p.write_text("a cat\na dog\n"), "rows for 2 prompts"),
    "17 million bytes": (lambda p: p.write_bytes(b"x" * ((1 << 24) + 1)), "expected at most"),
    **{kind: (lambda p, kind=kind: special(p, kind), "prompts.txt: ") for kind in SPECIAL},
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(tmp_path: Path, shelf: Shelf, case: str) -> None:
    change, says = PROMPTS[case]
    change(tmp_path / "prompts.txt")
    command = arguments("generate", shelf.converted, shelf, tmp_path / "out")
    refused(tmp_path, *command, "--prompts", tmp_path / "prompts.txt", "--vbench-names", "--samples", "1", says=says)


# --- scores and records ----------------------------------------------------------------------------------------------

SCORES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not readable JSON"),
    "cut": ('{"dynamic_degree": [0.5', "not readable JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "nothing": ("{}", "no .*scores|no .*_eval_results|no score"),
    "a number": ('{"dynamic_degree": 0.5}', "has no score"),
    "no score": ('{"dynamic_degree": []}', "has no score"),
    "a text": ('{"dynamic_degree": ["0.5"]}', "has no score"),
    "true": ('{"dynamic_degree": [true]}', "has no score"),
    "null": ('{"dynamic_degree": [null]}', "has no score"),
    "NaN": ('{"dynamic_degree": [NaN]}', "has no score"),
    "infinite": ('{"dynamic_degree": [1e999]}', "has no score"),
    "negative": ('{"dynamic_degree": [-0.1]}', "expected 0 to 1"),
    "percent": ('{"dynamic_degree": [50]}', "expected 0 to 1"),
    "huge": ('{"dynamic_degree": [1' + "0" * 400 + "]}", "expected 0 to 1|no score"),
    "twice": ('{"dynamic_degree": [0.5], "dynamic_degree": [0.6]}', "twice"),
    "an escape": ('{"\\u001b[2J": [2]}', "expected 0 to 1"),
    "deep": ('{"a": ' + "[" * 9999 + "]" * 9999 + "}", "nested too deeply"),
    "not UTF-8": (b'{"\xff": [0.5]}', "not UTF-8"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores(tmp_path: Path, shelf: Shelf, case: str) -> None:
    content, says = SCORES[case]
    path = tmp_path / "a_eval_results.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    command = arguments("evaluate", shelf.converted, shelf, tmp_path / "out")
    refused(tmp_path, *command, "--vbench", tmp_path, says=says)


@pytest.mark.parametrize("kind", [*SPECIAL, "x" * 5000], ids=range(7))
def test_scores_that_are_no_files(tmp_path: Path, shelf: Shelf, kind: str) -> None:
    path = tmp_path / ("a_eval_results.json" if kind in SPECIAL else kind)
    if kind in SPECIAL:
        special(path, kind)
    refused(tmp_path, *arguments("evaluate", shelf.converted, shelf, tmp_path / "out"), "--vbench", path)


NUMBERS = ("number", "half", "beyond 64 bits")
JUNK: dict[str, Any] = {
    "true": True,
    "number": -1,
    "beyond 64 bits": 10**30,
    "half": 1.5,
    "list": ["x"],
    "lists": [[]],
    "object": {"a": [None]},
    "text": "\x1b[2J\n<b>[/red]",
    "NaN": float("nan"),
}
# Junk that a field can hold: it is shown, or a number like any other.
FINE = {
    ("source", "object"),
    ("recipe", "object"),
    ("recipe.stage", "text"),
    ("written", "object"),
    *((f"layers.0.{name}", junk) for name in ("layer", "effective_rank") for junk in ("number", "beyond 64 bits")),
    *((f"layers.0.{name}", junk) for name in ("energy_at_kv_rank", "singular_values.0") for junk in NUMBERS),
}
SECTIONS = {
    "conversion.json": (
        *("source", "source.name", "source.subfolder", "source.state_key", "source.sha256", "recipe", "recipe.height"),
        *("layers", "layers.0", "layers.0.layer", "layers.0.effective_rank", "layers.0.energy_at_kv_rank"),
        *("layers.0.singular_values", "layers.0.singular_values.0"),
    ),
    "healing.json": ("recipe", "recipe.stage", "before", "written"),
}
RECORDS = [
    (name, field, junk)
    for name, fields in SECTIONS.items()
    for field in fields
    for junk in JUNK
    if (field, junk) not in FINE and not (junk == "text" and field.startswith("source."))
]


@pytest.mark.parametrize(("name", "field", "junk"), RECORDS)
def test_records(tmp_path: Path, shelf: Shelf, name: str, field: str, junk: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(shelf.converted, model)
    if field == "written":
        (model / name).write_text(json.dumps({"written": {}}))
    change_json(name, setting(field, JUNK[junk]))(model)
    command = "evaluate" if len(junk) % 2 else "heal"
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=name)


@pytest.mark.parametrize(
    "name", ["", "../dense", "/dev/zero", "pipe", "gone", "x" * 5000, "user/../repo", "user/repo", "a\nb"]
)
@pytest.mark.parametrize("command", ["evaluate", "heal"])
def test_recorded_teachers(tmp_path: Path, shelf: Shelf, name: str, command: str) -> None:
    """What a record calls the teacher is looked for, and nothing else happens; its hash is not that of any."""
    model = tmp_path / "model"
    shutil.copytree(shelf.converted, model)
    os.mkfifo(tmp_path / "pipe")
    change_json("conversion.json", setting("source.name", name))(model)
    found = arguments(command, model, shelf, tmp_path / "out")
    del found[found.index("--teacher") : found.index("--teacher") + 2]
    refused(tmp_path, *found, says="--teacher")


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("junk", JUNK)
def test_a_card_takes_records_as_far_as_they_go(tmp_path: Path, shelf: Shelf, name: str, junk: str) -> None:
    for field in ("recipe", "source", "layers"):
        model = tmp_path / field
        shutil.copytree(shelf.converted, model)
        change_json(name, setting(field, JUNK[junk]))(model)
        code, _, stderr = invoke(*arguments("push", model, shelf, tmp_path / "out"))
        assert code == 0, stderr


@pytest.mark.parametrize("command", ["push", "heal", "evaluate"])
@pytest.mark.parametrize("name", ["conversion.json", "healing.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 9999], ids=range(6))
def test_records_that_are_no_json(tmp_path: Path, shelf: Shelf, content: bytes, name: str, command: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(shelf.converted, model)
    (model / name).write_bytes(content)
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=name)


# --- what an earlier run left ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def left(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> Path:
    """Moments, a healing run's state and an unfinished video, as good runs leave them."""
    folder = tmp_path_factory.mktemp("left")
    code, _, stderr = invoke(*calibrated(shelf, folder / "out", folder / "moments"))
    assert code == 0, stderr
    code, _, stderr = invoke(*arguments("heal", shelf.converted, shelf, folder / "healed"))
    assert code == 0, stderr
    code, _, stderr = invoke(*arguments("generate", shelf.converted, shelf, folder / "video"))
    assert code == 0, stderr
    settings = json.loads((folder / "video" / "generation.json").read_text())["settings"]
    (folder / "video" / "progress.json").write_text(json.dumps({"frames": 0, "settings": settings}))
    return folder


def calibrated(shelf: Shelf, output: Path, moments: Path) -> list[str]:
    found = ["convert", shelf.dense, "-o", output, "--data", shelf.clips, "--clips", "2", "--moments", moments]
    return [str(part) for part in found]


def with_tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path)

    return spoil


MOMENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: os.truncate(p, p.stat().st_size - 1), "no moments of this model"),
    "empty": (lambda p: p.write_bytes(b""), "no moments of this model"),
    "text": (lambda p: p.write_text("moments of a layer"), "no moments of this model"),
    "a folder": (lambda p: special(p, "folder"), "no moments of this model"),
    "a pipe": (lambda p: special(p, "pipe"), "no moments of this model"),
    "NaN": (with_tensors(spoil_values("covariance", float("nan"))), "no moments of this model"),
    "no mean": (with_tensors(lambda t: t.pop("mean")), "no moments of this model"),
    "another width": (
        with_tensors(lambda t: t.update(mean=torch.zeros(25, dtype=torch.float64))),
        "no moments of this model",
    ),
    "single precision": (with_tensors(lambda t: t.update(mean=t["mean"].float())), "no moments of this model"),
    "more": (with_tensors(lambda t: t.update(more=torch.zeros(1))), "no moments of this model"),
    "flat": (with_tensors(lambda t: t.update(covariance=t["covariance"].flatten())), "no moments of this model"),
    "sensitivity alone": (with_tensors(lambda t: t.pop("output_power")), "no moments of this model"),
    "a link": (lambda p: p.rename(p.with_suffix(".other")) and p.symlink_to(p.with_suffix(".other")), "is a link"),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_moments(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = MOMENTS[case]
    shutil.copytree(left / "moments", tmp_path / "moments")
    spoil(tmp_path / "moments" / "layer-001.safetensors")
    message = refused(tmp_path, *calibrated(shelf, tmp_path / "out", tmp_path / "moments"), says=says)
    assert "layer-001" in message


RECORD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: p.write_text("{"), "calibration.json"),
    "a list": (lambda p: p.write_text("[]"), "calibration.json"),
    "deep": (lambda p: p.write_text('{"a": ' + "[" * 9999 + "]" * 9999 + "}"), "calibration.json"),
    "not UTF-8": (lambda p: p.write_bytes(b"\xff"), "calibration.json"),
    "a pipe": (lambda p: special(p, "pipe"), "calibration.json"),
    "a folder": (lambda p: special(p, "folder"), "calibration.json"),
    "gone": (lambda p: p.unlink(), "not a folder of moments"),
    "a link": (lambda p: p.rename(p.with_name("other.json")) and p.symlink_to("other.json"), "is a link"),
    "a link outside": (
        lambda p: p.rename(p.parent.parent / "other.json") and p.symlink_to("../other.json"),
        "is a link",
    ),
}


@pytest.mark.parametrize("case", RECORD)
def test_the_record_of_moments(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = RECORD[case]
    shutil.copytree(left / "moments", tmp_path / "moments")
    spoil(tmp_path / "moments" / "calibration.json")
    refused(tmp_path, *calibrated(shelf, tmp_path / "out", tmp_path / "moments"), says=says)


STATES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "text": (lambda p: p.write_text("hello"), "cannot be read"),
    "cut": (lambda p: os.truncate(p, p.stat().st_size // 2), "cannot be read"),
    "a list": (lambda p: torch.save([1], p), "no state of a healing run"),
    "an empty one": (lambda p: torch.save({}, p), "no state of a healing run"),
    "a tensor": (lambda p: torch.save(torch.ones(1), p), "no state of a healing run"),
    "code": (lambda p: torch.save({"x": torch.nn.Linear(1, 1)}, p), "cannot be read"),
    "a link": (lambda p: p.rename(p.with_name("other.pt")) and p.symlink_to("other.pt"), "is a link"),
}


def with_state(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return spoil


STATES |= {
    f"{name} {i}": (with_state(**{name: value}), "no state of a healing run|another")
    for name, values in {
        "recipe": (None, "", "{", "[]", 7),
        "identity": (None, [], {"data": 7}),
        "step": (None, "1", -1),
        "best": (None, [], [1], ["a", "b"]),
        "curves": (None, {}, {"losses": 7, "validation": [], "critic": []}),
        "parts": (None, {}, {"student": {}}, {"student": {"weights": {}, "average": [], "optimizer": {}}}),
    }.items()
    for i, value in enumerate(values)
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_healing(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = STATES[case]
    shutil.copytree(left / "healed.state", tmp_path / "out.state")
    spoil(tmp_path / "out.state" / "last.pt")
    refused(tmp_path, *arguments("heal", shelf.converted, shelf, tmp_path / "out"), says=says)


def note(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return change_json("progress.json", change)


VIDEOS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no notes": (
        lambda f: [(f / name).unlink() for name in ("progress.json", "generation.json")],
        "an unfinished video with other settings",
    ),
    "a note cut": (lambda f: (f / "progress.json").write_text("{"), "an unfinished video with other settings"),
    "a note that is a list": (lambda f: (f / "progress.json").write_text("[]"), "with other settings"),
    "a note that is a pipe": (lambda f: special(f / "progress.json", "pipe"), "with other settings"),
    "other settings": (note(setting("settings", {})), "with other settings"),
    **{
        f"frames {value}": (note(setting("frames", value)), "damaged unfinished video")
        for value in (-1, 4, HUGE, 1.5, True, None, "1", [])
    },
    "no latents": (lambda f: (f / "latents.safetensors").unlink(), "damaged unfinished video"),
    "latents cut": (lambda f: os.truncate(f / "latents.safetensors", 200), "damaged unfinished video"),
    "latents of text": (lambda f: (f / "latents.safetensors").write_bytes(b"x" * 9999), "damaged unfinished video"),
    "a link": (
        lambda f: (f / "latents.safetensors").rename(f / "x") and (f / "latents.safetensors").symlink_to("x"),
        "is a link",
    ),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_unfinished_videos(tmp_path: Path, shelf: Shelf, left: Path, case: str) -> None:
    spoil, says = VIDEOS[case]
    shutil.copytree(left / "video", tmp_path / ".out.partial")
    spoil(tmp_path / ".out.partial")
    refused(tmp_path, *arguments("generate", shelf.converted, shelf, tmp_path / "out"), says=says)


# --- anything --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    text=st.text("abis: {}[]&*!|>-'\"#,?%@\n\t0.~", max_size=40),
    known=st.sampled_from(("", "init: ", "kv_rank: ", "layers: ")),
)
def test_any_yaml(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf, text: str, known: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "yaml"
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(known + text)
    command = ("convert", shelf.dense, "--recipe", folder / "recipe.yaml", "--dry-run")
    before = tree(folder)
    code, _, stderr = invoke(*command)
    if code != 0:
        check_refusal(code, stderr)
    assert tree(folder) == before
