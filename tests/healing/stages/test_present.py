"""Passes of healing beside an exact present, each against the public model and its cache."""

from __future__ import annotations

import pytest
import torch
from heal_cases import HEIGHT, STREAMING, WIDTH, beside_present, make_batch, model, streamed

from mlaconvert.config.mla import RopeMode
from mlaconvert.healing.frames import chunk_velocity, forcing_layout, velocity, views
from mlaconvert.model.cache import LatentCache


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("rope", ["head", "latent", "cached"])
def test_a_chunk_through_the_latent_cache_is_the_models_own(rope: RopeMode, live: bool) -> None:
    """The fourth chunk: the window is full, and its slots lie between those of its past."""
    net, g = model(beside_present(rope), 2), torch.Generator().manual_seed(5)
    chunks = torch.randn(3, 3, 8, HEIGHT, WIDTH, generator=g).double().split(2, 2)
    context = torch.randn(3, 4, 10, generator=g).double()
    cache = LatentCache(net.config, batch=3, height=HEIGHT, width=WIDTH, dtype=torch.float64)
    for i, clean in enumerate(chunks[:3]):
        chunk_velocity(net, clean, 0.0, context, cache, 2 * i)
    found = chunk_velocity(net, chunks[3], 600.0, context, cache, 6, live=live)
    expected = streamed(net, list(chunks[:3]), chunks[3], torch.full((3,), 600.0).double(), context)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rope", ["head", "latent", "cached"])
def test_teacher_forcing_in_one_pass_is_streaming_behind_clean_chunks(rope: RopeMode) -> None:
    net, batch = model(beside_present(rope), 2), make_batch()
    (view,) = views(4, STREAMING)
    g = torch.Generator().manual_seed(6)
    noisy = torch.randn(batch.latents.shape, generator=g).double()
    latents = torch.cat((batch.latents[:, :, :2], noisy), 2)
    levels = torch.tensor([0.0, 0.0, 700.0, 700.0, 300.0, 300.0]).double().expand(3, -1)
    found = velocity(net, latents, levels, batch.context, forcing_layout(view, STREAMING))[:, :, 2:]
    parts = [
        streamed(net, [], noisy[:, :, :2], torch.full((3,), 700.0).double(), batch.context),
        streamed(net, [batch.latents[:, :, :2]], noisy[:, :, 2:], torch.full((3,), 300.0).double(), batch.context),
    ]
    torch.testing.assert_close(found, torch.cat(parts, 2).float(), rtol=1e-6, atol=1e-6)
