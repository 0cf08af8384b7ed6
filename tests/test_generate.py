"""Generating onto the disk: what is written, what survives an interruption, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.clips.folder import load_clips
from mlaconvert.clips.tiny import clips as clips_module
from mlaconvert.clips.tiny.clips import embed_captions, null_context, sample_scenes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.staging import Staging
from mlaconvert.generation import chunks as chunks_module
from mlaconvert.generation import passes
from mlaconvert.generation.movies import can_write_mp4, contact_sheet, save_movie, side_by_side
from mlaconvert.generation.plan import caption_tokens, plan_generation
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.run import generate
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import rollout
from mlaconvert.model.schedule import Sampler

CAPTIONS = ("large red disc right, sky", "small white ring up, stripes")
SHORT = Generation(frames=8, steps=2, prompts=CAPTIONS[:1])
needs_mp4 = pytest.mark.skipif(not can_write_mp4(), reason="needs imageio-ffmpeg")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def expected(context: object, frames: int = 8, **options: object) -> Tensor:
    """The tiny model's rollout in memory."""
    sampler = options.pop("sampler", Sampler.many_step(2, guidance=1.5))
    chunks = rollout(
        load_model("tiny"),
        context,  # type: ignore[arg-type]
        frames=frames,
        height=24,
        width=32,
        sampler=sampler,  # type: ignore[arg-type]
        null_context=null_context(),
        **options,  # type: ignore[arg-type]
    )
    return torch.cat(list(chunks), 2)


def embedded(caption: str) -> Tensor:
    return embed_captions(caption_tokens(caption))


