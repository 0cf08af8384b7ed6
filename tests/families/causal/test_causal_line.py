"""How a model sees time: what the codebases' own fields mean, what is refused, and what is said when none states it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_cases import ASSUMED, CAUSAL, SaveFolder, State, sees
from command_line import invoke
from hostile import refused
from safetensors.torch import save_file

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.run import heal
from mlaconvert.listener import Listener


@pytest.fixture
def bare(golden_state: State, tmp_path: Path) -> Path:
    """A streaming student as it is passed on: weights of heads of 128 under a prefix, and no config.json."""
    from mlaconvert.config.geometry import WanConfig
    from mlaconvert.families.wan import WanFamily

    generator = torch.Generator().manual_seed(0)
    config = WanConfig(dim=256, num_heads=2, num_layers=1, ffn_dim=40, freq_dim=16, text_dim=24)
    state = {
        f"model.{name}": 0.06 * torch.randn(shape, generator=generator)
        for name, shape in WanFamily().expected_shapes(config).items()
    }
    save_file(state, tmp_path / "student.safetensors")
    save_file({"context": torch.randn(1, 4, 24, generator=generator)}, tmp_path / "text.safetensors")
    return tmp_path / "student.safetensors"


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "assumed" in line]


def written(folder: Path) -> tuple[dict[str, Any] | None, Any]:
    data = json.loads((folder / CONFIG_NAME).read_text())
    return data["streaming"], data.get("few_step")


def test_a_bare_file_opens_and_says_what_is_assumed(bare: Path, tmp_path: Path) -> None:
    code, _, stderr = invoke("convert", bare, "-o", tmp_path / "out", "--init", "svd")
    assert code == 0
    (line,) = said(stderr)
    assert line.startswith(f"{ASSUMED}a bidirectional model, many steps; to set it: ")
    assert all(f"--{name}-frames" in line for name in ("chunk", "window", "sink"))
    assert "--positions" in line
    assert "--few-step" in line
    assert "self-forcing-1.3b" in line
    assert written(tmp_path / "out") == (None, None)
    (line,) = said(invoke("analyze", bare)[2])
    assert line == (
        f"{ASSUMED}a bidirectional model, many steps; to set it: "
        "`streaming` and `few_step` in a config.json beside the weights"
    )
    size = ("--frames", "3", "--height", "32", "--width", "32", "--embeddings", tmp_path / "text.safetensors")
    (line,) = said(invoke("generate", bare, "-o", tmp_path / "video", *size, "--steps", "1")[2])
    assert "a bidirectional model, a window of 7 latent frames, chunks of 3, a sink of 1" in line


def test_a_model_whose_files_say_that_it_does_not_stream_is_not_streamed_in_silence(bare: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert invoke("convert", bare, "-o", whole, "--init", "svd", "--bidirectional", "--many-step")[0] == 0
    size = ("--frames", "3", "--height", "32", "--width", "32", "--embeddings", tmp_path / "text.safetensors")
    for options, lines in (((), 1), (("--window-frames", "6"), 0)):
        code, _, stderr = invoke("generate", whole, "-o", tmp_path / f"video {lines}", *size, "--steps", "1", *options)
        assert code == 0, stderr
        assert stderr.count("not made to stream; it is run in chunks of 3 in a window of 7 latent frames") == lines


@pytest.mark.parametrize(
    ("options", "streaming", "few_step", "left"),
    [
        (["--recipe", "self-forcing-1.3b", "--kv-rank", "20"], sees(3, 21, 0), True, None),
        (["--bidirectional", "--many-step"], None, None, None),
        (["--bidirectional"], None, None, "many steps"),
        (["--bidirectional", "--few-step"], None, True, None),
        (
            [
                "--chunk-frames",
                "2",
                "--window-frames",
                "9",
                "--sink-frames",
                "1",
                "--positions",
                "window",
                "--few-step",
            ],
            *(sees(2, 9, 1, "window"), True, None),
        ),
        (
            ["--window-frames", "12", "--sink-frames", "3", "--few-step"],
            *(sees(3, 12, 3), True, "chunks of 3, positions counted from the start"),
        ),
        (
            ["--recipe", "self-forcing-1.3b", "--kv-rank", "20", "--window-frames", "12", "--sink-frames", "3"],
            *(sees(3, 12, 3), True, None),
        ),
    ],
)
def test_options_and_recipes_set_what_a_bare_file_leaves_open(
    bare: Path,
    tmp_path: Path,
    options: list[str],
    streaming: StreamingConfig | None,
    few_step: bool | None,
    left: str | None,
) -> None:
    code, _, stderr = invoke("convert", bare, "-o", tmp_path / "out", *options, "--init", "svd")
    assert code == 0, stderr
    lines = said(stderr)
    assert [line.removeprefix(ASSUMED).partition("; ")[0] for line in lines] == ([left] if left else [])
    section, few = written(tmp_path / "out")
    assert (section and StreamingConfig(**section), few) == (streaming, few_step)
    with open_checkpoint(tmp_path / "out") as opened:  # all of it is stated now
        assert opened.timing.assumed == frozenset()
        assert opened.config.few_step == bool(few_step)


def test_options_that_exclude_each_other(bare: Path, tmp_path: Path) -> None:
    convert_ = ("convert", bare, "-o", tmp_path / "out", "--init", "svd")
    refused(tmp_path, *convert_, "--bidirectional", "--window-frames", "9", says="bidirectional and window_frames excl")
    refused(tmp_path, *convert_, "--positions", "x", says="options: positions is 'x': give window or absolute")
    refused(tmp_path, *convert_, "--window-frames", "2", says="window_frames is 2")
    generate = ("generate", bare, "-o", tmp_path / "video", "--embeddings", tmp_path / "text.safetensors")
    refused(tmp_path, *generate, "--few-step", "--steps", "3", says="few_step and steps")
    refused(tmp_path, *generate, "--many-step", "--timesteps", "900", says="timesteps .few-step. and many steps")
    refused(tmp_path, *generate, "--positions", "x", says="positions is 'x': give window or absolute")


def test_a_student_generates_in_four_steps_and_says_so(bare: Path, tmp_path: Path) -> None:
    """Converted with the recipe it is known; a bare file needs the option."""
    assert (
        invoke("convert", bare, "-o", tmp_path / "out", "--init", "svd", "--window-frames", "9", "--few-step")[0] == 0
    )
    size = ("--frames", "3", "--height", "32", "--width", "32", "--embeddings", tmp_path / "text.safetensors")
    window = ("--chunk-frames", "3", "--window-frames", "9", "--sink-frames", "0", "--positions", "absolute")
    for model, options in ((tmp_path / "out", ()), (bare, ("--few-step", *window))):
        code, _, stderr = invoke("generate", model, "-o", tmp_path / f"video of {model.name}", *size, *options)
        assert code == 0, stderr
        assert "a few-step student: timesteps 1000, 750, 500, 250, warped by shift 5\n" in stderr
        assert not said(stderr)
        settings = json.loads((tmp_path / f"video of {model.name}" / "generation.json").read_text())["settings"]
        # 1000 * 5 s / (1 + 4 s) for s of 1, 3/4, 1/2 and 1/4
        assert settings["sampler"]["timesteps"] == pytest.approx([1000, 3750 / 4, 2500 / 3, 1250 / 2])
        assert settings["streaming"] == {
            **{"chunk_frames": 3, "window_frames": 9, "sink_frames": 0, "positions": "absolute"}
        }


def test_the_teacher_of_a_bare_student_is_as_the_recipe_took_it(bare: Path, tmp_path: Path) -> None:
    """And one that nothing is known of is said to be assumed when a student is healed."""
    convert(bare, tmp_path / "few", ConvertRecipe(init="svd", kv_rank=40, streaming=sees(1, 3, 0), few_step=True))
    with open_teacher(str(tmp_path / "few"), json.loads((tmp_path / "few" / "conversion.json").read_text())) as teacher:
        assert (teacher.config.streaming, teacher.config.few_step) == (sees(1, 3, 0), True)
    convert(bare, tmp_path / "many", ConvertRecipe(init="svd", kv_rank=40, streaming=sees(1, 3, 0)))
    lines: list[str] = []
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "clips").mkdir()
    clips = {"latents": torch.randn(5, 16, 3, 4, 6, generator=generator), "context": torch.randn(5, 2, 24)}
    save_file(clips, tmp_path / "clips" / "a.safetensors")
    recipe = HealRecipe(stage="distill", steps=1, batch=1, validation_clips=1, precision="float32", tracker="none")
    heal(
        tmp_path / "many",
        tmp_path / "healed",
        recipe,
        listener=Listener(say=lines.append),
        data=str(tmp_path / "clips"),
        cpu=True,
    )
    assert [line.partition(";")[0] for line in lines if "assumed" in line] == [
        f"teacher: {ASSUMED}a bidirectional model, many steps"
    ]


def test_a_sink_and_absolute_positions_are_calibrated(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    """LongLive's are both; the default way to convert takes them, and says what its statistics leave out."""
    fields = {"local_attn_size": 5, "sink_size": 1, "num_frame_per_block": 2, "few_step": True}
    source = save_folder(golden_state, golden_config | CAUSAL | fields)
    recipe, lines = ConvertRecipe(clips=2, height=32, width=48, kv_rank=30), list[str]()
    convert(source, tmp_path / "out", recipe, listener=Listener(say=lines.append))
    assert lines == ["calibrated on windows whose positions count from the sink; the model counts from the start"]
    assert written(tmp_path / "out") == (
        {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1, "positions": "absolute"},
        True,
    )


def test_both_experts_are_read_and_said_once(
    golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        save_folder(golden_state, golden_config | CAUSAL | {"local_attn_size": 8, "sink_size": 1}, f"pair/{name}")
    code, _, stderr = invoke("convert", tmp_path / "pair", "-o", tmp_path / "out", "--init", "svd")
    assert (code, len(said(stderr))) == (0, 1)
    assert all(
        written(tmp_path / "out" / name)[0] == {"chunk_frames": 3, "window_frames": 8, "sink_frames": 1}
        | {"positions": "absolute"}
        for name in ("high_noise_model", "low_noise_model")
    )  # fmt: skip
