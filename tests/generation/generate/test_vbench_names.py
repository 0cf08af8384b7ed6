"""Generating onto the disk: what is written, what survives an interruption, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import command_line
import pytest
import torch
from generate_cases import CAPTIONS, invoke, needs_mp4, succeed
from safetensors.torch import load_file, save_file
from support import relative

from mlaconvert.errors import InputError, OutputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.generation.request import Generation
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.schedule import Sampler


@pytest.mark.slow
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
    assert f"going on after 9 of 10 videos, kept in {tmp_path / 'videos'}\n" in result.stderr
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
    chunks = rollout(
        load_model(golden), prompts[1:], size=LatentSize(frames=3, height=4, width=6), sampler=sampler, seed=5
    )
    assert relative(load_file(files[3])["latents"], torch.cat(list(chunks), 2)) < 1e-5
    with pytest.raises(InputError, match="context has 2 rows for 1 prompts"):
        generate_for_vbench(golden, tmp_path / "out", ["a cat"], wanted)


@needs_mp4
@pytest.mark.slow
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
@pytest.mark.slow
def test_vbench_videos_of_another_model_are_made_again_when_asked(tmp_path: Path) -> None:
    converted = command_line.invoke("convert", "tiny", "-o", str(tmp_path / "mla"), "--init", "svd")
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
    (kept,) = [line for line in said if "do not say what made them" in line]
    assert "1 videos in" in kept
    assert len(load_file(first)["latents"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [first.name, second.name]
    generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted, overwrite=True, say=said.append)
    assert sum("do not say what made them" in line for line in said) == 1
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
