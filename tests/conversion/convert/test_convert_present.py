"""Conversions with an exact present: what they keep, what they are when nothing is past, and what refits change."""

from __future__ import annotations

import dataclasses
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CONFIG, NATIVE, WINDOW, SaveFolder, State, files
from safetensors.torch import load_file, save_file

from mlaconvert.clips.folder import ClipFolder, Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.method import CalibrationSetup, Method
from mlaconvert.conversion.calibration.target import PAST_ONLY
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert, preview
from mlaconvert.errors import ConfigError
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, WEIGHTS_NAME
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model

STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
RECIPE = ConvertRecipe(kv_rank=9, clips=10, height=32, width=48, allocation="uniform", refit_steps=3)
OWN = {"q_a_proj": "q", "q_a_layernorm": "norm_q", "k_norm_proj": "k", "k_norm": "norm_k", "v_proj": "v", "o": "o"}


def call(model: torch.nn.Module, frames: int, chunks: tuple[int, ...]) -> torch.Tensor:
    g = torch.Generator().manual_seed(11)
    x = torch.randn(2, CONFIG.out_dim, frames, 4, 6, generator=g)
    levels = 1000 * torch.rand(2, len(chunks), generator=g)
    timestep = levels.repeat_interleave(torch.tensor(chunks), 1)
    velocity: torch.Tensor = model(x, timestep, torch.randn(2, 3, CONFIG.text_dim, generator=g), chunks=chunks)
    return velocity


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_one_chunk_is_the_teachers_and_so_are_its_projections(
    streaming: Path, data: Path, tmp_path: Path, layout: Any
) -> None:
    """The default of a calibrated conversion for streaming, although refits changed what the past uses."""
    convert(streaming, tmp_path / "out", dataclasses.replace(RECIPE, layout=layout), data=data)
    teacher, student = load_model(streaming), load_model(tmp_path / "out")
    mla = student.config.mla
    assert mla is not None
    assert (mla.present, mla.rope, mla.q_lora_rank) == ("exact", "head", None)
    written = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["mla"]
    assert (written["format_version"], written["present"]) == (2, "exact")
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in theirs.items():
        inside = {source: new for new, source in OWN.items()}
        parts = name.split(".")
        if "self_attn" in parts:
            parts[3] = inside[parts[3]]
        assert torch.equal(ours[".".join(parts)], tensor), name
    torch.testing.assert_close(call(student, 2, (2,)), call(teacher, 2, (2,)), rtol=1e-5, atol=1e-6)
    off = (call(student, 4, (2, 2)) - call(teacher, 4, (2, 2))).abs().amax((0, 1, 3, 4))
    assert float(off[:2].max()) < 1e-5
    assert float(off[2:].min()) > 1e-3  # the second chunk has a past


