"""The walkthroughs in docs/ run as they are printed, on small checkpoints in the published layouts.

Their Hub ids lie on a Hub of this test's own: one layer of width 256 in place of thirty of 1536, a text encoder and a
VAE of random weights. Put in place of what is too large, or not here:

| shown | run |
|---|---|
| a shipped recipe | the same with what `SMALL_RECIPES` cuts down |
| a size or number, named or by default | that of `SMALL_OPTIONS`; where it has to be shown, of `IF_SHOWN` |
| `--device cuda` | `--device cpu` |
| `accelerate launch ... -m mlaconvert` | `mlaconvert`; accelerate parses the launcher's own options |
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
import wan_base
import yaml
from command_line import invoke
from documents import page, shell_lines
from hub_server import Blob, Hub
from safetensors.torch import save
from support import randomize

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.shipped import recipe_folder
from mlaconvert.model.wan import WanModel

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONFIG = WanConfig(dim=256, num_heads=2, num_layers=1, ffn_dim=40, freq_dim=16, text_dim=wan_base.TEXT_DIM)
BASE = "Wan-AI/Wan2.1-T2V-1.3B"
STREAMING = {"chunk_frames": 1, "window_frames": 3, "sink_frames": 0}
# By the folder that recipes lie in; a field that a recipe does not name stays out of it, but for those in `ADDED`.
ADDED = ("clips", "frames", "validation_clips")
SMALL_RECIPES: dict[str, dict[str, Any]] = {
    "": {"q_rank": 100, "height": 32, "width": 48, "frames": 3, "clips": 3, "streaming": STREAMING},
    "heal": {
        "steps": 1,
        "frames": 2,
        "validation_clips": 1,
        "critic_steps": 1,
        "precision": "float32",
        "gradient_checkpointing": False,
    },
    "sweep": {"kv_ranks": [20], "rope_dims": [32], "nope_dims": [96]},
}
# Given to a command in any case.
SMALL_OPTIONS = {
    "encode": {"--height": "32", "--width": "48", "--frames": "3", "--device": "cpu"},
    "convert": {"--device": "cpu"},
    "evaluate": {"--device": "cpu", "--clips": "2"},
    "generate": {"--device": "cpu", "--height": "32", "--width": "48", "--seconds": "0.5"},
    "sweep": {"--device": "cpu"},
    "heal": {"--batch": "1"},
}
IF_SHOWN = {
    ("generate", "--steps"): "2",
    ("generate", "--switch"): "0.25",
    ("evaluate", "--frames"): "4",
    ("sweep", "--kv-ranks"): "20",
    ("sweep", "--clips"): "3",
}


def state(seed: int) -> dict[str, torch.Tensor]:
    model = WanModel(CONFIG)
    randomize(model, seed)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def pickled(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()


def folder_blobs(folder: Path) -> dict[str, Blob]:
    return {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix == ".safetensors")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blob]:
    """Text encoder, tokenizer and VAE in diffusers' layout."""
    return folder_blobs(wan_base.save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def published(hub: Hub, components: dict[str, Blob]) -> Hub:
    """A Hub with what the walkthroughs read from there."""
    raw = json.dumps(WanFamily().raw_config(CONFIG) | {"_class_name": "WanModel"}).encode()
    repo = hub.create(BASE, card={"license": "apache-2.0"})
    repo.commit({WEIGHTS_NAME: Blob(save(state(1)), True), CONFIG_NAME: Blob(raw, False)})
    hub.create(f"{BASE}-Diffusers").commit(components)
    wrapped = {"generator_ema": {f"model.{name}": tensor for name, tensor in state(2).items()}}
    hub.create("gdhe17/Self-Forcing").commit({"checkpoints/self_forcing_dmd.pt": Blob(pickled(wrapped), True)})
    return hub


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder: videos with captions, and a base with its LoRA."""
    folder = tmp_path / "place"
    (folder / "videos").mkdir(parents=True)
    for number, caption in enumerate(("a cat walks", "the red sea", "a dog in the snow")):
        path = folder / "videos" / f"{number}.mp4"
        writer = imageio_ffmpeg.write_frames(str(path), (64, 48), fps=16, macro_block_size=2, ffmpeg_log_level="error")
        writer.send(None)
        for frame in range(40):
            writer.send(bytes([(40 * number + 5 * frame) % 256]) * (64 * 48 * 3))
        writer.close()
        path.with_suffix(".txt").write_text(caption)
    torch.save(
        {"generator": {f"model.{name}": tensor for name, tensor in state(3).items()}}, folder / "longlive_base.pt"
    )
    query = "base_model.model.blocks.0.self_attn.q"
    lora = {f"{query}.lora_A.weight": torch.randn(4, 256) * 0.1, f"{query}.lora_B.weight": torch.randn(256, 4) * 0.1}
    torch.save({"generator_lora": lora}, folder / "lora.pt")
    monkeypatch.chdir(folder)
    return folder


def small_recipe(name: str, kind: str, folder: Path) -> str:
    """A cut-down copy of a shipped recipe in `folder`, under its own name."""
    source = recipe_folder() / kind / f"{name}.yaml"
    fields = yaml.safe_load(source.read_text())
    small = {
        key: value
        for key, value in SMALL_RECIPES[kind].items()
        if key in (*fields, *ADDED) and fields.get(key) != "none"
    }
    if "streaming" in small:
        small["streaming"] = fields["streaming"] | STREAMING
    fields |= small
    if "convert" in fields:
        fields["convert"] = small_recipe(fields["convert"], "", folder)
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}-{name}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def substituted(words: list[str], folder: Path) -> list[str]:
    """The command that stands for a shown one. Fails for a program that this test does not know."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        parsed, unknown = launch_command_parser().parse_known_args(words[2:])
        assert (parsed.module, parsed.training_script, unknown) == (True, "mlaconvert", [])
        words = ["mlaconvert", *parsed.training_script_args]
    program, command, *rest = words
    assert program == "mlaconvert", f"{program}: how is this tested?"
    always = dict(SMALL_OPTIONS.get(command, {}))
    for i, word in enumerate(rest[:-1]):
        if word in ("--recipe", "--convert"):
            kind = command if word == "--recipe" and command in ("heal", "sweep") else ""
            rest[i + 1] = small_recipe(rest[i + 1], kind, folder)
        elif word in always:
            rest[i + 1] = always.pop(word)
        elif (command, word) in IF_SHOWN and rest[i + 1] != "0":
            rest[i + 1] = IF_SHOWN[command, word]
    return [command, *rest, *(word for option in always.items() for word in option)]


def run(words: list[str], folder: Path) -> str:
    arguments = substituted(words, folder)
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{' '.join(arguments)}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_from_wan21_to_a_published_model(published: Hub, place: Path, tmp_path: Path) -> None:
    """wan21.md, and publish.md with the model that it leaves."""
    for words in shell_lines(page("docs/walkthroughs/wan21.md")):
        run(words, tmp_path / "recipes")
    made = {path.name for path in place.iterdir()}
    assert made >= {"spectra.png", "clips", "wan-mla", "wan-svd", "report.html", "budgets", "splits", "fox.mp4"}
    for name in ("budgets", "splits", "calibrated"):
        assert (place / name / "sweep.png").is_file()
    for words in shell_lines(page("docs/walkthroughs/publish.md")):
        run(words, tmp_path / "recipes")
    files = published.repos["alice/wan-mla"].files
    assert set(files) >= {WEIGHTS_NAME, CONFIG_NAME, "conversion.json", "evaluation.json", "README.md"}
    assert f"base_model: {BASE}" in files["README.md"].data.decode()


@pytest.mark.slow
def test_from_a_self_forcing_checkpoint_to_a_minute_and_a_healed_model(
    published: Hub, place: Path, tmp_path: Path
) -> None:
    for words in shell_lines(page("docs/walkthroughs/self_forcing.md")):
        run(words, tmp_path / "recipes")
    (lora,) = json.loads((place / "longlive-mla" / "conversion.json").read_text())["source"]["loras"]
    assert lora["name"] == "lora.pt"
    for name in ("dense", "waves", "minute", "storm", "healed"):
        assert (place / f"{name}.mp4").stat().st_size > 0
    seen = {name: json.loads((place / name / CONFIG_NAME).read_text())["streaming"] for name in ("sf-mla", "sf-long")}
    assert [seen[name]["positions"] for name in ("sf-mla", "sf-long")] == ["absolute", "window"]
    assert (seen["sf-long"]["window_frames"], seen["sf-long"]["sink_frames"]) == (21, 3)
    healed = {name: json.loads((place / name / "healing.json").read_text()) for name in ("sf-healed", "sf-dmd")}
    assert [record["recipe"]["stage"] for record in healed.values()] == ["distill", "dmd"]
    assert json.loads((place / "sf-healed" / CONFIG_NAME).read_text())["streaming"] == seen["sf-mla"]


@pytest.mark.slow
def test_healing_on_one_and_on_eight_gpus(published: Hub, place: Path, tmp_path: Path) -> None:
    for words in shell_lines(page("docs/walkthroughs/heal.md")):
        run(words, tmp_path / "recipes")
    stages = [json.loads((place / name / "healing.json").read_text())["recipe"]["stage"]
              for name in ("wan-healed", "stage1", "stage2", "stage3", "wan-sharded")]  # fmt: skip
    assert stages == ["distill", "teacher-forcing", "consistency", "dmd", "distill"]
