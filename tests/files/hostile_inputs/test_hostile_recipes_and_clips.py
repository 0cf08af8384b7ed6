"""Broken and hostile recipes, clips, embeddings, prompts, scores and records: refused like broken model files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Shelf, arguments, packed, refused, special
from hostile_inputs_cases import FIELDS, SPECIAL, Tensors, spoil_values
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.timeout(60)
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
