"""Conversion of whole checkpoints: small ones of odd sizes in every layout, and the golden model without loss."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CONFIG, NATIVE, SaveFolder, State, listing
from safetensors.torch import load_file, save_file

from mlaconvert.clips.folder import Clips
from mlaconvert.clips.tiny.clips import training_clips
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion import from_clips as calibrated
from mlaconvert.conversion.calibration.method import CalibrationSetup, Method
from mlaconvert.conversion.calibration.store import MOMENTS_VERSION
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.conversion.plan import plan_conversion
from mlaconvert.conversion.recipe import ConvertRecipe, parse_layers
from mlaconvert.conversion.recipes import _format_layers, load_recipe
from mlaconvert.conversion.run import convert
from mlaconvert.conversion.source import open_models
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.evaluation.losses import measure_fidelity
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.shipped import TINY
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.schedule import Sampler


def test_layer_lists() -> None:
    assert parse_layers("0-2, 7,5", 8) == (0, 1, 2, 5, 7)
    assert _format_layers((0, 1, 2, 5, 7)) == "0-2,5,7"
    assert _format_layers((3,)) == "3"
    for text in ("", "a", "1-", "-1", "1,,2", "3-1", "8"):
        with pytest.raises(ConfigError, match="layers is"):
            parse_layers(text, 8)


def test_default_videos() -> None:
    assert default_video(CONFIG)[:2] == (480, 832)
    assert default_video(CONFIG).vae_stride == 8
    wan22 = WanConfig(dim=60, num_heads=3, num_layers=1, ffn_dim=4, in_dim=48, out_dim=48)
    assert (default_video(wan22).vae_stride, default_video(wan22).fps, default_video(CONFIG).fps) == (16, 24, 16)
    pixels = WanConfig(dim=60, num_heads=3, num_layers=1, ffn_dim=4, in_dim=3, out_dim=3)
    assert default_video(pixels) == (24, 32, 1, 1, 16)


def test_open_models_opens_what_is_there(source: Path, pair: Path) -> None:
    experts = ["high_noise_model", "low_noise_model"]
    for given, subfolder, expected in (
        (source, None, [""]),
        (pair, None, experts),
        (pair, experts[1], [""]),
        (source.parent, "pair/low_noise_model", [""]),
    ):
        with open_models(Source(given, subfolder=subfolder)) as models:
            assert list(models) == expected


def losses_by_hand(source: Path, output: Path, clips: Clips, **regime: Any) -> tuple[float, float]:
    """Mean squared velocity errors of two whole models on the newest chunk of every window, but of clean passes."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=5)
    sums, count = [0.0, 0.0], 0
    for window in windows(clips, Regime.of(streaming, **regime)):
        rows = window.timestep[:, -1] > 0
        for i, model in enumerate((load_model(source), load_model(output))):
            velocity = model(window.latents, window.timestep, window.context, chunks=window.chunks)
            sums[i] += float((velocity[:, :, -window.queries :] - window.target)[rows].double().square().sum())
        count += window.target[rows].numel()
    return sums[0] / count, sums[1] / count


