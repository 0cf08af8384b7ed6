"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrate_cases import (
    CONFIG,
    DIM,
    EXACT,
    FEW,
    HEADS,
    SMALL,
    SPLIT,
    STREAMING,
    falling,
    make_clips,
    make_layer,
    make_sweep,
    native,
    target,
)
from safetensors.torch import load_file, save_file
from support import SaveFolder, randomize, relative
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration import pieces
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.run import Calibration, KeptWalk, Task, calibrate, refit_layers
from mlaconvert.conversion.calibration.store import save_moments
from mlaconvert.conversion.calibration.target import share_budget
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Losses, Regime, batch_size, scratch_bytes
from mlaconvert.errors import OutputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.scratch import Scratch
from mlaconvert.latent.moments import modulation_moments
from mlaconvert.latent.pairs import mean_rotation
from mlaconvert.model.conditions import timestep_embedding
from mlaconvert.model.load import load_model, load_widened
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import full_window


@pytest.mark.parametrize("key_norm", ["token", "latent"])
def test_calibration_beats_a_guess_from_weights(folder: Path, key_norm: KeyNorm) -> None:
    """Patches of 16 numbers span a corner of 42 dimensions: the white noise of the proxy is nothing like it."""
    regime = Regime(streaming=STREAMING, timesteps=Sampler.few_step().timesteps)
    model = load_model(folder, dtype=torch.float64)
    times = timestep_embedding(torch.tensor(regime.timesteps), CONFIG.freq_dim)
    shared = model.time_projection(model.time_embedding(times)).unflatten(-1, (6, DIM))
    queries, keys = full_window(STREAMING, 7)
    rho = mean_rotation(SPLIT, queries=queries, keys=keys, height=2, width=3)
    made, ratios = target(key_norm), []
    with open_checkpoint(folder) as checkpoint:
        fresh = [list(layer.inputs) for layer in make_sweep(checkpoint, make_clips(4, seed=9), regime)]
        for layer, unseen in zip(make_sweep(checkpoint, make_clips(8), regime), fresh, strict=True):
            modulation = (shared + model.blocks[layer.index].modulation)[:, :2]
            guessed = modulation_moments(layer.weights, modulation, num_heads=HEADS, eps=CONFIG.eps, rho=rho)
            shape = made.layer(18, SMALL)
            measured, guess = (made.convert(layer, shape, m) for m in (layer_moments(layer), guessed))
            other = dataclasses.replace(layer, inputs=unseen)
            ratios.append(attention_error(other, measured) / attention_error(other, guess))
    assert ratios[0] < 0.6
    assert max(ratios) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [True, False])
def test_two_sweeps_convert_a_model(save_folder: SaveFolder, tmp_path: Path, adaptive: bool) -> None:
    """Layers 0 and 2, whose output hardly counts: the total is met, the best split is found, each refit helps."""
    model = WanModel(dataclasses.replace(CONFIG, streaming=STREAMING)).requires_grad_(False)
    randomize(model)
    for p in model.blocks[2].self_attn.o.parameters():  # type: ignore[union-attr]
        p.mul_(0.02)
    folder = save_folder(model.state_dict(), native(model.config))
    clips, made, steps = make_clips(3), target(rope="latent"), []
    with open_checkpoint(folder) as checkpoint:
        calibration = calibrate(
            Task(checkpoint=checkpoint, clips=clips, regime=FEW, target=made),
            layers=(0, 2),
            budget=14,
            adaptive=adaptive,
            folder=tmp_path,
            progress=lambda *step: steps.append(step),
        )
        assert [step[:3] for step in steps] == [("calibrate", done, 3) for done in range(4)]
        budgets = [shape.kv_lora_rank for shape in calibration.layers.values()]
        assert list(calibration.layers) == [0, 2]
        assert sum(budgets) == 28
        assert budgets[0] > 16 if adaptive else budgets == [14, 14]
        refitted = refit_layers(Task(checkpoint=checkpoint, clips=clips, regime=FEW, target=made), calibration)
        sweep = (layer for layer in LayerWalk(checkpoint, clips, FEW) if layer.index != 1)
        for (index, tensors, errors), layer in zip(refitted, sweep, strict=True):
            assert index == layer.index
            assert list(errors) == [
                "rotations dropped",
                "rotary key shared",
                "low rank",
                "output refitted",
                "queries refitted",
            ]
            assert errors["queries refitted"] < errors["output refitted"] < errors["low rank"]
            shape = calibration.layers[index]
            student = made.convert(layer, shape, layer_moments(layer))
            assert attention_error(layer, student) == pytest.approx(errors["low rank"], rel=1e-4)
            student.load_state_dict(tensors)
            assert attention_error(layer, student) == pytest.approx(errors["queries refitted"], rel=1e-4)
            if not adaptive:
                counts = [sum(n for _, n in shape.rope_components) + change for change in (-1, 0, 1)]
                table = made.measure(layer, layer_moments(layer), counts=counts, budgets=[14])
                least = min(curve[14] for curve in table.errors.values() if curve)
                assert table.errors[counts[1]][14] < 1.02 * least