# --- the output ------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_rollout(tmp_path: Path) -> None:
    wanted = dataclasses.replace(SHORT, samples=2, seed=5)
    report = generate("tiny", tmp_path / "out", wanted, movie="gif")
    written = load_file(tmp_path / "out" / "latents.safetensors")
    assert relative(written["latents"], expected(embedded(CAPTIONS[0]).expand(2, -1, -1), seed=(5, 6))) < 1e-6
    assert torch.equal(written["context"], embedded(CAPTIONS[0]).expand(2, -1, -1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (report.frames, report.video_seconds, report.resumed_frames) == (8, 0.5, 0)
    # 2 videos with both halves of the guidance, 7 frames of 48 tokens, 6 layers of 384 float32 scalars.
    assert report.cache_bytes == 4 * 7 * 48 * 6 * 384 * 4
    with Image.open(tmp_path / "out" / "video-6.gif") as movie:
        assert (movie.size, getattr(movie, "n_frames", 0)) == ((128, 96), 8)
    with Image.open(tmp_path / "out" / "frames.png") as sheet:
        assert sheet.size == (10 * 128, 2 * 96)


def test_the_output_serves_as_a_data_set(tmp_path: Path) -> None:
    generate("tiny", tmp_path / "out", SHORT, movie="none")
    clips = load_clips(tmp_path / "out", load_model("tiny").config, 5)
    assert clips.latents.shape == (1, 3, 8, 24, 32)


def test_dense_and_converted_models_run_through_the_same_command(golden: Path, tmp_path: Path) -> None:
    converted = CliRunner().invoke(app, ["convert", str(golden), "-o", str(tmp_path / "mla"), "--init", "svd"])
    assert converted.exit_code == 0, converted.stderr
    prompts = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    save_file({"context": prompts, "null_context": prompts[:1] * 0}, tmp_path / "text.safetensors")
    flags = ("--frames", 7, "--height", 32, "--width", 48, "--timesteps", "900,300", "--shift", 2, "--guidance", 2)
    flags += (
        "--embeddings",
        tmp_path / "text.safetensors",
        "--switch",
        "1.2",
        "--window-frames",
        5,
        "--sink-frames",
        2,
    )
    for name, model, attention in (("dense", golden, "auto"), ("mla", tmp_path / "mla", "absorbed")):
        succeed(model, "-o", tmp_path / f"video-{name}", *flags, "--attention", attention)
        found = load_file(tmp_path / f"video-{name}" / "latents.safetensors")
        assert list(found) == ["latents"]  # two prompts: no one context
        chunks = rollout(
            load_model(model),
            [(0, prompts[:1]), (5, prompts[1:])],  # 1.2 s of 16 frames, 4 a latent one
            frames=7,
            height=4,
            width=6,
            sampler=Sampler.few_step((900, 300), shift=2, guidance=2),
            null_context=prompts[:1] * 0,
            streaming=StreamingConfig(window_frames=5, sink_frames=2),
        )
        assert relative(found["latents"], torch.cat(list(chunks), 2)) < 1e-5
        assert not (tmp_path / f"video-{name}" / "frames.png").exists()


def test_given_frames_are_continued(tmp_path: Path) -> None:
    scenes = sample_scenes(1, 3)
    first = scenes.draw(torch.arange(3))
    save_file({"latents": first}, tmp_path / "first.safetensors")
    wanted = dataclasses.replace(SHORT, samples=2, given=tmp_path / "first.safetensors")
    generate("tiny", tmp_path / "out", wanted, movie="none")
    found = load_file(tmp_path / "out" / "latents.safetensors")["latents"]
    assert torch.equal(found[:, :, :3], first.expand(2, -1, -1, -1, -1))
    whole = expected(embedded(CAPTIONS[0]).expand(2, -1, -1), prefix=first.expand(2, -1, -1, -1, -1))
    assert relative(found, whole) < 1e-6


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """stop_after(n) interrupts the next run once n chunks are on the disk."""
    original = chunks_module.ChunkFile.write

    def stop(chunks: int) -> None:
        left = [chunks]

        def write(self: Any, start: int, chunk: Tensor) -> None:
            original(self, start, chunk)
            left[0] -= 1
            if left[0] == 0:
                monkeypatch.setattr(chunks_module.ChunkFile, "write", original)
                raise KeyboardInterrupt

        monkeypatch.setattr(chunks_module.ChunkFile, "write", write)

    return stop


@pytest.mark.parametrize("schedule", [{"steps": 2}, {"timesteps": (1000.0, 500.0), "guidance": 1.0}])
def test_an_interrupted_run_goes_on(tmp_path: Path, stop_after: Any, schedule: dict[str, Any]) -> None:
    wanted = Generation(frames=10, prompts=CAPTIONS, seed=3, **schedule)
    generate("tiny", tmp_path / "whole", wanted, movie="none")
    for chunks in (1, 2):
        stop_after(chunks)
        with pytest.raises(KeyboardInterrupt):
            generate("tiny", tmp_path / "out", wanted, movie="none")
        assert not (tmp_path / "out").exists()
    steps: list[tuple[str, int, int, str]] = []
    report = generate("tiny", tmp_path / "out", wanted, movie="none", progress=lambda *args: steps.append(args))
    assert report.resumed_frames == 9
    per_chunk = 3
    assert steps[-1][:3] == ("generate", 3 + per_chunk, 3 + per_chunk)  # three chunks read, one made
    assert "frames/s" in steps[-1][3]
    files = [load_file(tmp_path / name / "latents.safetensors")["latents"] for name in ("out", "whole")]
    assert relative(*files) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_other_settings_do_not_continue(tmp_path: Path, stop_after: Any) -> None:
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        generate("tiny", tmp_path / "out", SHORT, movie="none")
    other = dataclasses.replace(SHORT, seed=1)
    with pytest.raises(OutputError, match=r"\.out\.partial is an unfinished video with other settings"):
        generate("tiny", tmp_path / "out", other, movie="none")
    assert generate("tiny", tmp_path / "out", other, movie="none", overwrite=True).resumed_frames == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_all_frames_done_but_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate("tiny", tmp_path / "out", SHORT, movie="none")
    report = generate("tiny", tmp_path / "out", SHORT, movie="none")
    assert report.resumed_frames == 8
    assert (
        relative(load_file(tmp_path / "out" / "latents.safetensors")["latents"], expected(embedded(CAPTIONS[0]))) < 1e-6
    )


def test_nothing_is_left_when_nothing_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(passes, "rollout", fail)
    with pytest.raises(RuntimeError, match="no"):
        generate("tiny", tmp_path / "out", SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_keeps_its_chunks(tmp_path: Path) -> None:
    code = (
        "import sys, time, mlaconvert.generation.chunks as g, mlaconvert.cli as cli\n"
        "write = g.ChunkFile.write\n"
        "def slow(self, start, chunk):\n"
        "    write(self, start, chunk); print(start, flush=True); time.sleep(60 if start else 0)\n"
        "g.ChunkFile.write = slow\n"
        "sys.argv = ['mlaconvert', 'generate', 'tiny', '--frames', '9', '--steps', '1', "
        f"'-o', {str(tmp_path / 'out')!r}]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "3\n"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    result = succeed("tiny", "-o", tmp_path / "out", "--frames", 9, "--steps", 1, "--format", "none")
    assert "6 of them from before" in result.stderr


# --- captions, plans and pictures ------------------------------------------------------------------------------------


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
    videos = [torch.rand(2, 3, 4, 6, 8) * 2 - 1 for _ in range(2)]
    frames = list(side_by_side(videos))
    assert torch.equal(frames[1][:, 6:, 8:], videos[1][1, :, 1])
    save_movie(frames, tmp_path / "movie.gif")
    with Image.open(tmp_path / "movie.gif") as movie:
        assert movie.size == (16 * 4, 12 * 4)
        assert movie.info["duration"] == 60
    assert contact_sheet(videos, columns=3).size == (3 * 8 * 4, 4 * 6 * 4)
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


# --- VBench ----------------------------------------------------------------------------------------------------------


@needs_mp4
def test_vbench_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(("", *CAPTIONS, "")))
    flags = ("--prompts", tmp_path / "prompts.txt", "--vbench-names", "--frames", 3, "--steps", 1)
    succeed("tiny", "-o", tmp_path / "videos", *flags)
    names = {f"{caption}-{index}.mp4" for caption in CAPTIONS for index in range(5)}
    assert {path.name for path in (tmp_path / "videos").iterdir()} == names
    # A second run makes what is missing, and nothing else.
    (tmp_path / "videos" / f"{CAPTIONS[1]}-3.mp4").unlink()
    before = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir() if CAPTIONS[0] in path.name
    }
    result = succeed("tiny", "-o", tmp_path / "videos", *flags, "--json")
    assert {Path(path).name for path in json.loads(result.stdout)["files"]} == names
    assert (tmp_path / "videos" / f"{CAPTIONS[1]}-3.mp4").is_file()
    assert all((tmp_path / "videos" / name).stat().st_mtime_ns == time for name, time in before.items())


def test_vbench_latents_of_models_with_a_vae(golden: Path, tmp_path: Path) -> None:
    prompts = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    save_file({"context": prompts}, tmp_path / "text.safetensors")
    wanted = Generation(
        frames=3, height=32, width=48, samples=2, seed=4, timesteps=(800.0,), embeddings=tmp_path / "text.safetensors"
    )
    files = generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted)
    assert [path.name for path in files] == [f"a {pet}-{i}.safetensors" for pet in ("cat", "dog") for i in range(2)]
    sampler = Sampler.few_step((800,))
    chunks = rollout(load_model(golden), prompts[1:], frames=3, height=4, width=6, sampler=sampler, seed=5)
    assert relative(load_file(files[3])["latents"], torch.cat(list(chunks), 2)) < 1e-5
    with pytest.raises(InputError, match="context has 2 rows for 1 prompts"):
        generate_for_vbench(golden, tmp_path / "out", ["a cat"], wanted)


@needs_mp4
def test_vbench_videos_of_two_models_never_mix(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    out, flags = tmp_path / "videos", ["--prompts", tmp_path / "prompts.txt", "--vbench-names", "--frames", 3]
    flags += ["--samples", 2, "--steps", 1]
    succeed("tiny", "-o", out, *flags)
    (out / f"{CAPTIONS[1]}-1.mp4").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    settings = {
        "frames": ["--frames", 4],
        "sampler": ["--steps", 2],
        "streaming": ["--window-frames", 5],
        "seed": ["--seed", 1],
        "dtype": ["--dtype", "bfloat16"],
    }
    for name, change in settings.items():
        result = invoke("tiny", "-o", out, *flags, *change)
        assert result.exit_code == 2, name
        assert f"-0.mp4 was made with another {name}; choose another folder, or pass --overwrite" in result.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert invoke("tiny", "-o", out, *flags).exit_code == 0
    assert len(list(out.iterdir())) == 4
    # More samples and other prompts of the same settings go beside them, those of others do not.
    assert invoke("tiny", "-o", out, *flags, "--samples", 3).exit_code == 0
    (tmp_path / "prompts.txt").write_text("small white ring up, sky")
    result = invoke("tiny", "-o", out, *flags, "--steps", 2, "--overwrite")
    assert result.exit_code == 2
    assert "was made with another sampler; delete it, or choose another folder" in result.stderr
    assert invoke("tiny", "-o", out, *flags, "--seed", 3).exit_code == 0
    assert len(list(out.iterdir())) == 8


@needs_mp4
def test_vbench_videos_of_another_model_are_made_again_when_asked(tmp_path: Path) -> None:
    converted = CliRunner().invoke(app, ["convert", "tiny", "-o", str(tmp_path / "mla"), "--init", "svd"])
    assert converted.exit_code == 0, converted.stderr
    state = load_file(tmp_path / "mla" / WEIGHTS_NAME)
    name = next(name for name, tensor in sorted(state.items()) if tensor.ndim == 2)
    shutil.copytree(tmp_path / "mla", tmp_path / "trained")
    save_file(state | {name: state[name] * 1.5}, tmp_path / "trained" / WEIGHTS_NAME)  # no bias, no norm
    wanted = Generation(frames=3, steps=1, samples=1)
    generate_for_vbench(tmp_path / "mla", tmp_path / "out", CAPTIONS, wanted)
    (tmp_path / "out" / f"{CAPTIONS[1]}-0.mp4").unlink()
    with pytest.raises(OutputError, match=r"-0\.mp4 was made with another model; .*--overwrite"):
        generate_for_vbench(tmp_path / "trained", tmp_path / "out", CAPTIONS, wanted)
    shutil.copytree(tmp_path / "mla", tmp_path / "moved")  # the same weights in another place
    generate_for_vbench(tmp_path / "moved", tmp_path / "out", CAPTIONS, wanted)
    generate_for_vbench(tmp_path / "trained", tmp_path / "out", CAPTIONS, wanted, overwrite=True)
    generate_for_vbench(tmp_path / "trained", tmp_path / "straight", CAPTIONS, wanted)
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_vbench_files_of_earlier_versions_are_kept_aloud(golden: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    save_file({"context": torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))}, text)
    wanted = Generation(frames=3, height=32, width=48, samples=1, timesteps=(800.0,), embeddings=text)
    (tmp_path / "out").mkdir()
    save_file({"latents": torch.zeros(1)}, tmp_path / "out" / "a cat-0.safetensors")
    (tmp_path / "out" / ".99.partial.mp4").write_text("half")  # of a run that was killed
    said: list[str] = []
    first, second = generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted, say=said.append)
    assert "1 videos in" in said[0]
    assert "do not say what made them" in said[0]
    assert len(load_file(first)["latents"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [first.name, second.name]
    generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted, overwrite=True, say=said.append)
    assert len(said) == 1
    assert load_file(first)["latents"].shape == (1, 16, 3, 4, 6)
    save_file({"context": torch.zeros(2, 3, 40)}, text)
    with pytest.raises(OutputError, match="made with another conditioning"):
        generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a/b"], "prompt 1 cannot be a file name"),
        (["a", "x" * 300], "prompt 2 cannot"),
        (["a", "a"], "2 is there twice"),
    ],
)
def test_prompts_that_name_no_file_are_refused(tmp_path: Path, prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_for_vbench("tiny", tmp_path / "out", prompts)
    assert list(tmp_path.iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


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
