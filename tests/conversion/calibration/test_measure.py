"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
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
    SPLIT,
    STREAMING,
    TOKENS,
    WIDTH,
    make_clips,
    make_layer,
    make_sweep,
    nth,
)
from support import relative
from torch import Tensor

from mlaconvert.config.mla import Present
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.store import load_moments, save_moments
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import windows
from mlaconvert.families.open import open_checkpoint
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.model.load import load_model
from mlaconvert.model.rope import angles


def longhand_moments(
    state: dict[str, Tensor], prefix: str, batches: Sequence[tuple[Tensor, int]], *, past_only: bool = False
) -> LayerMoments:
    """One (query, key) pair after the other; `past_only`: with keys from before the queries that count."""
    w = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}
    mean, second = torch.zeros(DIM).double(), torch.zeros(DIM, DIM).double()
    query, turned = torch.zeros(HEADS, WIDTH, WIDTH).double(), torch.zeros(WIDTH // 2, dtype=torch.complex128)
    power, inverse_norm, pairs, queries = torch.zeros(WIDTH // 2).double(), 0.0, 0, 0
    theta = torch.cat([10000.0 ** (-torch.arange(n).double() / n) for n in SPLIT])
    axis = torch.tensor([0] * SPLIT[0] + [1] * SPLIT[1] + [2] * SPLIT[2])
    for x, first in batches:
        for row in x.double():
            raw = row @ w["k.weight"].T + w["k.bias"]
            s = 1 / (raw.square().mean(1) + CONFIG.eps).sqrt()
            k = (raw * s[:, None] * w["norm_k.weight"]).reshape(len(row), HEADS, WIDTH)
            raw = row @ w["q.weight"].T + w["q.bias"]
            q = raw / (raw.square().mean(1, keepdim=True) + CONFIG.eps).sqrt() * w["norm_q.weight"]
            q = q.reshape(len(row), HEADS, WIDTH)
            q_power = q[..., 0::2].square() + q[..., 1::2].square()
            k_power = k[..., 0::2].square() + k[..., 1::2].square()
            place = torch.tensor([(n // TOKENS, n % TOKENS // 3, n % 3) for n in range(len(row))]).double()
            for i in range(first, len(row)):
                query += torch.einsum("hd,he->hde", q[i], q[i])
                queries += 1
                for j in range(first if past_only else len(row)):
                    mean += row[j]
                    second += torch.outer(row[j], row[j])
                    inverse_norm += float(s[j])
                    pairs += 1
                    angle = theta * (place[i] - place[j])[axis]
                    weight = (q_power[i] * k_power[j]).sum(0)  # over heads
                    turned += weight * torch.polar(torch.ones_like(angle), angle)
                    power += weight
    mean /= pairs
    return LayerMoments(
        mean=mean,
        covariance=second / pairs - torch.outer(mean, mean),
        inverse_norm=inverse_norm / pairs,
        query=query / queries,
        rho=turned / power,
    )


@pytest.mark.parametrize(("streaming", "present"), [(STREAMING, "latent"), (STREAMING, "exact"), (None, "latent")])
def test_moments_count_every_pair(
    folder: Path, both_ways: Path, streaming: StreamingConfig | None, present: Present
) -> None:
    """Inputs caught in the whole model, pairs counted one by one; beside an exact present, those with past keys."""
    source = folder if streaming else both_ways
    regime = dataclasses.replace(FEW, streaming=streaming, present=present)
    clips = make_clips(2, 7 if streaming else 3)
    model = load_model(source, dtype=torch.float64)
    caught: list[tuple[Tensor, int]] = []
    given: list[Tensor] = []
    model.blocks[2].self_attn.register_forward_pre_hook(lambda _, args: given.append(args[0]))  # type: ignore[union-attr]
    for w in windows(clips, regime):
        model(w.latents, w.timestep, w.context, chunks=w.chunks)
        caught.append((given[-1], (w.latents.shape[2] - w.queries) * TOKENS))
    assert any(first > 0 for _, first in caught) == (streaming is not None)
    expected = longhand_moments(model.state_dict(), "blocks.2.self_attn.", caught, past_only=present == "exact")
    with open_checkpoint(source) as checkpoint:
        found = layer_moments(nth(make_sweep(checkpoint, clips, regime), 2))
    assert found.mean.dtype == found.covariance.dtype == found.query.dtype == torch.float64
    assert found.rho.dtype == torch.complex128
    assert found.inverse_norm == pytest.approx(expected.inverse_norm, rel=EXACT)
    for name in ("mean", "covariance", "query"):
        assert relative(getattr(found, name), getattr(expected, name)) < EXACT, name
    assert relative(torch.view_as_real(found.rho), torch.view_as_real(expected.rho)) < EXACT
    if streaming:
        # Queries come after their keys in time: the sign of the rotation matters.
        assert float(found.rho[: SPLIT[0]].imag.min()) > 1e-3


def test_moments_are_summed_in_float64(folder: Path) -> None:
    """A float32 sweep's moments are those of its own float32 inputs, to more digits than float32 has."""
    with open_checkpoint(folder) as checkpoint:
        layer = nth(LayerWalk(checkpoint, make_clips(3), FEW), 0)
        found = layer_moments(layer)
    total, pairs = torch.zeros(DIM, dtype=torch.float64), 0
    for batch in layer.inputs:
        assert batch.x.dtype == torch.float32
        queries = batch.x.shape[1] - batch.first_query
        total += queries * batch.x.double().sum((0, 1))
        pairs += queries * batch.x.shape[0] * batch.x.shape[1]
    assert relative(found.mean, total / pairs) < 1e-12


@pytest.mark.parametrize("past_only", [False, True])
def test_sensitivity_is_the_mean_of_squared_jacobians(past_only: bool) -> None:
    """Longhand in complex numbers: keys and values move with x_j, the key norm and the queries do not.

    Beside an exact present only past tokens move, in one softmax with the present ones.
    """
    layer = make_layer(2, batch=1)
    copies = [dataclasses.replace(i, x=i.x.expand(3000, -1, -1), past_only=past_only) for i in layer.inputs[1:]]
    layer = dataclasses.replace(layer, inputs=copies)
    (batch,), a = layer.inputs, layer.attention
    x = batch.x[0]
    turn = torch.exp(1j * angles(torch.arange(3), 2, 3, SPLIT))

    def heads(y: Tensor) -> Tensor:
        return y.reshape(-1, HEADS, WIDTH)

    def turned(y: Tensor) -> Tensor:
        return torch.complex(y[..., 0::2], y[..., 1::2]) * turn[:, None]

    def rms(y: Tensor) -> Tensor:
        return (y.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt()

    query = turned(heads(a.q(x) / rms(a.q(x)) * a.norm_q.weight))[batch.first_query :]

    def output(read: Tensor) -> Tensor:
        key = turned(heads(a.k(read) / rms(a.k(x)) * a.norm_k.weight))
        scores = torch.einsum("nhp,mhp->hnm", query, key.conj()).real / WIDTH**0.5
        out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), heads(a.v(read)))
        return out.reshape(-1, DIM) @ a.o.weight.T + a.o.bias

    read = batch.first_query if past_only else len(x)
    jacobian = torch.autograd.functional.jacobian(output, x)[:, :, :read]  # [n, D, read, D]
    expected = torch.einsum("ndje,ndjf->ef", jacobian, jacobian) / read
    found = layer_moments(layer)
    assert found.sensitivity is not None
    assert relative(found.sensitivity, expected) < 0.05  # one random direction for each of 3,000 copies
    assert found.output_power == pytest.approx(float(output(x).square().sum()) / read, rel=1e-9)


def test_moments_survive_the_disk(tmp_path: Path) -> None:
    layer = make_layer(5)
    saved = layer_moments(layer)
    save_moments(tmp_path, 12, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-012.safetensors"]
    loaded = load_moments(tmp_path, 12, CONFIG)
    for field in dataclasses.fields(LayerMoments):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        if before is None or isinstance(before, float):
            assert before == after
        else:
            assert before.dtype == after.dtype
            assert torch.equal(before, after)


def test_a_regime_is_recorded_whole() -> None:
    """As JSON keeps it; two regimes that differ in anything are told apart."""
    assert json.loads(json.dumps(FEW.to_json())) == {
        "streaming": {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1, "positions": "window"},
        "timesteps": [900.0, 400.0],
        "noisy_past": 0.0,
        "present": "latent",
        "seed": 0,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"streaming": None},
        {"streaming": dataclasses.replace(STREAMING, window_frames=6)},
        {"timesteps": (900.0,)},
        {"noisy_past": 0.25},
        {"present": "exact"},
        {"seed": 1},
    ]
    records = [json.dumps(dataclasses.replace(FEW, **change).to_json()) for change in changes]
    assert len(set(records)) == len(records)