def test_no_layer_gets_more_than_the_model_is_wide() -> None:
    table = falling(1.0)
    assert share_budget([table, table], (1.0, 1e9), 20, largest=23) == [17, 23]
    assert target().layer(DIM + 9, SMALL).kv_lora_rank == DIM


@pytest.mark.slow
@pytest.mark.parametrize("finished", [(), (0,), (0, 2)])
def test_a_killed_sweep_goes_on_behind_the_finished_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[int, ...]
) -> None:
    """The same tensors, errors and losses; layers whose results were lost are passed again."""
    clips, made = make_clips(2), target("token")
    shape = made.layer(13, SMALL)
    passed: list[int] = []
    with open_checkpoint(folder) as checkpoint:
        for layer in LayerWalk(checkpoint, clips, FEW):
            save_moments(tmp_path, layer.index, layer_moments(layer))
        calibration = Calibration(folder=tmp_path, layers={0: shape, 2: shape})

        def refit(
            losses: Losses, kept: KeptWalk | None = None
        ) -> Iterator[tuple[int, dict[str, Tensor], dict[str, float]]]:
            task = Task(checkpoint=checkpoint, clips=clips, regime=FEW, target=made)
            return refit_layers(task, calibration, validation=make_clips(1, seed=7), losses=losses, kept=kept)

        whole = Losses()
        expected = {index: (tensors, errors) for index, tensors, errors in refit(whole)}
        state = tmp_path / "state"
        state.mkdir()
        interrupted = refit(Losses(), KeptWalk(folder=state))
        for index, _, _ in interrupted:
            if index == 2:
                break
        if finished == (0, 2):  # the kill came after the last layer
            assert next(interrupted, None) is None
        interrupted.close()  # type: ignore[attr-defined]
        assert not list(state.glob("*.partial"))
        assert len(list(state.iterdir())) <= 2
        load = LayerWalk._load
        monkeypatch.setattr(LayerWalk, "_load", lambda self, index: passed.append(index) or load(self, index))
        losses = Losses()
        again = {
            index: (tensors, errors)
            for index, tensors, errors in refit(losses, KeptWalk(folder=state, finished=finished))
        }
    assert passed == {(): [0, 1, 2], (0,): [2], (0, 2): []}[finished]
    assert losses == whole
    for kind in (whole.clean_past, whole.noisy_past):
        assert len(kind) == len(set(kind.values())) > 3  # every stage is followed as it was
    for index, (tensors, errors) in again.items():
        assert errors == expected[index][1]
        assert all(torch.equal(tensors[name], expected[index][0][name]) for name in expected[index][0])


def test_a_sweep_goes_on_from_its_last_layers(folder: Path, tmp_path: Path) -> None:
    """Behind layer 1, and one layer earlier when the newest results are missing; a broken file is as good as none."""
    with open_checkpoint(folder) as checkpoint:
        first = make_sweep(checkpoint, make_clips(2))
        first.resume(tmp_path, lambda _: True)
        assert first.start == 0
        hidden = {}
        for layer in first:
            hidden[layer.index] = [x.clone() for x in first.hidden]
        for missing, start in ((3, 3), (2, 2), (1, 0)):
            sweep = make_sweep(checkpoint, make_clips(2))
            sweep.resume(tmp_path, lambda index, missing=missing: index < missing)  # type: ignore[misc]
            assert sweep.start == start
            if start == 2:
                assert all(torch.equal(a, b) for a, b in zip(sweep.hidden, hidden[2], strict=True))
                assert [layer.index for layer in sweep] == [2]
                assert all(torch.equal(a, b) for a, b in zip(sweep.hidden, first.hidden, strict=True))
        (tmp_path / "sweep-003.safetensors").write_bytes(b"broken")
        sweep = make_sweep(checkpoint, make_clips(2))
        sweep.resume(tmp_path, lambda _: True)
        assert sweep.start == 2


