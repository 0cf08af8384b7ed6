"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from calibrate_cases import FEW, STREAMING, make_clips

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.windows import BATCH, Regime, windows

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
