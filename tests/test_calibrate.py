"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveFolder, randomize, relative
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, MLALayer, RopeMode
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration import pieces
from mlaconvert.conversion.calibration.layer import Inputs, Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.refit import attention_error, refit_output, refit_query
from mlaconvert.conversion.calibration.run import Calibration, calibrate, refit_layers
from mlaconvert.conversion.calibration.store import load_moments, save_moments
from mlaconvert.conversion.calibration.target import ErrorTable, Target, share_budget
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import BATCH, Regime, batch_size, scratch_bytes, windows
from mlaconvert.conversion.recipe import Part
from mlaconvert.errors import OutputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.scratch import Scratch
from mlaconvert.latent.components import choose_components
from mlaconvert.latent.moments import LayerMoments, modulation_moments
from mlaconvert.latent.pairs import mean_rotation
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.load import load_model, load_widened
from mlaconvert.model.rope import angles, rotary
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel, timestep_embedding
from mlaconvert.model.window import full_window

# Heads of 14 are 7 rotary pairs, split (3, 2, 2). Clips of 4 x 6 latent pixels have 2 x 3 tokens a frame.
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
CONFIG = WanConfig(
    dim=42, num_heads=3, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4
)
HEADS, WIDTH, DIM, SPLIT = CONFIG.num_heads, CONFIG.head_dim, CONFIG.dim, CONFIG.rope_split
TOKENS = 6
SMALL = ((0, 2), (3, 1))  # rotary components
EVERY = tuple((pair, HEADS) for pair in range(WIDTH // 2))
EXACT = 1e-11
FEW = Regime(streaming=STREAMING, timesteps=(900.0, 400.0))


def native(config: WanConfig) -> dict[str, object]:
    """config.json of a native Wan checkpoint, with our streaming section."""
    fields = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim")
    data = {"_class_name": "WanModel", "model_type": "t2v", **{name: getattr(config, name) for name in fields}}
    return data | ({"streaming": dataclasses.asdict(config.streaming)} if config.streaming else {})


def make_clips(count: int, frames: int = 7, seed: int = 0) -> Clips:
    g = torch.Generator().manual_seed(seed)
    return Clips(torch.randn(count, 4, frames, 4, 6, generator=g), torch.randn(count, 5, 9, generator=g))


@pytest.fixture
def folder(save_folder: SaveFolder) -> Path:
    """A streaming checkpoint."""
    config = dataclasses.replace(CONFIG, streaming=STREAMING)
    model = WanModel(config)
    randomize(model)
    return save_folder(model.state_dict(), native(config))


@pytest.fixture
def both_ways(save_folder: SaveFolder) -> Path:
    """A bidirectional one."""
    model = WanModel(CONFIG)
    randomize(model, 1)
    return save_folder(model.state_dict(), native(CONFIG), "bidirectional")


def make_sweep(checkpoint: Checkpoint, clips: Clips, regime: Regime = FEW, probes: int = 0) -> LayerWalk:
    return LayerWalk(checkpoint, clips, regime, dtype=torch.float64, probes=probes)


def nth(sweep: LayerWalk, index: int) -> Layer:
    """One layer of a sweep, which stops there and keeps the layer's weights."""
    return next(layer for layer in sweep if layer.index == index)


def make_layer(seed: int, *, batch: int = 2) -> Layer:
    """A layer of random weights beside its inputs: a full window of five frames, and one of three."""
    attention = DenseAttention(CONFIG).double().requires_grad_(False)
    randomize(attention, seed)
    state = {name.replace(".weight", "") if "norm" in name else name.replace(".", "_"): p
             for name, p in attention.named_parameters()}  # fmt: skip
    g = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(DIM, DIM, generator=g, dtype=torch.float64)
    inputs = []
    for frames, queries in ((5, 2), (3, 1)):
        x = torch.randn(batch, frames * TOKENS, DIM, generator=g, dtype=torch.float64) @ mixing
        x = torch.nn.functional.layer_norm(x, (DIM,)) + 0.3 * mixing[0]
        turn = rotary(torch.arange(frames), 2, 3, SPLIT, torch.float64)
        plan = AttentionPlan(query_rotary=turn, key_rotary=turn)
        inputs.append(Inputs(x=x, plan=plan, first_query=(frames - queries) * TOKENS))
    return Layer(index=0, weights=AttentionWeights(**state), attention=attention, inputs=inputs)


def target(
    key_norm: KeyNorm = "token", *, q_rank: int | None = None, rope: RopeMode = "cached", v_dim: int = WIDTH
) -> Target:
    return Target(config=CONFIG, key_norm=key_norm, q_lora_rank=q_rank, rope=rope, v_dim=v_dim)


def query_weight(student: LatentAttention) -> Tensor:
    """q_b_proj's weight by head, [H, nope + rope, f]."""
    weight: Tensor = student.q_b_proj.weight  # type: ignore[assignment]
    return weight if weight.ndim == 3 else weight.unflatten(0, (HEADS, -1))


# --- windows ---------------------------------------------------------------------------------------------------------

# Frames seen and frames of each chunk, as a clip goes by.
BY_HAND = [
    (STREAMING, 7, [([0, 1], (2,)), ([0, 1, 2, 3], (2, 2)), ([0, 2, 3, 4, 5], (1, 2, 2)),
                    ([0, 3, 4, 5, 6], (1, 1, 2, 1))]),
    (StreamingConfig(chunk_frames=3, window_frames=7, sink_frames=1), 9,
     [([0, 1, 2], (3,)), ([*range(6)], (3, 3)), ([0, *range(3, 9)], (1, 3, 3))]),
    (StreamingConfig(chunk_frames=2, window_frames=3, sink_frames=0), 6,
     [([0, 1], (2,)), ([1, 2, 3], (1, 2)), ([3, 4, 5], (1, 2))]),
    (StreamingConfig(chunk_frames=2, window_frames=4, sink_frames=2), 6,
     [([0, 1], (2,)), ([0, 1, 2, 3], (2, 2)), ([0, 1, 4, 5], (2, 2))]),
]  # fmt: skip


@pytest.mark.parametrize(("streaming", "frames", "expected"), BY_HAND)
def test_windows_by_hand(
    streaming: StreamingConfig, frames: int, expected: list[tuple[list[int], tuple[int, ...]]]
) -> None:
    clips, steps = make_clips(3, frames), (900.0, 250.0, 0.0, 600.0)
    found = list(windows(clips, Regime(streaming=streaming, timesteps=steps, noisy_context=False)))
    assert len(found) == len(expected)
    noises = []
    for view, (w, (seen, chunks)) in enumerate(zip(found, expected, strict=True)):
        clean = clips.latents[:, :, seen]
        assert w.chunks == chunks
        assert w.queries == chunks[-1]
        assert torch.equal(w.context, clips.context)
        own = torch.tensor([steps[(3 * view + row) % 4] for row in range(3)])
        times = torch.zeros(3, len(seen))
        times[:, -w.queries :] = own[:, None]
        assert torch.allclose(w.timestep, times)
        assert torch.equal(w.latents[:, :, : -w.queries], clean[:, :, : -w.queries])  # context is clean
        sigma = own[:, None, None, None, None] / 1000
        noise = (w.latents - (1 - sigma) * clean)[:, :, -w.queries :]
        for row in range(3):
            if own[row] == 0:
                assert torch.equal(w.latents[row], clean[row])
            else:
                noises.append(noise[row].flatten() / sigma[row].flatten())
    every = torch.cat(noises)
    assert float(every.mean()) == pytest.approx(0, abs=0.06)
    assert float(every.std()) == pytest.approx(1, abs=0.05)
    assert all(not torch.allclose(a[:50], b[:50], atol=0.1) for i, a in enumerate(noises) for b in noises[:i])


@pytest.mark.parametrize(("streaming", "queries"), [(STREAMING, (2, 2, 2, 1)), (None, (7,))])
def test_timesteps_take_equal_shares(streaming: StreamingConfig | None, queries: tuple[int, ...]) -> None:
    """Of all windows, over batches of unequal sizes; streams clean at timestep 0, bidirectional models never."""
    regime = Regime.of(streaming)
    steps = 1000 * torch.tensor([1.0, 0.9375, 5 / 6, 0.625]) if streaming else torch.tensor(
        [1000 * 5 * s / (8 + 4 * s) for s in range(8, 0, -1)]
    )  # fmt: skip
    expected = [*steps.tolist(), *([0.0] if streaming else [])]
    assert regime.timesteps == pytest.approx(expected)
    clips = make_clips(2 * len(expected))
    assert len(clips.latents) > BATCH
    seen: Counter[float] = Counter()
    counted: Counter[int] = Counter()
    for w in windows(clips, dataclasses.replace(regime, noisy_context=False)):
        seen.update(round(float(t), 2) for t in w.timestep[:, -1])
        counted[w.queries] += len(w.latents)
        assert bool((w.timestep[:, -w.queries :] == w.timestep[:, -1:]).all())
    share = len(clips.latents) * len(queries) // len(expected)
    assert seen == {round(t, 2): share for t in expected}
    assert counted == {n: queries.count(n) * len(clips.latents) for n in set(queries)}


def test_noisy_context_adds_independent_levels() -> None:
    clips = make_clips(40)
    regime = Regime(streaming=STREAMING, timesteps=(900.0, 0.0))
    plain = list(windows(clips, dataclasses.replace(regime, noisy_context=False)))
    found = list(windows(clips, regime))
    assert len(found) == 2 * len(plain)
    levels = []
    for p, sampled, noisy in zip(plain, found[::2], found[1::2], strict=True):
        assert torch.equal(p.timestep, sampled.timestep)
        assert p.chunks == sampled.chunks == noisy.chunks
        assert p.queries == noisy.queries
        assert torch.equal(noisy.context, sampled.context)
        assert noisy.chunks is not None
        parts = noisy.timestep.split(noisy.chunks, 1)
        assert all(bool((part == part[:, :1]).all()) for part in parts)
        levels += [part[:, 0] for part in parts]
    each = torch.cat(levels) / 1000
    assert len(each.unique()) == len(each)  # every chunk of every row has its own
    assert bool(((each > 0) & (each < 1)).all())
    # The mean of 5 u / (1 + 4 u) over u in [0, 1].
    assert float(each.mean()) == pytest.approx(1.25 - 5 / 16 * math.log(5), abs=0.04)


def test_windows_depend_on_the_seed_alone() -> None:
    clips = make_clips(3)
    one, same, other = (list(windows(clips, dataclasses.replace(FEW, seed=seed))) for seed in (3, 3, 4))
    assert all(torch.equal(a.latents, b.latents) and torch.equal(a.timestep, b.timestep)
               for a, b in zip(one, same, strict=True))  # fmt: skip
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(one, other, strict=True))


def test_bidirectional_windows_are_whole_clips() -> None:
    clips = make_clips(3)
    sampled, noisy = windows(clips, Regime(streaming=None, timesteps=(800.0, 100.0)))
    assert sampled.chunks is noisy.chunks is None
    assert sampled.queries == noisy.queries == 7
    assert torch.allclose(sampled.timestep, torch.tensor([800.0, 100.0, 800.0])[:, None].expand(3, 7))
    assert bool((noisy.timestep == noisy.timestep[:, :1]).all())
    assert len(noisy.timestep[:, 0].unique()) == 3


# --- sweep -----------------------------------------------------------------------------------------------------------


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
    assert len(expected) == len(sweep.hidden) == (8 if streaming else 2)
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
    assert sweep.followed == list(range(8))
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


def test_probes_see_every_kind_of_window(folder: Path) -> None:
    """A stride through the windows would keep step with their order: always the same chunk, or never noisy context."""
    clips = make_clips(5 * BATCH)
    kinds = [(w.chunks, bool(w.timestep[:, 0].any())) for w in windows(clips, FEW)]
    with open_checkpoint(folder) as checkpoint:
        sweep = make_sweep(checkpoint, clips, probes=10)
        few = make_sweep(checkpoint, make_clips(1), probes=99)
    assert len(sweep.hidden) == 40
    assert len(set(sweep.followed)) == 10
    probed = [kinds[i] for i in sweep.followed]
    assert len({chunks for chunks, _ in probed}) == 4
    assert {noisy for _, noisy in probed if _ != (2,)} == {False, True}
    assert few.followed == list(range(8))


# --- moments ---------------------------------------------------------------------------------------------------------


def longhand_moments(state: dict[str, Tensor], prefix: str, batches: Sequence[tuple[Tensor, int]]) -> LayerMoments:
    """One (query, key) pair after the other."""
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
                for j in range(len(row)):
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


@pytest.mark.parametrize("streaming", [STREAMING, None])
def test_moments_count_every_pair(folder: Path, both_ways: Path, streaming: StreamingConfig | None) -> None:
    """Inputs caught in the whole model, pairs counted one by one."""
    source = folder if streaming else both_ways
    regime = dataclasses.replace(FEW, streaming=streaming, noisy_context=streaming is None)
    clips = make_clips(2, 7 if streaming else 3)
    model = load_model(source, dtype=torch.float64)
    caught: list[tuple[Tensor, int]] = []
    given: list[Tensor] = []
    model.blocks[2].self_attn.register_forward_pre_hook(lambda _, args: given.append(args[0]))  # type: ignore[union-attr]
    for w in windows(clips, regime):
        model(w.latents, w.timestep, w.context, chunks=w.chunks)
        caught.append((given[-1], (w.latents.shape[2] - w.queries) * TOKENS))
    assert any(first > 0 for _, first in caught) == (streaming is not None)
    expected = longhand_moments(model.state_dict(), "blocks.2.self_attn.", caught)
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


def test_sensitivity_is_the_mean_of_squared_jacobians() -> None:
    """Longhand in complex numbers: keys and values move with x_j, the key norm and the queries do not."""
    layer = make_layer(2, batch=1)
    layer = dataclasses.replace(
        layer, inputs=[dataclasses.replace(i, x=i.x.expand(3000, -1, -1)) for i in layer.inputs[1:]]
    )
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

    jacobian = torch.autograd.functional.jacobian(output, x)  # [n, D, N, D]
    expected = torch.einsum("ndje,ndjf->ef", jacobian, jacobian) / len(x)
    found = layer_moments(layer).sensitivity
    assert found is not None
    assert relative(found, expected) < 0.05  # one random direction for each of 3,000 copies


# --- refits ----------------------------------------------------------------------------------------------------------


def lossy(layer: Layer, budget: int = 13, *, q_rank: int | None = None, rope: RopeMode = "cached",
          key_norm: KeyNorm = "token") -> LatentAttention:  # fmt: skip
    made = target(key_norm, q_rank=q_rank, rope=rope)
    return made.convert(layer, made.layer(budget, () if rope == "head" else SMALL), layer_moments(layer))


def test_attention_error_is_of_counted_queries() -> None:
    """Relative Frobenius over all windows at once: what earlier queries get does not matter."""
    layer = make_layer(6)
    student = lossy(layer)
    missed, whole = [], []
    for batch in layer.inputs:
        teacher, found = layer.attention(batch.x, batch.plan), student(batch.x, batch.plan)
        missed.append((found - teacher)[:, batch.first_query :].flatten())
        whole.append(teacher[:, batch.first_query :].flatten())
    expected = float(torch.cat(missed).norm() / torch.cat(whole).norm())
    assert attention_error(layer, student) == pytest.approx(expected, rel=1e-9)
    assert 0.05 < expected < 0.9


@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 0.3])
def test_refit_output_is_ridge_regression(ridge: float) -> None:
    """Stacked rows and lstsq: tokens, and rows that hold each weight where it was; the bias is free."""
    layer = make_layer(0, batch=3)
    student = lossy(layer)
    before, old = attention_error(layer, student), student.o.weight.clone()
    caught: list[Tensor] = []
    hook = student.o.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    expected = []
    for batch in layer.inputs:
        student(batch.x, batch.plan)
        caught[-1] = caught[-1][:, batch.first_query :].flatten(0, 1)
        expected.append(layer.attention(batch.x, batch.plan)[:, batch.first_query :].flatten(0, 1))
    hook.remove()
    heads, teacher = torch.cat(caught), torch.cat(expected)
    hold = (len(heads) * ridge * heads.var(0, correction=0).mean()).sqrt()
    stay = torch.cat((hold * torch.eye(DIM).double(), torch.zeros(DIM, 1).double()), 1)
    rows = torch.cat((torch.cat((heads, torch.ones(len(heads), 1).double()), 1), stay))
    solution = torch.linalg.lstsq(rows, torch.cat((teacher, hold * old.T)), driver="gelsd").solution
    refit_output(layer, student, ridge=ridge)
    assert relative(student.o.weight, solution[:-1].T) < 1e-7
    assert relative(student.o.bias, solution[-1]) < 1e-7
    assert attention_error(layer, student) < 0.97 * before


