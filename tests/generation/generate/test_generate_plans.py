"""Generating onto the disk: what is written, what survives an interruption, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from generate_cases import CAPTIONS, SHORT, invoke, needs_mp4, succeed
from PIL import Image
from safetensors.torch import save_file

from mlaconvert.clips.tiny import clips as clips_module
from mlaconvert.clips.tiny.clips import sample_scenes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.generation.movies import save_movie
from mlaconvert.generation.plan import caption_tokens, plan_generation
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.run import generate
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler


def test_captions_are_those_of_the_drawn_clips() -> None:
    scenes = sample_scenes(20, 9)
    for tokens in scenes.tokens():
        words = clips_module.VOCABULARY
        size, color, shape, heading, background = (words[int(token)] for token in tokens)
        caption = f"{size}  {color} {shape.upper()} {heading},{background}"
        assert torch.equal(caption_tokens(caption)[0], tokens)
    assert caption_tokens("").tolist() == caption_tokens("nothing").tolist() == [[0] * 5]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("large red disc", "word 4 is \\(missing\\); give one of up, down, left, right"),
        ("large red disc up, plaid", "word 5 is plaid; give one of sky, dawn, glow, stripes"),
        ("red large disc up, sky", "word 1 is red"),
        ("large red disc up, sky sky", "sky is one word too many"),
    ],
)
def test_wrong_captions_are_refused(caption: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        caption_tokens(caption)


def test_defaults_come_from_the_model(golden: Path, tmp_path: Path) -> None:
    tiny = plan_generation(Generation(), load_model("tiny").config)
    assert (tiny.frames, tiny.size, tiny.stride, tiny.sampler.renoise) == (60, (24, 32), 1, False)
    save_file({"context": torch.zeros(3, 2, 40)}, tmp_path / "text.safetensors")
    config = load_model(golden).config
    wan = plan_generation(Generation(embeddings=tmp_path / "text.safetensors"), config)
    assert (wan.frames, wan.size, wan.stride) == (21, (60, 104), 4)
    assert wan.sampler == Sampler.many_step(50)
    student = plan_generation(
        Generation(embeddings=tmp_path / "text.safetensors"), dataclasses.replace(config, few_step=True)
    )
    assert student.sampler == Sampler.few_step()
    both = {"context": torch.zeros(1, 2, 40), "null_context": torch.zeros(1, 2, 40)}
    save_file(both, tmp_path / "guided.safetensors")
    guided = plan_generation(Generation(embeddings=tmp_path / "guided.safetensors"), config)
    assert guided.sampler == Sampler.many_step(50, guidance=5)
    assert [start for start, _ in wan.schedule] == [0, 7, 14]
    minute = plan_generation(Generation(embeddings=tmp_path / "text.safetensors", seconds=60), config)
    assert minute.frames == 240
    assert minute.streaming == StreamingConfig()


def test_movies_show_the_frames(tmp_path: Path) -> None:
    frames = list((torch.rand(4, 3, 12, 16) * 2 - 1).unbind(0))
    save_movie(frames, tmp_path / "movie.gif")
    with Image.open(tmp_path / "movie.gif") as movie:
        assert movie.size == (16 * 4, 12 * 4)
        assert movie.info["duration"] == 60
    with pytest.raises(InputError, match=r"ends in \.gif or \.mp4"):
        save_movie(frames, tmp_path / "movie.avi")
    assert [path.name for path in tmp_path.iterdir()] == ["movie.gif"]


@needs_mp4
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the decoder leaves its pipes open
def test_mp4_holds_the_pixels(tmp_path: Path) -> None:
    """Read back by the decoder: as many frames, and their colours but for compression."""
    import imageio_ffmpeg

    frames = [torch.full((3, 24, 32), -1.0) for _ in range(5)]
    for i, frame in enumerate(frames):
        frame[0] = i / 2 - 1  # from black to red
    save_movie(frames, tmp_path / "movie.mp4")
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "movie.mp4"))
    meta = next(reader)
    assert (meta["size"], round(meta["fps"])) == ((128, 96), 16)
    pixels = [torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(96, 128, 3).float() for raw in reader]
    assert len(pixels) == 5
    for i, image in enumerate(pixels):
        assert float((image.mean((0, 1)) - torch.tensor([255 * i / 4, 0, 0])).abs().max()) < 12


def test_without_an_encoder_gif_is_written_and_mp4_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("run", "output", "movies", "vbench_names"):
        monkeypatch.setattr(f"mlaconvert.generation.{room}.can_write_mp4", lambda: False)
    report = generate("tiny", tmp_path / "out", dataclasses.replace(SHORT, frames=3))
    assert "video-0.gif" in report.files
    for call in (
        lambda: generate("tiny", tmp_path / "other", SHORT, movie="mp4"),
        lambda: generate_for_vbench("tiny", tmp_path / "other", CAPTIONS),
        lambda: save_movie([torch.zeros(3, 4, 4)], tmp_path / "movie.mp4"),
    ):
        with pytest.raises(InputError, match=r"pip install 'mlaconvert\[video\]'"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_says_how_fast_it_was(tmp_path: Path) -> None:
    flags = ("--seconds", 0.4, "--steps", 1, "--format", "gif", "--prompt", CAPTIONS[0], "--prompt", CAPTIONS[1])
    result = succeed("tiny", "-o", tmp_path / "out", *flags)
    assert "6 latent frames (0.4 s of video) in" in result.stderr
    assert "frames/s, cache 5.91 MiB" in result.stderr
    assert result.stdout == ""
    data = json.loads(succeed("tiny", "-o", tmp_path / "out", *flags, "--overwrite", "--json").stdout)
    assert data["settings"]["prompts_begin"] == [0, 3]
    assert json.loads((tmp_path / "out" / "generation.json").read_text()) == data


def test_every_option_says_its_default() -> None:
    import inspect

    from mlaconvert import cli

    for command in ("generate", "bench"):
        for name, parameter in inspect.signature(getattr(cli, command), eval_str=True).parameters.items():
            info = parameter.annotation.__metadata__[0]
            if parameter.default is None:
                assert "Default: " in info.help, name
            elif parameter.default is not inspect.Parameter.empty and parameter.default is not False:
                assert info.show_default, name
            assert "[" not in info.help, name  # would be read as markup


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "3", "--seconds", "1"], "frames and seconds both say how long"),
        (["--frames", "0"], "frames is 0"),
        (["--seconds", "-1"], "seconds is -1"),
        (["--steps", "4", "--timesteps", "1000"], "exclude each other"),
        (["--timesteps", "500,1000"], "must descend"),
        (["--timesteps", "a,b"], "--timesteps is 'a,b'"),
        (["--prompt", "small"], "word 2 is (missing)"),
        (["--prompt", CAPTIONS[0], "--switch", "1"], "1 prompts switch 0 times, not 1"),
        (
            ["--prompt", CAPTIONS[0], "--prompt", CAPTIONS[1], "--switch", "99"],
            "would begin at latent frames [0, 1584]",
        ),
        (["--height", "25"], "height is 25 pixels: give a multiple of 4"),
        (["--window-frames", "3"], "window_frames is 3"),
        (["--format", "avi"], "--format is 'avi'"),
        (["--attention", "magic"], "attention is 'magic'"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--slice", "0"], "slice_size is 0: give 1 or more"),
        (["--vbench-names"], "go together"),
        (["--prompts", "none.txt", "--vbench-names"], "none.txt: there is no such file"),
        (["--embeddings", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--given", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--samples", "0"], "samples is 0"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("tiny", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_are_named(golden: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    config = load_model(golden).config
    for tensors, message in (
        ({"other": torch.zeros(1)}, "has other; expected context, null_context"),
        ({"null_context": torch.zeros(1, 2, 40)}, "no tensor 'context'"),
        ({"context": torch.zeros(1, 2, 41)}, r"context is \[1, 2, 41\]; expected \[prompts, 1 to 16, 40\]"),
        ({"context": torch.full((1, 2, 40), torch.nan)}, "NaN or infinite"),
    ):
        save_file(tensors, bad)
        with pytest.raises(InputError, match=message):
            plan_generation(Generation(embeddings=bad), config)
    text = tmp_path / "text.safetensors"
    save_file({"context": torch.zeros(1, 2, 40)}, text)
    with pytest.raises(InputError, match=r"guidance 2\.0 needs the embedding of an empty prompt"):
        plan_generation(Generation(embeddings=text, guidance=2.0), config)
    with pytest.raises(InputError, match="this model needs text embeddings"):
        plan_generation(Generation(), config)
    wanted = Generation(embeddings=text, frames=6, height=32, width=48, given=bad)
    for tensors, message in (
        ({"latents": torch.zeros(1, 16, 3, 4, 8)}, r"latents is \[1, 16, 3, 4, 8\]; expected \[1, 16, up to 6, 4, 6\]"),
        ({"latents": torch.zeros(1, 16, 9, 4, 6)}, "latents is"),
        ({"latents": torch.zeros(2, 16, 3, 4, 6)}, "latents is"),
        ({"image_features": torch.zeros(1, 4)}, "image_features is"),
    ):
        save_file(tensors, bad)
        with pytest.raises(InputError, match=message):
            plan_generation(wanted, config)
    with pytest.raises(InputError, match="needs image_latents"):
        plan_generation(dataclasses.replace(wanted, given=None), dataclasses.replace(config, in_dim=20))


def test_only_its_own_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for overwrite, message in ((False, "out exists"), (True, "is not a video folder")):
        with pytest.raises(OutputError, match=message):
            generate("tiny", tmp_path / "out", SHORT, overwrite=overwrite)
    with pytest.raises(OutputError, match="create it first"):
        generate("tiny", tmp_path / "a" / "b", SHORT)
    assert os.listdir(tmp_path / "out") == ["mine.txt"]  # noqa: PTH208


def test_the_runtime_is_what_was_asked_for(golden: Path) -> None:
    model = Runtime(dtype=torch.bfloat16, attention="absorbed").load(golden)
    assert (model.dtype, model.attention_mode) == (torch.bfloat16, "absorbed")
    with pytest.raises(ConfigError, match="prompts come from their own list"):
        generate_for_vbench("tiny", "out", ["a"], Generation(prompts=("a",)))
