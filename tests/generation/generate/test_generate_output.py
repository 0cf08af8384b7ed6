"""Generating onto the disk: what is written, what survives an interruption, and what is refused."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from generate_cases import CAPTIONS, SHORT, succeed
from PIL import Image
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.clips.folder import load_clips
from mlaconvert.clips.tiny.clips import embed_captions, null_context, sample_scenes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import OutputError
from mlaconvert.files.staging import Staging
from mlaconvert.generation import chunks as chunks_module
from mlaconvert.generation import passes
from mlaconvert.generation.plan import caption_tokens
from mlaconvert.generation.request import Generation
from mlaconvert.generation.run import generate
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import CacheUse, Given, LatentSize, rollout
from mlaconvert.model.schedule import Sampler


def expected(context: Tensor, frames: int = 8, seed: Sequence[int] | int = 0, prefix: Tensor | None = None) -> Tensor:
    """The tiny model's rollout in memory."""
    chunks = rollout(
        load_model("tiny"),
        context,
        size=LatentSize(frames=frames, height=24, width=32),
        sampler=Sampler.many_step(2, guidance=1.5),
        seed=seed,
        given=Given(null_context=null_context(), prefix=prefix),
    )
    return torch.cat(list(chunks), 2)


def embedded(caption: str) -> Tensor:
    return embed_captions(caption_tokens(caption))


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
        corner = sheet.width - 14, sheet.height - 14  # of the last frame of the last video, within the margin
        shown = torch.from_numpy(np.array(sheet.crop((corner[0] - 128, corner[1] - 96, *corner)))[::4, ::4]).double()
    last = (written["latents"][1, :, -1].clamp(-1, 1) + 1) * 127.5
    assert float((shown.permute(2, 0, 1) - last).abs().max()) <= 1


def test_the_output_serves_as_a_data_set(tmp_path: Path) -> None:
    generate("tiny", tmp_path / "out", SHORT, movie="none")
    clips = load_clips(tmp_path / "out", load_model("tiny").config, 5)
    assert clips.latents.shape == (1, 3, 8, 24, 32)


def test_dense_and_converted_models_run_through_the_same_command(golden: Path, tmp_path: Path) -> None:
    converted = command_line.invoke("convert", str(golden), "-o", str(tmp_path / "mla"), "--init", "svd")
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
            size=LatentSize(frames=7, height=4, width=6),
            given=Given(null_context=prompts[:1] * 0),
            cache=CacheUse(streaming=StreamingConfig(window_frames=5, sink_frames=2)),
            sampler=Sampler.few_step((900, 300), shift=2, guidance=2),
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


def test_videos_without_a_place_of_their_own_do_not_collide(
    tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the next free name; an interrupted one is gone on from by the same call, however others were made."""
    monkeypatch.chdir(tmp_path)
    other = dataclasses.replace(SHORT, seed=1)
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        generate("tiny", request=SHORT, movie="none")
    assert generate("tiny", request=other, movie="none").output == Path("video-2")
    (tmp_path / ".video-3.partial").mkdir()
    (tmp_path / ".video-3.partial" / "mine.txt").write_text("somebody's")
    assert generate("tiny", request=other, movie="none").output == Path("video-4")
    found = generate("tiny", request=SHORT, movie="none")
    assert (found.output, found.resumed_frames) == (Path("video"), 3)
    assert generate("tiny", request=other, movie="none", overwrite=True).output == Path("video")
    names = [".video-3.partial", "video", "video-2", "video-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(OutputError, match="video exists"):
        generate("tiny", "video", SHORT, movie="none")


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


@pytest.mark.slow
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
