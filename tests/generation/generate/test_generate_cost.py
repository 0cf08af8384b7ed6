"""What a generation says of its time and memory before it begins, against what it then computes and holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_flops import FlopCount
from generate_cases import SHORT
from safetensors.torch import save_file

from mlaconvert.clips.teacher_made import OwnClips
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.evaluation.request import Request
from mlaconvert.evaluation.run import evaluate
from mlaconvert.generation import cost
from mlaconvert.generation.cost import cost_lines, generation_bytes, generation_work
from mlaconvert.generation.plan import GenerationPlan, plan_generation
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.run import generate
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model import rates
from mlaconvert.model.load import load_model
from mlaconvert.model.rates import Rates

GIVEN = Rates(products=1e5, attention=1e5, double=1e5, moved=1e15)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device so slow that nothing is short."""
    for module in (rates, cost):
        monkeypatch.setattr(module, "SHORT", 0.0)
        monkeypatch.setattr(module, "probe", lambda *_, **__: GIVEN)


def planned(request: Generation) -> tuple[Any, GenerationPlan]:
    config = load_model("tiny").config
    return config, plan_generation(request, config)


def test_it_computes_what_was_counted(tmp_path: Path) -> None:
    """Two videos with guidance, eight frames by chunks of three; the prompts are read once besides."""
    request = dataclasses.replace(SHORT, samples=2)
    config, plan = planned(request)
    with FlopCount() as counter:
        generate("tiny", tmp_path / "out", request, movie="none")
    work = generation_work(config, plan, itemsize=4)
    assert work.masked == 0
    assert work.products + work.attention == pytest.approx(counter.total, rel=0.01)
    assert work.products + work.attention < counter.total


def test_memory_grows_by_what_is_held() -> None:
    config, one = planned(SHORT)
    _, two = planned(dataclasses.replace(SHORT, samples=2))
    _, unguided = planned(dataclasses.replace(SHORT, guidance=1.0))
    runtime, alone = Runtime(), Runtime(slice_size=1)
    cache = 2 * 2 * 192 * 6 * 7 * 48 * 4  # two halves of keys and values of six layers, seven frames of 48 tokens
    assert cost.cache_bytes(config, one, torch.float32) == cache
    text = 2 * 6 * 2 * config.text_len * 192 * 4
    grown = generation_bytes(config, two, alone, torch.float32) - generation_bytes(config, one, alone, torch.float32)
    assert grown == cache + text  # a pass holds one video at a time
    assert generation_bytes(config, two, runtime, torch.float32) > generation_bytes(config, two, alone, torch.float32)
    assert generation_bytes(config, unguided, runtime, torch.float32) < generation_bytes(
        config, one, runtime, torch.float32
    )
    half = generation_bytes(config, one, runtime, torch.bfloat16)
    assert generation_bytes(config, one, runtime, torch.float32) == 2 * half
    weights = sum(p.nbytes for p in load_model("tiny").parameters())
    assert generation_bytes(config, one, runtime, torch.float32) > weights + cache


def test_what_it_will_take_is_said_before_anything_else(tmp_path: Path, slow: None) -> None:
    config, plan = planned(SHORT)
    seconds = GIVEN.seconds(generation_work(config, plan, itemsize=4))
    said: list[str] = []
    generate("tiny", tmp_path / "out", SHORT, movie="none", say=said.append)
    (line,) = [line for line in said if "FLOPs" in line]
    assert line.startswith(f"this will take about {seconds / 3600:.1f} h on cpu (")
    assert line.endswith("; a GPU takes a small part of that (--device cuda)")


def test_a_short_one_is_not_probed_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "probe", lambda *_, **__: pytest.fail("there is little to do"))
    said: list[str] = []
    generate("tiny", tmp_path / "out", SHORT, movie="none", say=said.append)
    assert said == []


def test_a_gpu_says_its_memory_and_when_it_is_too_small(monkeypatch: pytest.MonkeyPatch, slow: None) -> None:
    config, plan = planned(SHORT)
    monkeypatch.setattr(cost, "resolve_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**30))
    first, second = cost_lines(config, plan, Runtime(), torch.float32, rates=GIVEN)
    assert "on cuda (" in first
    assert first.endswith("MiB of its memory")
    assert second.startswith("does not fit: about ")
    assert second.endswith("; take --slice 1, a smaller --window-frames or fewer --samples")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    assert len(cost_lines(config, plan, Runtime(), torch.float32, rates=GIVEN)) == 1


def test_videos_of_a_list_are_counted_together(golden: Path, tmp_path: Path, slow: None) -> None:
    save_file({"context": torch.randn(2, 3, 40)}, tmp_path / "text.safetensors")
    wanted = Generation(
        frames=3, height=32, width=48, samples=1, timesteps=(800.0,), embeddings=tmp_path / "text.safetensors"
    )
    said: list[str] = []
    generate_for_vbench(golden, tmp_path / "out", ["a cat", "a dog"], wanted, say=said.append)
    config = load_model(golden).config
    both = 2 * generation_work(config, plan_generation(wanted, config, row=0), itemsize=4)
    assert any(f"({both.flops:.2g} FLOPs)" in line for line in said)


def test_a_model_that_makes_its_own_clips_says_so(golden: Path, slow: None) -> None:
    """What every command that needs clips and has none comes to."""
    model, said = load_model(golden), []
    own = dataclasses.replace(OwnClips.usual(model.config, 3), height=4, width=6)
    clips = own.make(model, 2, seed=0, batch=1, say=said.append)
    (line,) = said
    work = own.work(model.config, 2)
    assert line.startswith("2 clips of 3 latent frames that the model makes itself will take about ")
    assert f"({work.flops:.2g} FLOPs)" in line
    assert torch.equal(clips.latents, own.make(model, 2, seed=0, batch=1).latents)


@pytest.mark.slow
def test_an_evaluation_says_how_long_its_rollouts_are(tmp_path: Path, slow: None) -> None:
    convert("tiny", tmp_path / "mla", ConvertRecipe(init="svd"))
    said: list[str] = []
    evaluate([tmp_path / "mla"], Request(clips=2, frames=6, videos=1, steps=1), say=said.append)
    assert [line.partition(" will")[0] for line in said] == ["3 rollouts of 6 latent frames"]