BAD_STATES: dict[str, Any] = {
    "a hidden state is missing": lambda t: t.pop("hidden 3"),
    "a hidden state of another shape": lambda t: t.update({"hidden 3": t["hidden 3"][:, :-1].clone()}),
    "one clip instead of two": lambda t: t.update({"hidden 3": t["hidden 3"][:1].clone()}),
    "of another dtype": lambda t: t.update({"hidden 3": t["hidden 3"].double()}),
    "not finite": lambda t: t["hidden 3"][1, 2, 3].fill_(torch.nan),
    "a stream cut short": lambda t: t.pop("stream low rank 1"),
    "a stream of another shape": lambda t: t.update({"stream low rank 1": t["stream low rank 1"][:, 1:].clone()}),
    "a stream too long": lambda t: t.update({"stream low rank 99": t["stream low rank 1"].clone()}),
    "something else": lambda t: t.update(more=torch.zeros(1)),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_nothing_of_a_bad_state_is_taken_over(folder: Path, tmp_path: Path, case: str) -> None:
    """The state before it serves; without one, the sweep begins as if there had been none."""
    said: list[str] = []
    with open_checkpoint(folder) as checkpoint:

        def fresh() -> LayerWalk:
            return LayerWalk(checkpoint, make_clips(2), FEW, validation=make_clips(1, seed=7))

        first = fresh()
        first.resume(tmp_path, lambda _: True)
        student = None
        for layer in first:
            if student is None:
                student = target().convert(layer, target().layer(13, SMALL), layer_moments(layer))
                layer.follow("low rank", student)
        newest = tmp_path / "sweep-003.safetensors"
        tensors = load_file(newest)
        assert {"hidden 3", "stream low rank 1"} <= tensors.keys()
        BAD_STATES[case](tensors)
        save_file(tensors, newest)
        again = fresh()
        again.resume(tmp_path, lambda _: True, said.append)
        assert (again.start, list(again.streams)) == (2, ["low rank"])
        assert len(said) == 1
        assert "sweep-003.safetensors" in said[0]
        assert [layer.index for layer in again] == [2]
        assert again.losses == first.losses
        save_file(tensors, newest)
        (tmp_path / "sweep-002.safetensors").unlink()
        for name in ("sweep-004", "sweep-x", "sweep-"):  # beyond the last layer, and none of ours
            save_file(load_file(newest), tmp_path / f"{name}.safetensors")
        alone, untouched = fresh(), fresh()
        alone.resume(tmp_path, lambda _: True, said.append)
    assert (alone.start, alone.streams) == (0, {})
    assert all(torch.equal(a, b) for a, b in zip(alone.hidden, untouched.hidden, strict=True))


def test_moments_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    layer = make_layer(5)
    moments = layer_moments(layer)
    for change in ({"rho": moments.rho * torch.nan}, {"output_power": math.inf}, {"inverse_norm": math.nan}):
        with pytest.raises(torch.linalg.LinAlgError, match="layer 12 are not finite"):  # type: ignore[attr-defined]
            save_moments(tmp_path, 12, dataclasses.replace(moments, **change))
    assert list(tmp_path.iterdir()) == []


def test_moments_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "layer-012.safetensors").mkdir()  # nothing can be put there
    with pytest.raises(OutputError, match=r"layer-012\.safetensors: the moments cannot be kept"):
        save_moments(tmp_path, 12, layer_moments(make_layer(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["layer-012.safetensors"]


def test_weights_of_another_dtype_are_widened_as_they_are_used(folder: Path, save_folder: SaveFolder) -> None:
    """A bfloat16 file gives exactly what a float32 file of the same numbers gives."""
    with open_checkpoint(folder) as checkpoint:
        state = {name: checkpoint.read(name).bfloat16() for name in checkpoint.names}
        config = native(checkpoint.config)
    narrow, wide = (
        save_folder(state, config, "narrow"),
        save_folder({name: tensor.float() for name, tensor in state.items()}, config, "wide"),
    )
    found = []
    for source in (narrow, wide):
        with open_checkpoint(source) as checkpoint:
            sweep = LayerWalk(checkpoint, make_clips(2), FEW)
            for layer in sweep:
                kept = layer.attention.k.weight.dtype
                moments = layer_moments(layer)
            found.append((moments, [x.clone() for x in sweep.hidden], kept))
    assert [kept for _, _, kept in found] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    for name in ("covariance", "sensitivity", "query", "rho"):
        assert torch.equal(getattr(found[0][0], name), getattr(found[1][0], name))


def test_a_widened_model_is_the_model_in_float32(folder: Path, save_folder: SaveFolder) -> None:
    with open_checkpoint(folder) as checkpoint:
        state = {name: checkpoint.read(name).bfloat16() for name in checkpoint.names}
        narrow = save_folder(state, native(checkpoint.config), "narrow")
    clips, times = make_clips(2), torch.tensor([300.0, 800.0])
    with open_checkpoint(narrow) as checkpoint:
        widened, expected = load_widened(checkpoint, STREAMING), load_model(checkpoint, dtype=torch.float32)
        found = widened(clips.latents, times, clips.context)
    assert {p.dtype for p in widened.blocks[1].ffn.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    assert torch.equal(found, expected(clips.latents, times, clips.context))


def test_work_in_small_parts_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (pieces.PIECE_SCALARS, 64):
        monkeypatch.setattr("mlaconvert.conversion.calibration.measure.PIECE_SCALARS", size)
        monkeypatch.setattr("mlaconvert.conversion.calibration.pieces.PIECE_SCALARS", size)
        monkeypatch.setattr("mlaconvert.conversion.calibration.walk.PIECE_SCALARS", size)
        with open_checkpoint(folder) as checkpoint:
            sweep = make_sweep(checkpoint, make_clips(2))
            for layer in sweep:
                moments = layer_moments(layer)
            found.append((moments, [x.clone() for x in sweep.hidden]))
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert relative(a, b) < EXACT
    for name in ("mean", "covariance", "query", "sensitivity"):
        assert relative(getattr(found[0][0], name), getattr(found[1][0], name)) < EXACT, name


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((4, 8, 10), 64, 8),  # never more, and 80 tokens are few
        ((21, 32, 20), 64, 4),  # 3360 tokens of 16384
        ((5, 20, 20), 2048, 4),  # 500 tokens of 2048 scalars, of 4194304
        ((21, 60, 104), 1536, 1),  # 32760 tokens: more than there may be, but one must go
    ],
)
def test_as_many_clips_go_through_a_model_at_once_as_fit(shape: tuple[int, ...], dim: int, expected: int) -> None:
    clips = Clips(torch.zeros(1).expand(9, 3, *shape), torch.zeros(9, 1, 1))
    config = WanConfig(dim=dim, num_heads=dim // 64, num_layers=1, ffn_dim=8)
    assert batch_size(clips, config) == expected


@pytest.mark.parametrize("streaming", [STREAMING, None])
def test_the_disk_that_activations_take_is_known_beforehand(
    folder: Path, both_ways: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: StreamingConfig | None
) -> None:
    """Against the bytes of a sweep in which all layers are followed, and one layer's expected outputs."""
    taken = 0
    empty = Scratch.empty

    def counted(self: Scratch, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nonlocal taken
        made = empty(self, shape, dtype)
        taken += made.nbytes
        return made

    monkeypatch.setattr(Scratch, "empty", counted)
    monkeypatch.setattr("mlaconvert.conversion.calibration.windows.QUERIES", 1)
    regime, clips, made = dataclasses.replace(FEW, streaming=streaming), make_clips(6), target("token")
    with open_checkpoint(folder if streaming else both_ways) as checkpoint:
        for layer in LayerWalk(checkpoint, clips, regime, probes=9, scratch=tmp_path):
            if layer.index == 0:
                assert len(layer.expected) == len(layer.inputs)
                student = made.convert(layer, made.layer(13, SMALL), layer_moments(layer))
            layer.follow(layer.index, student)
        config, shape = checkpoint.config, clips.latents.shape
        expected = scratch_bytes(config, shape, regime, followed=3)
        # The curvatures of a refit's queries are [queries, heads, width, width]; few of them do not count here.
        found = []
        for queries in (10**6, 10**6 + 7):
            monkeypatch.setattr("mlaconvert.conversion.calibration.windows.QUERIES", queries)
            found.append(scratch_bytes(config, shape, regime, followed=3))
        assert found[1] - found[0] == 4 * 7 * config.num_heads * config.head_dim**2
    assert 0.85 * expected < taken < 1.05 * expected