@pytest.mark.parametrize("recipe", [ConvertRecipe(init="lossless", present="exact"), ConvertRecipe(init="lossless")])
def test_lossless_stays_lossless(streaming: Path, tmp_path: Path, recipe: ConvertRecipe) -> None:
    convert(streaming, tmp_path / "out", recipe)
    teacher, student = load_model(streaming), load_model(tmp_path / "out")
    assert student.config.mla is not None
    assert student.config.mla.present == (recipe.present or "latent")
    torch.testing.assert_close(call(student, 5, (2, 2, 1)), call(teacher, 5, (2, 2, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("more", [{}, {"v_dim": 13}, {"rope": "head", "v_dim": 13}, {"key_norm": "token"}])
def test_other_starts_have_an_exact_present_when_asked(
    streaming: Path, tmp_path: Path, init: Any, more: dict[str, Any]
) -> None:
    recipe = ConvertRecipe(init=init, present="exact", height=32, width=48, **more)
    convert(streaming, tmp_path / "out", recipe)
    student = load_model(tmp_path / "out")
    torch.testing.assert_close(call(student, 2, (2,)), call(load_model(streaming), 2, (2,)), rtol=1e-5, atol=1e-6)
    assert bool(call(student, 5, (2, 2, 1)).isfinite().all())
    convert(streaming, tmp_path / "papers", ConvertRecipe(init=init, height=32, width=48))
    mla = load_model(tmp_path / "papers").config.mla
    assert mla is not None
    assert (mla.present, mla.q_lora_rank) == ("latent", 30)  # as the paper has it, unless asked


@pytest.mark.parametrize("rope", ["head", "latent"])
def test_verification_reads_the_past(streaming: Path, tmp_path: Path, rope: Any) -> None:
    """A whole clip at once is the teacher's by construction, which would prove nothing."""
    errors = {}
    for name, recipe in {
        "lossless": ConvertRecipe(init="lossless", present="exact"),
        "wide": ConvertRecipe(init="svd", present="exact", rope=rope, key_norm="token", kv_rank=40),
        "narrow": ConvertRecipe(init="svd", present="exact", rope=rope, key_norm="token", kv_rank=4),
    }.items():
        sized = dataclasses.replace(recipe, height=32, width=48)
        verification = convert(streaming, tmp_path / name, sized, verify=True).models[0].verification
        assert verification is not None
        errors[name] = dict(verification.attention_errors)
    assert max(errors["lossless"].values()) < 1e-5
    assert all(2e-2 < errors["wide"][i] < errors["narrow"][i] for i in range(3))


def test_a_bidirectional_model_keeps_a_latent_present_unless_it_is_to_stream(
    state: State, save_folder: SaveFolder, data: Path
) -> None:
    source = save_folder(state, NATIVE)
    (plain,) = preview(source, None, RECIPE.__class__(kv_rank=9, height=32, width=48), data=data).models
    assert plain.plan.config.mla is not None
    assert plain.plan.config.mla.present == "latent"
    with pytest.raises(ConfigError, match=r"bidirectional model .* --window-frames"):
        preview(source, None, dataclasses.replace(RECIPE, present="exact"), data=data)
    (given,) = preview(source, None, RECIPE, streaming=WINDOW, data=data).models
    assert given.plan.config.mla is not None
    assert given.plan.config.mla.present == "exact"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"present": "exact", "q_rank": 7}, "q_rank is 7"),
        ({"present": "latent", "refit_steps": 5}, "refit_steps"),
        ({"present": "latent", "refit_clips": 5}, "refit_clips"),
        ({"noisy_past": 1.5}, "noisy_past"),
    ],
)
def test_settings_that_exclude_each_other(streaming: Path, data: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        preview(streaming, None, dataclasses.replace(ConvertRecipe(kv_rank=9), **changes), data=data)


def test_clips_of_one_chunk_have_no_past_to_measure(streaming: Path, data: Path, tmp_path: Path) -> None:
    window = {"chunk_frames": 6, "window_frames": 13}
    with pytest.raises(ConfigError, match="6 latent frames are one chunk of 6"):
        convert(streaming, tmp_path / "out", RECIPE, streaming=window, data=data)
    assert not (tmp_path / "out").exists()
    convert(streaming, tmp_path / "out", dataclasses.replace(RECIPE, present="latent", refit_steps=None),
            streaming=window, data=data)  # fmt: skip


def test_a_window_of_one_chunk_keeps_a_latent_present(streaming: Path, data: Path, tmp_path: Path) -> None:
    """Whoever converted for one before still can; asked for, an exact present has nothing to read."""
    window = {"chunk_frames": 2, "window_frames": 2, "sink_frames": 0}
    latent = dataclasses.replace(RECIPE, refit_steps=None)
    convert(streaming, tmp_path / "out", latent, streaming=window, data=data)
    mla = load_model(tmp_path / "out").config.mla
    assert mla is not None
    assert mla.present == "latent"
    with pytest.raises(ConfigError, match="windows of 2 latent frames are one chunk of 2"):
        convert(streaming, tmp_path / "none", dataclasses.replace(latent, present="exact"), streaming=window, data=data)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_refits_change_only_what_the_past_uses_and_are_reported(streaming: Path, tmp_path: Path) -> None:
    recipes = {
        "none": (dataclasses.replace(RECIPE, clips=40), Method(refit=False)),
        "layers": (dataclasses.replace(RECIPE, clips=40, refit_steps=0), Method()),
        "model": (dataclasses.replace(RECIPE, clips=40, refit_steps=20), Method()),
    }
    clips, g = tmp_path / "clips", torch.Generator().manual_seed(3)
    clips.mkdir()
    tensors = {"latents": torch.randn(40, CONFIG.out_dim, 6, 8, 12, generator=g)}
    save_file(tensors | {"context": torch.randn(40, 2, CONFIG.text_dim, generator=g)}, clips / "a.safetensors")
    weights, losses = {}, {}
    for name, (recipe, method) in recipes.items():
        setup = CalibrationSetup(data=clips, moments=tmp_path / "moments", method=method)
        convert(streaming, tmp_path / name, recipe, data=setup)
        weights[name] = load_file(tmp_path / name / WEIGHTS_NAME)
        losses[name] = json.loads((tmp_path / name / CONVERSION_NAME).read_text())
    changed = {
        pair: {n.split(".", 3)[3] for n in weights["none"] if not torch.equal(weights[pair[0]][n], weights[pair[1]][n])}
        for pair in (("none", "layers"), ("layers", "model"))
    }
    for found in changed.values():
        assert {"kv_b_proj.weight", "kv_b_proj.bias"} <= found <= set(PAST_ONLY)
    assert list(losses["none"]["losses"]) == ["dense", "low rank"]
    assert list(losses["layers"]["losses"]) == ["dense", "low rank", "past refitted"]
    assert list(losses["model"]["losses"]) == ["dense", "low rank", "past refitted", "model refitted"]
    assert list(losses["model"]["noisy_losses"]) == list(losses["model"]["losses"])
    assert losses["model"]["losses"]["past refitted"] == losses["layers"]["losses"]["past refitted"]


@pytest.mark.slow
def test_the_refit_of_the_model_takes_more_clips_than_are_measured(
    streaming: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that it is judged by: of five measured clips the last."""
    from mlaconvert.conversion import from_clips

    there = ClipFolder(data, CONFIG).some(range(len(ClipFolder(data, CONFIG)))).latents
    assert len(there) == 10
    taken: list[tuple[Clips, Clips]] = []
    monkeypatch.setattr(from_clips, "refit_model", lambda models, clips, *_, **__: taken.append(clips) or {})
    for refit_clips in (3, 6, None):  # fewer than the measured ones, one more, by default whatever there is
        chosen = dataclasses.replace(RECIPE, clips=5, refit_clips=refit_clips)
        convert(streaming, tmp_path / str(refit_clips), chosen, data=data)
    expected = [there[:4], torch.cat((there[:4], there[5:6])), torch.cat((there[:4], there[5:]))]
    for (fitted, judged), clips in zip(taken, expected, strict=True):
        assert torch.equal(fitted.latents, clips)
        assert torch.equal(judged.latents, there[4:5])
    made = json.loads((tmp_path / "None" / CONVERSION_NAME).read_text())
    assert made["recipe"]["refit_clips"] == 20


@pytest.mark.slow
def test_a_refit_that_is_interrupted_ends_with_the_same_bytes(streaming: Path, data: Path, tmp_path: Path) -> None:
    convert(streaming, tmp_path / "whole", RECIPE, data=data)

    def stop(at: str) -> Listener:
        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            if stage == at and done == total - 1:
                raise KeyboardInterrupt

        return Listener(progress=progress)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match=r"finished layers \(3\) are kept"):
            convert(streaming, tmp_path / "again", RECIPE, data=data, listener=stop("refit the model"))
    convert(streaming, tmp_path / "again", RECIPE, data=data)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_kept_refit_is_gone_on_from_and_never_outlives_the_weights(
    streaming: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Interrupted behind the refit; with `lost`, the weight file that it was written to goes missing besides."""
    from mlaconvert.conversion import job
    from mlaconvert.conversion.calibration import refit_model

    falling = count(0, -1)
    monkeypatch.setattr(refit_model, "_distance", lambda *_: next(falling))
    convert(streaming, tmp_path / "whole", RECIPE, data=data)
    convert(streaming, tmp_path / "plain", dataclasses.replace(RECIPE, refit_steps=0), data=data)
    ours, plain = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("whole", "plain"))
    assert any(not torch.equal(ours[name], plain[name]) for name in plain)  # the refit is kept
    with monkeypatch.context() as patched:
        patched.setattr(job, "conversion_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(streaming, tmp_path / "again", RECIPE, data=data)
    if lost:
        (tmp_path / ".again.partial" / "model" / WEIGHTS_NAME).unlink()
    convert(streaming, tmp_path / "again", RECIPE, data=data)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_refit_that_does_not_help_is_left_out(
    streaming: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlaconvert.conversion.calibration import refit_model, refit_past

    convert(streaming, tmp_path / "none", RECIPE, data=CalibrationSetup(data=data, method=Method(refit=False)))
    monkeypatch.setattr(refit_model, "TRIES", ((50.0, 1), (40.0, 2)))
    monkeypatch.setattr(refit_past, "_fit", lambda _, student, __: student.kv_b_proj.weight.mul_(3))
    convert(streaming, tmp_path / "bad", RECIPE, data=data)
    ours, plain = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("bad", "none"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    record = json.loads((tmp_path / "bad" / CONVERSION_NAME).read_text())
    for kind in ("losses", "noisy_losses"):  # of what was written, not of what was tried
        found = list(record[kind].values())
        assert len(found) == 4
        assert found[1:] == [pytest.approx(found[1], rel=1e-4)] * 3
