"""Calibration on a small checkpoint of odd sizes, against loops and least squares written out longhand in float64."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch
from calibrate_cases import FEW, STREAMING, make_clips

from mlaconvert.clips.folder import BATCH
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.errors import ConfigError

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
    found = list(windows(clips, Regime(streaming=streaming, timesteps=steps)))
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
    for w in list(windows(clips, regime))[:: 1 if streaming else 2]:  # the others are at any level
        seen.update(round(float(t), 2) for t in w.timestep[:, -1])
        counted[w.queries] += len(w.latents)
        assert bool((w.timestep[:, -w.queries :] == w.timestep[:, -1:]).all())
    share = len(clips.latents) * len(queries) // len(expected)
    assert seen == {round(t, 2): share for t in expected}
    assert counted == {n: queries.count(n) * len(clips.latents) for n in set(queries)}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.2, 1.0])
def test_a_share_of_the_pasts_is_noisy(share: float) -> None:
    """Exactly so many rows, and of every timestep alike; the others are as they are without noisy pasts."""
    clips, steps = make_clips(25), (900.0, 0.0, 300.0, 700.0, 500.0)
    regime = Regime(streaming=STREAMING, timesteps=steps)
    plain, levels, rows = list(windows(clips, regime)), [], []
    found = list(windows(clips, dataclasses.replace(regime, noisy_past=share)))
    assert len(found) == len(plain) == 4 * 4  # four batches of at most 8 clips, and four windows of each
    for p, w in zip(plain, found, strict=True):
        assert w.chunks == p.chunks is not None
        assert w.queries == p.queries
        assert torch.equal(w.context, p.context)
        parts = w.timestep.split(w.chunks, 1)
        assert all(bool((part == part[:, :1]).all()) for part in parts)
        each = torch.stack([part[:, 0] for part in parts], 1)
        noisy = each[:, -1] != p.timestep[:, -1]
        rows += noisy.tolist()
        levels.append(each[noisy].flatten())
        assert torch.equal(w.timestep[~noisy], p.timestep[~noisy])
        past, clean = (x.latents[:, :, : -w.queries].flatten(1) for x in (w, p))
        assert torch.equal(past[~noisy], clean[~noisy])
        assert not past.numel() or not torch.isclose(past, clean).all(1)[noisy].any()
    assert sum(rows) == round(share * 100)
    for step in range(5):
        assert sum(rows[step::5]) == pytest.approx(share * 20, abs=0.99)
    every = torch.cat(levels) / 1000
    assert len(every.unique()) == len(every)  # every chunk of every row has its own
    if share == 1.0:
        assert bool(((every > 0) & (every < 1)).all())
        # The mean of 5 u / (1 + 4 u) over u in [0, 1].
        assert float(every.mean()) == pytest.approx(1.25 - 5 / 16 * math.log(5), abs=0.04)


@pytest.mark.parametrize("noisy_past", [0.0, 0.5])
def test_windows_without_a_past_are_left_out_beside_an_exact_present(noisy_past: float) -> None:
    clips = make_clips(9)
    regime = Regime(streaming=STREAMING, timesteps=(900.0, 400.0), noisy_past=noisy_past)
    every = [w.chunks for w in windows(clips, regime)]
    found = list(windows(clips, dataclasses.replace(regime, present="exact")))
    assert [w.chunks for w in found] == [chunks for chunks in every if chunks != (2,)]
    assert len(found) == len(every) - 2  # one of each batch
    turns = torch.cat([w.timestep[:, -1] for w in found])
    if not noisy_past:  # and the timesteps go on in turn over those that are left
        assert torch.equal(turns, torch.tensor([900.0, 400.0]).repeat(len(turns))[: len(turns)])


def test_clips_of_one_chunk_have_no_past_that_could_be_measured() -> None:
    regime = Regime(streaming=STREAMING, timesteps=(900.0,), present="exact")
    with pytest.raises(ConfigError, match="2 latent frames are one chunk of 2"):
        regime.check_frames(2)
    regime.check_frames(3)
    dataclasses.replace(regime, present="latent").check_frames(2)
    alone = StreamingConfig(chunk_frames=2, window_frames=2, sink_frames=0)
    with pytest.raises(ConfigError, match=r"windows of 2 latent frames are one chunk of 2.*more --window-frames"):
        dataclasses.replace(regime, streaming=alone).check_frames(7)


@pytest.mark.parametrize(("few_step", "count"), [(True, 5), (False, 9)])
def test_timesteps_are_those_of_the_models_sampler(few_step: bool, count: int) -> None:
    found = Regime.of(STREAMING, few_step=few_step).timesteps
    assert len(found) == count
    assert found[-1] == 0.0
    assert list(found) == sorted(found, reverse=True)


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
