"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from calibrate_cases import DIM, EVERY, EXACT, FEW, SMALL, STREAMING, TOKENS, make_clips, make_sweep, target
from support import relative
from torch import Tensor

from mlaconvert.clips.folder import BATCH
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration import layer as layers
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.load import load_model


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("streaming", [STREAMING, None])
def test_a_sweep_is_the_models_own_forward(
    folder: Path, both_ways: Path, streaming: StreamingConfig | None, own: bool
) -> None:
    """One layer's weights at a time, and in the end the velocities of the whole model, in any regime."""
    source, clips = folder if (streaming is not None) == own else both_ways, make_clips(3)
    regime = dataclasses.replace(FEW, streaming=streaming)
    model = load_model(source, dtype=torch.float64)
    assert (model.config.streaming == streaming) == own
    model.config = dataclasses.replace(model.config, streaming=streaming)
    captured: list[Tensor] = []
    model.blocks[1].self_attn.register_forward_pre_hook(lambda _, given: captured.append(given[0]))  # type: ignore[union-attr]
    expected = [model(w.latents, w.timestep, w.context, chunks=w.chunks) for w in windows(clips, regime)]
    with open_checkpoint(source) as checkpoint:
        sweep = make_sweep(checkpoint, clips, regime)
        for layer in sweep:
            loaded = [not any(p.is_meta for p in block.parameters()) for block in sweep.model.blocks]
            assert loaded == [i == layer.index for i in range(3)]
            assert layer.weights.k_weight.shape == (DIM, DIM)
            assert torch.equal(layer.weights.k_weight.double(), layer.attention.k.weight)
            if layer.index == 1:
                for inputs, x, w in zip(layer.inputs, captured, windows(clips, regime), strict=True):
                    assert relative(inputs.x, x) < EXACT
                    assert inputs.x.shape[1] - inputs.first_query == TOKENS * w.queries
                    # Queries that count see every key: moments rely on it.
                    mask = inputs.plan.mask
                    assert mask is None or bool(mask[inputs.first_query :].all())
        assert all(p.is_meta for p in sweep.model.blocks.parameters())
        assert sweep.velocity_errors == {}
    assert len(expected) == len(sweep.hidden) == (4 if streaming else 2)
    for x, p, out in zip(sweep.hidden, sweep.prepared, expected, strict=True):
        assert relative(sweep.model.finish(x, p), out) < EXACT


def test_probes_measure_one_converted_layer(folder: Path) -> None:
    """Against the whole model with just that layer replaced; an exact conversion loses nothing."""
    clips = make_clips(3)
    shapes = {0: target().layer(11, SMALL), 1: target().layer(84, EVERY), 2: target().layer(9, ((1, 1),))}
    students = {}
    with open_checkpoint(folder) as checkpoint:
        regime = Regime(streaming=STREAMING, timesteps=(900.0, 0.0))
        sweep = make_sweep(checkpoint, clips, regime, probes=8)
        for layer in sweep:
            students[layer.index] = target().convert(layer, shapes[layer.index], layer_moments(layer))
            layer.follow(layer.index, students[layer.index])
    assert sweep.followed == list(range(4))
    model = load_model(folder, dtype=torch.float64)
    every = list(windows(clips, regime))

    def run() -> list[Tensor]:
        """Velocities of the last chunk; those of a clean pass are not used."""
        used = [w.timestep[:, -1] > 0 for w in every]
        assert not all(rows.all() for rows in used)
        outputs = [model(w.latents, w.timestep, w.context, chunks=w.chunks)[:, :, -w.queries :] for w in every]
        return [out[rows] for out, rows in zip(outputs, used, strict=True)]

    teacher = run()
    power = sum(float(out.square().sum()) for out in teacher)
    for index, student in students.items():
        model.blocks[index].self_attn, dense = student, model.blocks[index].self_attn
        error = sum(float((a - b).square().sum()) for a, b in zip(run(), teacher, strict=True))
        model.blocks[index].self_attn = dense
        if index == 1:
            assert sweep.velocity_errors[1] < 1e-15
        else:
            assert sweep.velocity_errors[index] > 1e-4
            assert sweep.velocity_errors[index] == pytest.approx(error / power, rel=1e-9)


def test_errors_are_measured_on_enough_tokens_of_the_largest_window(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever window comes first; by a followed model's too, of windows that have a velocity to judge by."""
    regime = Regime(streaming=STREAMING, timesteps=(900.0, 0.0))
    with open_checkpoint(folder) as checkpoint:
        sizes = [x.shape[:2].numel() for x in make_sweep(checkpoint, make_clips(9), regime).hidden]
        for enough, expected in ((3 * max(sizes) - 1, 3), (1, 2), (10**9, len(sizes))):
            monkeypatch.setattr(layers, "ENOUGH", enough)
            sweep = make_sweep(checkpoint, make_clips(9), regime, probes=99)
            first = next(iter(sweep))
            assert first.batch_tokens == max(sizes) > sizes[0]
            assert len(first.sample().inputs) == expected
            assert len(first.sample(2).inputs) == 2
            judged = [i for i, rows in enumerate(sweep.denoised) if rows.any()]
            assert len(sweep.followed) == min(expected, len(judged))
            assert set(sweep.followed) <= set(judged)


def test_probes_see_every_kind_of_window(folder: Path) -> None:
    """A stride through the windows would keep step with their order: always the same chunk."""
    clips = make_clips(5 * BATCH)
    kinds = [w.chunks for w in windows(clips, FEW)]
    with open_checkpoint(folder) as checkpoint:
        sweep = make_sweep(checkpoint, clips, probes=10)
        few = make_sweep(checkpoint, make_clips(1), probes=99)
    assert len(sweep.hidden) == 20
    assert len(set(sweep.followed)) == 10
    assert len({kinds[i] for i in sweep.followed}) == 4
    assert few.followed == list(range(4))
