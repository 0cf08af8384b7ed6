"""What the tests of hostile input share: a few good files to spoil, and what every refusal must be like."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command_line import invoke
from safetensors.torch import load_file, save_file

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

GEOMETRY = WanConfig(
    dim=24, num_heads=2, num_layers=2, ffn_dim=20, in_dim=4, out_dim=4, freq_dim=8, text_dim=10, text_len=6
)
# One case spoils files in a folder.
Spoil = Callable[[Path], Any]


@dataclass(frozen=True)
class Shelf:
    """Good inputs: a dense model folder, what it becomes, text embeddings, and a folder of clips."""

    dense: Path
    converted: Path
    embeddings: Path
    clips: Path


def make_shelf(folder: Path) -> Shelf:
    """Write all of them below `folder`."""
    layer = MLALayer(kv_lora_rank=5, qk_nope_head_dim=8, v_head_dim=7, rope_components=((0, 1), (4, 1)))
    mla = MLAConfig(q_lora_rank=9, key_norm="latent", softmax_scale=0.3, layers=(layer, None))
    latent = replace(GEOMETRY, mla=mla, streaming=StreamingConfig())
    dense = _model(folder / "dense", GEOMETRY, {})
    converted = _model(folder / "converted", latent, {"streaming": asdict(StreamingConfig()), "mla": mla.to_json()})
    records = {
        "conversion.json": {
            "mlaconvert": "0.1.0",
            "source": {"name": "dense", "subfolder": "", "state_key": None, "sha256": "0" * 64, "files": []},
            "recipe": asdict(ConvertRecipe(init="svd")),
            "losses": {"teacher": 0.5, "refitted": 0.6},
            "layers": [
                {"layer": 0, "effective_rank": 2, "energy_at_kv_rank": 0.8, "errors": {}, "singular_values": [2.0, 1.0]}
            ],
        },
        "healing.json": {"recipe": {"stage": "distill", "steps": 3}, "teacher": "dense", "before": []},
        "evaluation.json": {"models": [{"name": "converted"}], "teacher": {}, "data": {}},
    }
    for name, data in records.items():
        (converted / name).write_text(json.dumps(data))
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    clips = folder / "clips"
    clips.mkdir()
    save_file({"latents": noise(5, 4, 3, 4, 6), "context": noise(5, 3, 10)}, clips / "a.safetensors")
    save_file({"context": noise(1, 2, 10)}, clips / "null_context.safetensors")
    embeddings = folder / "embeddings.safetensors"
    save_file({"context": noise(1, 3, 10), "null_context": noise(1, 2, 10)}, embeddings)
    return Shelf(dense, converted, embeddings, clips)


def _model(folder: Path, geometry: WanConfig, sections: dict[str, Any]) -> Path:
    """A model folder with random weights."""
    family, generator = WanFamily(), torch.Generator().manual_seed(0)
    shapes = family.expected_shapes(geometry)
    folder.mkdir()
    save_file(
        {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / WEIGHTS_NAME
    )
    (folder / CONFIG_NAME).write_text(json.dumps(family.raw_config(geometry, "native") | sections))
    return folder


def arguments(command: str, model: Path | str, shelf: Shelf, output: Path) -> list[str]:
    """A command line that would work if `model` were good."""
    found: dict[str, list[Path | str]] = {
        "analyze": ["analyze", model],
        "convert": ["convert", model, "-o", output, "--init", "svd"],
        "generate": [
            *("generate", model, "-o", output, "--embeddings", shelf.embeddings),
            *("--frames", "3", "--height", "32", "--width", "48", "--format", "none"),
        ],
        "heal": [
            *("heal", model, "-o", output, "--stage", "teacher-forcing", "--steps", "1", "--batch", "1"),
            *("--data", shelf.clips, "--teacher", shelf.dense, "--tracker", "none", "--cpu"),
        ],
        "evaluate": ["evaluate", model, "--teacher", shelf.dense, "--data", shelf.clips, "--frames", "0"],
        "push": ["push", model, "somebody/model", "--dry-run"],
    }
    return [str(part) for part in found[command]]


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below `folder`: kinds and permissions, and of files their size, time and target."""
    found: dict[str, tuple[Any, ...]] = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            state = path.lstat()
            link = path.readlink() if path.is_symlink() else None
            found[str(path)] = (
                (state.st_mode, link) if name in folders else (state.st_mode, state.st_size, state.st_mtime_ns, link)
            )
    return found


def refused(folder: Path, *command: Path | str, says: str = "") -> str:
    """Run a command that must be refused: exit code 2, one plain message, and nothing changed below `folder`.

    Returns the message. `says` is a regular expression that it must match.
    """
    before = tree(folder)
    code, _, stderr = invoke(*command)
    check_refusal(code, stderr, says)
    assert tree(folder) == before
    return stderr


def check_refusal(code: int, stderr: str, says: str = "") -> None:
    """The message is the last thing on stderr, one line that a terminal only shows, and no traceback."""
    lines = stderr.rstrip("\n").split("\n")
    assert code == 2, stderr[-2000:]
    assert lines[-1].startswith("error: "), stderr[-2000:]
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in stderr
    assert "unexpected" not in lines[-1].partition(":")[2][:12]
    assert len(lines[-1]) <= 1200
    assert all(line.isprintable() for line in lines), "control characters"
    assert re.search(says, lines[-1]), f"{says!r} is not in {lines[-1]!r}"


# --- safetensors by hand ---------------------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a good safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header (plain data, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def change_header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Spoil the header of a model folder's weights, or put another in its place, and leave the data."""

    def spoil(folder: Path) -> None:
        header, data = parts(folder / WEIGHTS_NAME)
        changed = change(header)
        (folder / WEIGHTS_NAME).write_bytes(packed(changed if isinstance(changed, dict) else header, data))

    return spoil


def change_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Spoil the tensors of a model folder, and write a file that is right in itself."""

    def spoil(folder: Path) -> None:
        state = dict(load_file(folder / WEIGHTS_NAME))
        change(state)
        save_file(state, folder / WEIGHTS_NAME)

    return spoil


def change_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Spoil a JSON file of a folder."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        changed = change(data)
        (folder / name).write_text(json.dumps(changed if isinstance(changed, dict) else data))

    return spoil


def write(name: str, content: bytes | str) -> Spoil:
    """Put these bytes in place of a file of the folder."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def instead(name: str, kind: str) -> Spoil:
    """Put something in a file's place that is no file."""
    return lambda folder: special(folder / name, kind)


def special(path: Path, kind: str) -> None:
    """A "loop" of links, a link to "nowhere", a "pipe", a "device" or a "folder", or nothing ("gone")."""
    path.unlink(missing_ok=True)
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("gone")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()


def setting(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set `field` ("mla.layers.0.v_head_dim") of nested plain data."""

    def change(data: dict[str, Any]) -> None:
        *path, last = [int(part) if part.isdecimal() else part for part in field.split(".")]
        inner: Any = data
        for part in path:
            inner = inner[part]
        inner[last] = value

    return change


Cases = Mapping[str, tuple[Spoil, str]]
