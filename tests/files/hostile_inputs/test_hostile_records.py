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
from command_line import invoke
from hostile import Shelf, arguments, change_json, packed, refused, setting, special
from hostile_inputs_cases import HUGE, SPECIAL
from safetensors.torch import save_file

pytestmark = pytest.mark.timeout(60)
EMBEDDINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "text": (lambda p: p.write_text("a cat"), "truncated"),
    "cut": (lambda p: os.truncate(p, 120), "promises|truncated"),
    "a pickle": (
        lambda p: torch.save({"context": torch.zeros(1, 3, 10)}, p),
        r"a PyTorch file \(a pickle\) by its contents; rename it to input\.pt",
    ),
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