def test_without_data_the_teacher_supplies_the_clips(
    state: State, save_folder: SaveFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rollouts of twenty steps, each clip from its own seed, whether made together or one at a time."""
    streaming = {"chunk_frames": 3, "window_frames": 7, "sink_frames": 1}
    source = save_folder(state, NATIVE | {"streaming": streaming})
    recipe = ConvertRecipe(kv_rank=9, clips=3, refit_clips=5, seed=5, height=32, width=48)
    steps: list[tuple[str, int, int]] = []
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, recipe)
        together = calibrated.calibration_clips(checkpoint, plan, None, progress=lambda *step: steps.append(step))
        monkeypatch.setattr(calibrated, "BATCH_TOKENS", 1)
        alone = calibrated.calibration_clips(checkpoint, plan, None)
        kept = calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path)
        more = calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path, more=True)
        monkeypatch.setattr(calibrated.OwnClips, "make", None)
        again = calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path)
        assert torch.equal(
            calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path, more=True).latents, more.latents
        )
    assert together.latents.shape == (3, CONFIG.out_dim, 9, 4, 6)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert torch.equal(kept.latents, alone.latents)
    torch.testing.assert_close(alone.latents, together.latents, rtol=1e-4, atol=1e-4)
    assert steps[-1][:3] == ("generate clips", 63, 63)  # three chunks of twenty steps and a clean pass
    model, sampler = load_model(source), Sampler.many_step(20)
    context = torch.zeros(1, 1, CONFIG.text_dim)
    assert more.latents.shape == (2, CONFIG.out_dim, 9, 4, 6)
    for last, number in ((together, 2), (more, 4)):
        chunks = rollout(model, context, size=LatentSize(frames=9, height=4, width=6), sampler=sampler, seed=5 + number)
        torch.testing.assert_close(torch.cat(list(chunks), 2), last.latents[-1:], rtol=1e-4, atol=1e-4)


def test_fewer_clips_than_asked_are_said(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    source, data, lines = save_folder(state, NATIVE), tmp_path / "clips", []
    data.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 2, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    recipe = ConvertRecipe(kv_rank=9, clips=5, height=32, width=48, allocation="uniform", layers="0")
    convert(source, tmp_path / "out", recipe, listener=Listener(say=lines.append), data=data)
    assert lines == [f"{data} has 3 clips, fewer than the 5 of the recipe (--clips); all of them are used"]


MEASURED = ConvertRecipe(kv_rank=9, clips=3, height=32, width=48, allocation="uniform", layers="0-1")


@pytest.fixture(scope="module")
def measured(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, clips and the moments of a conversion to them. Tests work on copies."""
    root = tmp_path_factory.mktemp("measured")
    (root / "model").mkdir()
    (root / "clips").mkdir()
    save_file(state, root / "model" / WEIGHTS_NAME)
    (root / "model" / CONFIG_NAME).write_text(json.dumps(NATIVE))
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 2, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, root / "clips" / "a.safetensors")
    lines: list[str] = []
    convert(root / "model", root / "out", MEASURED, listener=Listener(say=lines.append), data=root / "clips")
    assert lines == []
    return root


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record.pop("version"), "another version of the method; it is measured anew"),
        (lambda record: record.update(version=record["version"] + 1), "another version of the method; it is"),
        (lambda record: record.update(clips=4), "another number of clips; it is measured anew"),
        (lambda record: record.update(tokens=[9, 9], loras=[{}]), "another size of frames and LoRA; it is"),
        (lambda record: record.update(more=1), "another calibration; it is measured anew"),
        (lambda record: None, ""),
    ],
)
def test_moments_of_another_version_are_measured_anew(
    measured: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    """Whichever part of the record differs, one line says so; moments that were tampered with show what is reused."""
    kept = Path(shutil.copytree(measured / "out.moments", tmp_path / "kept"))
    record, first = kept / "calibration.json", kept / "layer-000.safetensors"
    true = load_file(first)
    save_file({name: tensor * 2 if name == "mean" else tensor for name, tensor in true.items()}, first)
    noted = json.loads(record.read_text())
    assert noted["version"] == MOMENTS_VERSION
    changed = json.loads(record.read_text())
    change(changed)
    record.write_text(json.dumps(changed))
    lines: list[str] = []
    setup = CalibrationSetup(data=measured / "clips", moments=kept)
    convert(measured / "model", tmp_path / "again", MEASURED, listener=Listener(say=lines.append), data=setup)
    taken = f"what was measured of 2 layers is taken from {kept}"
    other = [line for line in lines if says and line.startswith(f"{kept}: ") and says in line]
    assert lines == (other[:1] if says else [taken])
    assert torch.equal(load_file(first)["mean"], true["mean"]) == bool(says)
    assert json.loads(record.read_text()) == noted


def test_moments_are_kept_and_reused(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Beside the output; the same model, regime and clips take them up, others make their own."""
    source = save_folder(state, NATIVE | {"streaming": {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1}})
    data = tmp_path / "clips"
    data.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 4, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    recipe = ConvertRecipe(kv_rank=9, clips=3, height=32, width=48, allocation="uniform")
    convert(source, tmp_path / "out", recipe, data=data)
    kept = tmp_path / "out.moments"
    assert listing(kept) == ["calibration.json", *(f"layer-{i:03d}.safetensors" for i in range(3))]
    first = kept / "layer-000.safetensors"
    # Reuse is seen by what it does: moments that were tampered with change the conversion.
    tampered = {name: tensor * 2 if name == "mean" else tensor for name, tensor in load_file(first).items()}
    save_file(tampered, first)
    convert(source, tmp_path / "again", recipe, data=CalibrationSetup(data=data, moments=kept))
    weights = [load_file(tmp_path / name / WEIGHTS_NAME) for name in ("out", "again")]
    name = "blocks.0.self_attn.kv_a_proj_with_mqa.bias"
    assert not torch.allclose(weights[0][name], weights[1][name])
    # Another regime: thrown away and made anew.
    other = dataclasses.replace(recipe, seed=1)
    convert(source, tmp_path / "other", other, data=CalibrationSetup(data=data, moments=kept))
    assert not torch.equal(load_file(first)["mean"], tampered["mean"])
    # Other clips under the same name and of the same size: the same.
    before = load_file(first)["mean"]
    other_tensors = {"latents": torch.randn(3, CONFIG.out_dim, 4, 4, 6, generator=g)}
    save_file(other_tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    convert(source, tmp_path / "fresh", other, data=CalibrationSetup(data=data, moments=kept))
    assert not torch.allclose(load_file(first)["mean"], before, rtol=1e-3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(OutputError, match="not a folder of moments"):
        convert(source, tmp_path / "none", recipe, data=CalibrationSetup(data=data, moments=tmp_path / "mine"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_calibrated_conversion_end_to_end(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """From clips in a folder: the total is kept, layers differ, and the result is closer than from weights alone.

    The present is exact unless a recipe says otherwise, and the account has two losses at every step.
    """
    streaming = {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1, "positions": "window"}
    source = save_folder(state, NATIVE | {"streaming": streaming})
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(5, CONFIG.out_dim, 6, 4, 6, generator=generator)
    context = torch.randn(5, 2, CONFIG.text_dim, generator=generator)
    data = tmp_path / "clips"
    data.mkdir()
    save_file({"latents": latents, "context": context}, data / "a.safetensors")
    common = {"key_norm": "token", "q_rank": "none", "height": 32, "width": 48}
    calibrated = {"init": "calibrated", "kv_rank": 16, "clips": 5, **common}
    recipes = {
        "svd": ConvertRecipe(init="svd", kv_rank=10, rope_dim=6, **common),
        "uniform": ConvertRecipe(allocation="uniform", **calibrated),
        "adaptive": ConvertRecipe(**calibrated),
        "again": ConvertRecipe(**calibrated),
        "layers": ConvertRecipe(refit_steps=0, **calibrated),
        "latent": ConvertRecipe(present="latent", **calibrated),
        "shared": ConvertRecipe(rope="latent", present="latent", **calibrated),
        "cached": ConvertRecipe(rope="cached", **calibrated | {"kv_rank": 10, "rope_dim": 6}),
        "fixed": ConvertRecipe(
            rope="cached",
            allocation="fixed",
            **calibrated | {"kv_rank": 10, "rope_dim": 6},
        ),
        "narrow": ConvertRecipe(nope_dim=6, v_dim=9, present="latent", **calibrated),
        "narrow past": ConvertRecipe(nope_dim=6, v_dim=9, refit_steps=4, **calibrated),
    }
    setups = {name: CalibrationSetup(data=data) if name != "svd" else CalibrationSetup() for name in recipes}
    setups["fixed"] = CalibrationSetup(data=data, method=Method(components=False))
    reports = {name: convert(source, tmp_path / name, recipe, data=setups[name]) for name, recipe in recipes.items()}
    recorded = {name: json.loads((tmp_path / name / "conversion.json").read_text())["recipe"] for name in recipes}
    assert {name: recipe["without"] for name, recipe in recorded.items()} == {
        name: ["components"] if name == "fixed" else [] for name in recipes
    }
    teacher = load_model(source)
    held = Clips(torch.randn(4, CONFIG.out_dim, 5, 4, 6, generator=generator), context[:4])
    students = {name: load_model(tmp_path / name) for name in recipes}
    errors = {name: measure_fidelity(teacher, student, held).velocity_error for name, student in students.items()}
    assert all(errors[name] < errors["svd"] for name in ("uniform", "adaptive", "latent", "shared", "cached"))
    presents = {name: student.config.mla.present for name, student in students.items() if student.config.mla}
    assert {name for name, present in presents.items() if present == "latent"} == {"svd", "latent", "shared", "narrow"}
    for name, rope, components in (("adaptive", "head", False), ("shared", "latent", True), ("cached", "cached", True)):
        mla = students[name].config.mla
        assert mla is not None
        assert mla.rope == rope
        assert sum(mla.cached_scalars(i, 0) for i in range(3)) == 3 * (16 + 1)
        for layer in mla.layers:
            assert layer is not None
            assert bool(layer.rope_components) == components
            assert layer.qk_nope_head_dim + layer.qk_rope_head_dim <= CONFIG.head_dim
    fixed = students["fixed"].config.mla
    assert fixed is not None
    assert {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in fixed.layers if layer} == {(10, 6)}
    assert all(count == 1 for layer in fixed.layers if layer for _, count in layer.rope_components)
    assert students["cached"].config.mla != fixed
    for name in ("narrow", "narrow past"):
        narrow = students[name].config.mla
        assert narrow is not None
        assert {(layer.qk_nope_head_dim, layer.v_head_dim) for layer in narrow.layers if layer} == {(6, 9)}
    for file in sorted(p.name for p in (tmp_path / "adaptive").iterdir()):
        assert (tmp_path / "adaptive" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    # The account: every step with a loss of its own, the last step's being that of the model that was written.
    steps = ["dense", "rotations dropped", "rotary key shared", "heads narrowed", "low rank", "output refitted"]
    assert list(reports["narrow"].models[0].losses) == [*steps, "queries refitted"]
    assert list(reports["narrow past"].models[0].losses) == [*steps[:-1], "past refitted", "model refitted"]
    for name, last, present in (
        ("latent", "queries refitted", "latent"),
        ("layers", "past refitted", "exact"),
        ("adaptive", "model refitted", "exact"),
    ):
        record = json.loads((tmp_path / name / "conversion.json").read_text())
        assert list(record["losses"])[-1] == last
        if name != "adaptive":
            assert list(record["layers"][0]["errors"]) == list(record["losses"])[1:]
        for kind, noisy in (("losses", 0.0), ("noisy_losses", 1.0)):
            clips = Clips(latents[4:], context[4:])
            found = losses_by_hand(source, tmp_path / name, clips, few_step=False, present=present, noisy_past=noisy)
            assert found == pytest.approx((record[kind]["dense"], record[kind][last]), rel=1e-5)
    with pytest.raises(InputError, match="shards"):
        convert(source, tmp_path / "none", ConvertRecipe(init="calibrated"), data=tmp_path / "svd" / "missing")
    with pytest.raises(ConfigError, match="init calibrated"):
        convert(source, tmp_path / "none", ConvertRecipe(init="svd"), data=data)
    assert not (tmp_path / "none").exists()


def test_a_disk_too_small_for_the_activations_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(load_recipe("tiny"), init="calibrated", clips=1)
    monkeypatch.setattr(calibrated, "scratch_bytes", lambda *_, **__: 10**17)
    with pytest.raises(OutputError, match=r"activations take about 100000000\.0 GB .* --moments"):
        convert("tiny", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_only_the_built_in_model_draws_its_clips(tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(TINY, copied, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with open_checkpoint("tiny") as own, open_checkpoint(copied) as other:
        assert own.is_tiny
        assert not other.is_tiny
        plan = plan_conversion(own, load_recipe("tiny"))
        found, expected = calibrated.calibration_clips(own, plan, None), training_clips(plan.recipe.clips or 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