@pytest.mark.parametrize("seed", range(4))
def test_refit_output_never_loses_on_what_it_saw(seed: int) -> None:
    layer = make_layer(seed)
    errors = []
    for ridge in (1e-9, 1e-3, 1e-1, 1e3):
        student = lossy(layer, key_norm="latent")
        before = attention_error(layer, student)
        refit_output(layer, student, ridge=ridge)
        errors.append(attention_error(layer, student))
        assert errors[-1] <= before * (1 + EXACT)
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def score_problem(layer: Layer, student: LatentAttention, head: int) -> tuple[Tensor, Tensor]:
    """Rows [pairs, width * f] and targets [pairs] of the weighted score error of one head, query by query.

    A student's score is linear in the query up-projection: scale * (W features) . key, its rotary part turned by the
    distance from query to key, as complex numbers.
    """
    a, shape = layer.attention, student.layer
    scale, own = WIDTH**-0.5, slice(head * WIDTH, head * WIDTH + WIDTH)
    up, _, bias = (part[head] for part in student.kv_b_proj())
    rows, targets = [], []

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * gain

    for batch in layer.inputs:
        turn = torch.exp(1j * angles(torch.arange(batch.x.shape[1] // TOKENS), 2, 3, SPLIT))
        for x in batch.x:
            q = normed(a.q(x), a.norm_q.weight)[:, own]
            k = normed(a.k(x), a.norm_k.weight)[:, own]
            q, k = (torch.complex(y[:, 0::2], y[:, 1::2]) * turn for y in (q, k))
            cached = student.kv_a_proj_with_mqa(x)
            latent, rope = cached[:, : shape.kv_lora_rank], cached[:, shape.kv_lora_rank :]
            if student.k_norm_proj is not None:
                s = 1 / (a.k(x).square().mean(-1, keepdim=True) + CONFIG.eps).sqrt()
            else:
                s, latent = torch.ones(len(x), 1).double(), normed(latent, student.kv_a_layernorm.weight)  # type: ignore[union-attr]
            if student.k_rope_proj is not None:
                rope = latent @ student.k_rope_proj.weight.T + student.k_rope_proj.bias
            keys, pairs = s * (latent @ up.T + bias), list(shape.component_pairs)
            if student.turns_heads:
                rope, keys, s = keys, keys[:, :0], torch.ones(len(x), 1).double()
                pairs = list(range(WIDTH // 2))
            shared = s * torch.complex(rope[:, 0::2], rope[:, 1::2]) * turn[:, pairs]
            features = normed(student.q_a_proj(x), student.q_a_layernorm.weight)
            features = features[:, own] if query_weight(student).shape[2] == WIDTH else features
            for i in range(batch.first_query, len(x)):
                scores = (q[i] * k.conj()).real.sum(1) * scale
                p = (scores - scores.max()).exp()
                p = p / p.sum()
                back = torch.view_as_real(shared * turn[i, pairs].conj()).flatten(1)
                key = torch.cat((keys, back), 1) * scale
                key, scores = key - p @ key, scores - p @ scores
                rows.append(p.sqrt()[:, None] * (key[:, :, None] * features[i]).flatten(1))
                targets.append(p.sqrt() * scores)
    return torch.cat(rows), torch.cat(targets)


def score_error(layer: Layer, student: LatentAttention) -> float:
    total = 0.0
    for head in range(HEADS):
        rows, targets = score_problem(layer, student, head)
        total += float((rows @ query_weight(student)[head].flatten() - targets).square().sum())
    return total


@pytest.mark.parametrize(
    ("q_rank", "rope", "key_norm"),
    [(None, "cached", "token"), (None, "latent", "latent"), (9, "latent", "token"), (None, "head", "token")],
)
def test_refit_query_solves_the_normal_equations(q_rank: int | None, rope: RopeMode, key_norm: KeyNorm) -> None:
    layer = make_layer(1)
    student = lossy(layer, q_rank=q_rank, rope=rope, key_norm=key_norm)
    problems = [score_problem(layer, student, head) for head in range(HEADS)]
    old = query_weight(student).clone()
    refit_query(layer, student, samples=10**6, ridge=1e-2, iterations=500)
    for head, (rows, targets) in enumerate(problems):
        width = rows.shape[1]
        hold = 1e-2 * rows.square().sum() / width * torch.eye(width, dtype=torch.float64)
        solution = torch.linalg.solve(rows.T @ rows + hold, rows.T @ targets + hold @ old[head].flatten())
        assert relative(query_weight(student)[head].flatten(), solution) < 1e-8
    # And without a ridge, the least error that any up-projection has.
    refit_query(layer, student, samples=10**6, ridge=1e-12, iterations=3000)
    for head, (rows, targets) in enumerate(problems):
        best = torch.linalg.lstsq(rows, targets, driver="gelsd").solution
        least = float((rows @ best - targets).square().sum())
        found = float((rows @ query_weight(student)[head].flatten() - targets).square().sum())
        assert least < 0.97 * float((rows @ old[head].flatten() - targets).square().sum())
        assert found == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("q_rank", [None, 30])
def test_refit_query_mends_a_perturbed_query(q_rank: int | None) -> None:
    """Judged on inputs that it did not see."""
    layer = make_layer(2, batch=20)
    seen = dataclasses.replace(layer, inputs=[dataclasses.replace(i, x=i.x[:16]) for i in layer.inputs])
    unseen = dataclasses.replace(layer, inputs=[dataclasses.replace(i, x=i.x[16:]) for i in layer.inputs])
    student = lossy(seen, 24, q_rank=q_rank)
    right = attention_error(unseen, student)
    noise = torch.randn(query_weight(student).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query_weight(student).add_(0.3 * noise)
    perturbed, before = attention_error(unseen, student), score_error(unseen, student)
    assert perturbed > 1.2 * right
    refit_query(seen, student)
    assert score_error(unseen, student) < 0.5 * before
    assert attention_error(unseen, student) < right + 0.3 * (perturbed - right)


@pytest.mark.parametrize("q_rank", [None, DIM])
def test_refits_leave_a_lossless_student_alone(q_rank: int | None) -> None:
    layer, made = make_layer(3), target(q_rank=q_rank)
    student = made.convert(layer, made.layer(84, EVERY), layer_moments(layer))
    query, output = query_weight(student).clone(), student.o.weight.clone()
    assert attention_error(layer, student) < 1e-9
    refit_query(layer, student)
    refit_output(layer, student)
    assert relative(query_weight(student), query) < 1e-7
    assert relative(student.o.weight, output) < 1e-7
    assert attention_error(layer, student) < 1e-7


def test_refit_query_holds_on_with_a_strong_ridge() -> None:
    layer = make_layer(4)
    moved = []
    for ridge in (1e-4, 1e-1, 1e6):
        student = lossy(layer)
        old = query_weight(student).clone()
        refit_query(layer, student, ridge=ridge)
        moved.append(relative(query_weight(student), old))
    assert moved[0] > 2 * moved[1] > 1e-3
    assert moved[2] < 1e-4


def test_refit_query_lowers_the_attention_error() -> None:
    """The score error is a proxy: on most layers, what it was fitted to gets better, with or without a fit of W_O."""
    alone = together = 0
    for seed in range(6):
        layer = make_layer(seed, batch=4)
        student = lossy(layer, 16)
        before = attention_error(layer, student)
        refit_query(layer, student, samples=10**6)
        alone += attention_error(layer, student) < 0.99 * before
        other = lossy(layer, 16)
        refit_output(layer, other)
        refit_output(layer, student)
        together += attention_error(layer, student) < attention_error(layer, other)
    assert min(alone, together) >= 5


# --- targets and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["weights", "components"])
def test_components_are_chosen_without_the_part_that_is_switched_off(off: Part) -> None:
    layer = make_layer(4)
    moments = layer_moments(layer)
    uneven = torch.logspace(-3, 3, HEADS, dtype=torch.float64)  # weighted, the last head's queries decide
    moments = dataclasses.replace(moments, query=moments.query * uneven[:, None, None])
    found = dataclasses.replace(target(), without=(off,)).components(layer.weights, moments, [5])
    whole = {"several": True, "weighted": True}
    part = {"weights": "weighted", "components": "several"}[off]
    chosen = partial(choose_components, layer.weights, moments, num_heads=HEADS, counts=[5])
    assert found == chosen(**whole | {part: False}) != chosen(**whole)


def test_layer_arithmetic() -> None:
    made = target(v_dim=11)
    assert made.layer(13, SMALL) == MLALayer(
        kv_lora_rank=7, qk_nope_head_dim=WIDTH - 6, v_head_dim=11, rope_components=SMALL
    )
    assert made.layer(50, EVERY).qk_nope_head_dim == 0
    assert made.layer(50, EVERY).kv_lora_rank == 8
    assert dataclasses.replace(made, nope_dim=5).layer(13, SMALL).qk_nope_head_dim == 5
    assert dataclasses.replace(made, nope_dim=9).layer(13, SMALL).qk_nope_head_dim == min(9, WIDTH - 6)
    section = target("latent", q_rank=9, rope="latent").mla([made.layer(13, SMALL), None], {"clips": 3})
    assert section.softmax_scale == pytest.approx(WIDTH**-0.5)
    assert (section.q_lora_rank, section.key_norm, section.rope) == (9, "latent", "latent")
    assert section.calibration == {"clips": 3}
    assert [section.cached_scalars(i, 84) for i in range(2)] == [7, 84]
    read, whole = target(rope="latent").layer(13, SMALL), target(rope="head").layer(13, ())
    assert (read.kv_lora_rank, read.qk_nope_head_dim) == (13, WIDTH - 6)
    assert (whole.kv_lora_rank, whole.qk_nope_head_dim) == (13, WIDTH)


@pytest.mark.parametrize("rope", ["cached", "latent"])
@pytest.mark.parametrize("key_norm", ["token", "latent"])
@pytest.mark.parametrize("q_rank", [None, 30])
def test_more_budget_loses_less(folder: Path, rope: RopeMode, key_norm: KeyNorm, q_rank: int | None) -> None:
    made = target(key_norm, q_rank=q_rank, rope=rope)
    with open_checkpoint(folder) as checkpoint:
        layer = nth(make_sweep(checkpoint, make_clips(3)), 1)
        moments = layer_moments(layer)
        tight, roomy, full = (
            attention_error(layer, made.convert(layer, made.layer(budget, components), moments))
            for budget, components in ((7, SMALL), (24, SMALL), (84, EVERY))
        )
    assert tight > 1.15 * roomy > 1.3 * full
    if (key_norm, q_rank) == ("token", None):
        assert full < 1e-9
    else:
        assert 1e-4 < full < 0.5


def test_converted_modules_take_the_layers_dtype(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        layer = nth(LayerWalk(checkpoint, make_clips(1), FEW), 0)
        student = target().convert(layer, target().layer(84, EVERY), layer_moments(layer))
        refit_query(layer, student)
        refit_output(layer, student)
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in student.parameters())
        assert attention_error(layer, student) < 1e-4


def test_measured_errors_are_those_of_conversions(folder: Path) -> None:
    made = target()
    with open_checkpoint(folder) as checkpoint:
        layer = nth(make_sweep(checkpoint, make_clips(2 * BATCH)), 1)
        moments = layer_moments(layer)
        table = made.measure(layer, moments, counts=(1, 4), budgets=(8, 9, 14), inputs=99)
        assert {count: set(curve) for count, curve in table.errors.items()} == {1: {8, 9, 14}, 4: {9, 14}}
        for count, components in table.components.items():
            assert sum(n for _, n in components) == count
            for budget, error in table.errors[count].items():
                student = made.convert(layer, made.layer(budget, components), moments)
                refit_output(layer, student)
                assert error == pytest.approx(attention_error(layer, student), rel=1e-9)
        few = made.measure(layer, moments, counts=(4,), budgets=(9,), inputs=3)
        assert few.components[4] == table.components[4]
        assert few.errors[4][9] != table.errors[4][9]
        assert few.errors[4][9] == pytest.approx(table.errors[4][9], rel=0.3)


def test_best_split_by_hand() -> None:
    two, four = ((0, 1), (3, 1)), ((0, 4),)
    table = ErrorTable(
        components={2: two, 4: four, 5: ((1, 5),)},
        errors={2: {6: 0.4, 10: 0.1}, 4: {9: 0.3, 12: 0.03}, 5: {}},
    )
    for budget, error, components in (
        (6, 0.4, two),
        (8, 0.2, two),  # the geometric mean; four components were not measured there
        (9, 0.4 * 0.25**0.75, two),
        (11, 0.3 * 0.1 ** (2 / 3), four),
        (12, 0.03, four),
        (15, 0.003, four),
    ):
        assert table.best(budget)[0] == pytest.approx(error)
        assert table.best(budget)[1] == components
    with pytest.raises(ValueError):
        table.best(5)
    lone = ErrorTable(components={2: two}, errors={2: {7: 0.2}})
    assert lone.best(7) == lone.best(30) == (0.2, two)


def falling(start: float, smallest: int = 4, halving: float = 5.0) -> ErrorTable:
    """Errors that halve every `halving` scalars, so squared ones fall by 2^(-2 / halving) a scalar."""
    return ErrorTable(
        components={1: ((0, 1),)}, errors={1: {b: start * 0.5 ** (b / halving) for b in (smallest, 30, 60)}}
    )


def test_budgets_are_shared_by_what_layers_lose() -> None:
    """Equal slopes: budgets differ by halving / 2 * log2 of the ratio of sensitivities, whatever the tables' units."""
    tables, sensitive = [falling(1.0), falling(7.0), falling(0.2)], (1.0, 8.0, 0.5)
    found = share_budget(tables, sensitive, 20, largest=99)
    assert sum(found) == 60
    assert found[1] - found[0] == pytest.approx(2.5 * 3, abs=1.5)
    assert found[0] - found[2] == pytest.approx(2.5 * 1, abs=1.5)
    assert share_budget(tables, (3.0, 3.0, 3.0), 20, largest=99) == [20, 20, 20]
    wide = share_budget(tables[:2], (1.0, 1e9), 20, largest=99)
    assert wide == [8, 32]  # 1 / 2.4 of the average
    assert share_budget([falling(1.0)] * 3, (1.0, 1e9, 1e9), 20, largest=99, spread=1.25) == [16, 22, 22]
    assert share_budget([falling(1.0, 17), falling(1.0)], (1.0, 1e9), 20, largest=99) == [
        17,
        23,
    ]  # no less than was measured


# --- moments on disk -------------------------------------------------------------------------------------------------


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
        "noisy_context": True,
        "seed": 0,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"streaming": None},
        {"streaming": dataclasses.replace(STREAMING, window_frames=6)},
        {"timesteps": (900.0,)},
        {"noisy_context": False},
        {"seed": 1},
    ]
    records = [json.dumps(dataclasses.replace(FEW, **change).to_json()) for change in changes]
    assert len(set(records)) == len(records)


# --- what calibration is for -----------------------------------------------------------------------------------------


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
            checkpoint,
            clips,
            FEW,
            made,
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
        refitted = refit_layers(checkpoint, clips, FEW, made, calibration)
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


@pytest.mark.parametrize("finished", [(), (0,), (0, 2)])
def test_a_killed_sweep_goes_on_behind_the_finished_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[int, ...]
) -> None:
    """The same tensors, errors and losses; layers whose results were lost are passed again."""
    clips, made = make_clips(4), target("token")
    shape = made.layer(13, SMALL)
    passed: list[int] = []
    with open_checkpoint(folder) as checkpoint:
        for layer in LayerWalk(checkpoint, clips, FEW):
            save_moments(tmp_path, layer.index, layer_moments(layer))
        calibration = Calibration(folder=tmp_path, layers={0: shape, 2: shape})

        def refit(losses: dict[str, float], **again: Any) -> Iterator[tuple[int, dict[str, Tensor], dict[str, float]]]:
            return refit_layers(
                checkpoint, clips, FEW, made, calibration, validation=make_clips(1, seed=7), losses=losses, **again
            )

        whole: dict[str, float] = {}
        expected = {index: (tensors, errors) for index, tensors, errors in refit(whole)}
        state = tmp_path / "state"
        state.mkdir()
        interrupted = refit({}, state=state)
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
        losses: dict[str, float] = {}
        again = {index: (tensors, errors) for index, tensors, errors in refit(losses, state=state, finished=finished)}
    assert passed == {(): [0, 1, 2], (0,): [2], (0, 2): []}[finished]
    assert losses == whole
    assert len(set(whole.values())) == len(whole)  # every stage is followed as it was
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
    "a hidden state is missing": lambda t: t.pop("hidden 5"),
    "a hidden state of another shape": lambda t: t.update({"hidden 5": t["hidden 5"][:, :-1].clone()}),
    "one clip instead of two": lambda t: t.update({"hidden 5": t["hidden 5"][:1].clone()}),
    "of another dtype": lambda t: t.update({"hidden 5": t["hidden 5"].double()}),
    "not finite": lambda t: t["hidden 5"][1, 2, 3].fill_(torch.nan),
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
        assert {"hidden 5", "stream low rank 1"} <= tensors.keys()
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
        expected = scratch_bytes(checkpoint.config, clips.latents.shape, regime, followed=3)
    assert 0.85 * expected < taken < 1.05 * expected
