"""Schedules and rollouts against loops written out longhand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import randomize, relative
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.rollout import CacheUse, Given, Images, LatentSize, chunk_noise, passes, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

H, W = 4, 6
LAYER = MLALayer(kv_lora_rank=7, qk_nope_head_dim=8, v_head_dim=11, rope_components=((0, 1), (2, 2)))
MLA = MLAConfig(q_lora_rank=17, key_norm="token", softmax_scale=0.3, layers=(LAYER, None))
CONFIG = WanConfig(
    dim=60,
    num_heads=5,
    num_layers=2,
    ffn_dim=20,
    freq_dim=8,
    text_dim=9,
    text_len=4,
    in_dim=3,
    out_dim=3,
    streaming=StreamingConfig(chunk_frames=2, window_frames=5),
    mla=MLA,
)
FEW = Sampler.few_step((1000, 400))


@pytest.fixture(scope="module")
def model() -> WanModel:
    made = WanModel(CONFIG).requires_grad_(False)
    randomize(made)
    return made


def text(seed: int, batch: int = 2, tokens: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 9, generator=torch.Generator().manual_seed(seed))


def run(model: WanModel, context: Any, frames: int = 6, sampler: Sampler = FEW, **options: Any) -> Tensor:
    """A rollout whole; `options` are its own and the fields of `Given` and `CacheUse`."""
    given, cache = (
        {field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options}
        for kind in (Given, CacheUse)
    )
    options |= {"given": Given(**given), "cache": CacheUse(**cache)}
    size = LatentSize(frames=frames, height=H, width=W)
    return torch.cat(list(rollout(model, context, size=size, sampler=sampler, **options)), 2)


def test_the_few_step_schedule_is_self_forcings() -> None:
    assert Sampler.few_step().timesteps == pytest.approx((1000, 937.5, 833.3333, 625))
    assert Sampler.few_step((900, 100), shift=1).timesteps == pytest.approx((900, 100))
    many = Sampler.many_step(4, shift=3).timesteps
    assert many == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": ()}, "must descend"),
        ({"timesteps": (500.0, 500.0)}, "must descend"),
        ({"timesteps": (1001.0,)}, "must descend"),
        ({"timesteps": (500.0, 0.0)}, "must descend"),
        ({"timesteps": (500.0,), "guidance": -1.0}, "guidance is -1"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(renoise=True, **options)  # type: ignore[arg-type]


def test_a_rollout_continues_what_it_is_given(model: WanModel) -> None:
    """By hand: the clean pass of the prefix, then the second chunk's two steps from the noise of its place."""
    context, prefix = text(1), torch.randn(2, 3, 2, H, W, generator=torch.Generator().manual_seed(3))
    found = run(model, context, prefix=prefix)
    assert torch.equal(found[:, :, :2], prefix)
    assert found.shape == (2, 3, 6, H, W)
    assert relative(run(model, context, prefix=prefix.flip(0))[:, :, 2:], found[:, :, 2:]) > 1e-3
    x, again = chunk_noise((0, 1), 2, (3, 2, H, W), 2)
    cache = LatentCache(model.config, batch=2, height=H, width=W)
    model(prefix, torch.zeros(2), context, cache=cache)
    levels = [t / 1000 for t in FEW.timesteps]
    clean = x - levels[0] * model(x, torch.full((2,), 1000 * levels[0]), context, cache=cache, start_frame=2)
    x = (1 - levels[1]) * clean + levels[1] * again
    x = x - levels[1] * model(x, torch.full((2,), 1000 * levels[1]), context, cache=cache, start_frame=2)
    assert relative(found[:, :, 2:4], x) < 1e-5


def test_many_steps_are_eulers(model: WanModel) -> None:
    """By hand, the first chunk: along the velocity from one level to the next, and to zero at last; no new noise."""
    sampler, context = Sampler.many_step(3, shift=2), text(1)
    (x,) = chunk_noise((0, 1), 0, (3, 2, H, W), 1)
    levels = [1.0, 0.8, 0.5]  # of 1, 2/3 and 1/3: 2 s / (1 + s)
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (following - level) * model(x, torch.full((2,), 1000 * level), context, chunks=[2])
    assert relative(run(model, context, frames=2, sampler=sampler), x) < 1e-5


@pytest.mark.parametrize("sampler", [FEW, Sampler.many_step(3, shift=2)])
def test_continuing_ones_own_frames_gives_the_same_video(model: WanModel, sampler: Sampler) -> None:
    whole = run(model, text(1), frames=11, sampler=sampler)
    for done in (2, 8):
        assert relative(run(model, text(1), frames=11, sampler=sampler, prefix=whole[:, :, :done]), whole) < 1e-5


def test_noise_depends_on_the_seed_and_the_place_alone() -> None:
    one = chunk_noise((5,), 6, (3, 2, H, W), 2)
    both = chunk_noise((4, 5), 6, (3, 2, H, W), 2)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(one, both, strict=True))
    shape = (3, 2, H, W)
    others = [
        chunk_noise((seed,), start, shape, 1)[0] for seed, start in ((5, 7), (6, 6), (5 + 2**8, 6), (5 + 2**31, 6))
    ]
    others += [one[1], both[0][:1]]
    assert all(not torch.equal(one[0], other) for other in others)
    assert abs(float(torch.stack(chunk_noise(range(20), 3, shape, 5)).std()) - 1) < 0.03


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_slices_and_single_videos_equal_the_batch(model: WanModel, guidance: float) -> None:
    """Each with its own seed, prompt, and prefix."""
    sampler = Sampler.few_step((1000, 400), guidance=guidance)
    context, empty = text(1, 3), text(2, 1, 3)
    prefix = torch.randn(3, 3, 2, H, W, generator=torch.Generator().manual_seed(3))
    options = {"sampler": sampler, "null_context": empty}
    whole = run(model, context, seed=(7, 3, 9), prefix=prefix, **options)
    sliced = run(model, context, seed=(7, 3, 9), prefix=prefix, slice_size=2, keeps_text=False, **options)
    assert relative(sliced, whole) < 1e-5
    alone = run(model, context[1:2], seed=3, prefix=prefix[1:2], **options)
    assert relative(alone, whole[1:2]) < 1e-5


def test_guidance_mixes_two_predictions(model: WanModel) -> None:
    """One chunk of one step: the guided velocity by hand, the empty prompt shorter than the prompt."""
    sampler = Sampler(timesteps=(800.0,), renoise=True, guidance=3.0)
    context, empty = text(1, tokens=3), text(2, 1)
    x = chunk_noise((0, 1), 0, (3, 2, H, W), 1)[0]
    t = torch.full((2,), 800.0)
    yes, no = model(x, t, context, chunks=[2]), model(x, t, empty.expand(2, -1, -1), chunks=[2])
    found = run(model, context, frames=2, sampler=sampler, null_context=empty)
    assert relative(found, x - 0.8 * (no + 3 * (yes - no))) < 1e-5


def test_prompts_change_at_chunk_boundaries(model: WanModel) -> None:
    """The second prompt begins at frame 3: chunks of 2, so it takes effect with the chunk at frame 4."""
    one, two, three = text(1), text(2, tokens=4), text(3)
    found = run(model, [(0, one), (3, two), (6, three), (7, one)], frames=10)
    first = run(model, one, frames=10)
    assert relative(found[:, :, :4], first[:, :, :4]) < 1e-6
    assert relative(found[:, :, 4:6], first[:, :, 4:6]) > 1e-3
    # A prompt that is over before its first chunk begins is never seen.
    assert torch.equal(run(model, [(0, one), (3, three), (4, two)])[:, :, 4:6], found[:, :, 4:6])
    # What was made so far, continued with the next prompt alone.
    assert relative(run(model, two, frames=6, prefix=first[:, :, :4])[:, :, 4:6], found[:, :, 4:6]) > 1e-6
    cache = LatentCache(model.config, batch=2, height=H, width=W)
    for start, prompt in ((0, one), (2, one), (4, two)):
        if start < 4:
            model(found[:, :, start : start + 2], torch.zeros(2), prompt, cache=cache, start_frame=start)
    x, again = chunk_noise((0, 1), 4, (3, 2, H, W), 2)
    levels = [t / 1000 for t in FEW.timesteps]
    clean = x - levels[0] * model(x, torch.full((2,), FEW.timesteps[0]), two, cache=cache, start_frame=4)
    x = torch.lerp(clean, again, levels[1])
    x = x - levels[1] * model(x, torch.full((2,), FEW.timesteps[1]), two, cache=cache, start_frame=4)
    assert relative(found[:, :, 4:6], x) < 1e-5


def test_image_conditioning_follows_the_chunks() -> None:
    """Image latents of each chunk's own frames, and CLIP features."""
    config = dataclasses.replace(CONFIG, in_dim=5, image_dim=10)
    model = WanModel(config).requires_grad_(False)
    randomize(model)
    g = torch.Generator().manual_seed(5)
    images = Images(latents=torch.randn(1, 2, 4, H, W, generator=g), features=torch.randn(1, 3, 10, generator=g))
    sampler, context = Sampler(timesteps=(600.0,), renoise=True), text(1)
    found = run(model, context, frames=4, sampler=sampler, images=images)
    assert images.latents is not None
    assert images.features is not None
    cache = LatentCache(config, batch=2, height=H, width=W)
    for start in (0, 2):
        x = chunk_noise((0, 1), start, (3, 2, H, W), 1)[0]
        given = {
            "image_latents": images.latents[:, :, start : start + 2].expand(2, -1, -1, -1, -1),
            "image_features": images.features.expand(2, -1, -1),
            "cache": cache,
            "start_frame": start,
        }
        x = x - 0.6 * model(x, torch.full((2,), 600.0), context, **given)  # type: ignore[arg-type]
        model(x, torch.zeros(2), context, **given)  # type: ignore[arg-type]
        assert relative(found[:, :, start : start + 2], x) < 1e-5


@pytest.mark.parametrize(("given", "slices"), [(0, 1), (4, 1), (0, 2)])
def test_passes_are_counted(model: WanModel, given: int, slices: int) -> None:
    calls: list[int] = []
    options = {"prefix": torch.zeros(2, 3, given, H, W) if given else None, "slice_size": 2 // slices}
    run(model, text(1), frames=7, on_step=lambda: calls.append(1), **options)
    assert len(calls) == passes(7, FEW, CONFIG.streaming, given=given, slices=slices)


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (text(1), {"prefix": torch.zeros(2, 3, 1, H, W)}, "whole chunks of 2"),
        (text(1), {"prefix": torch.zeros(1, 3, 2, H, W)}, r"prefix is \[1, 3, 2, 4, 6\]; expected \[2, 3, up to 6"),
        (text(1), {"prefix": torch.zeros(2, 3, 8, H, W)}, "prefix is"),
        (text(1), {"sampler": Sampler.few_step(guidance=2)}, "needs the embedding of an empty prompt"),
        (text(1), {"seed": (1, 2, 3)}, "3 seeds for 2 videos"),
        (text(1), {"slice_size": 0}, "slice_size is 0"),
        ([], {}, "the first must begin at 0"),
        ([(1, text(1))], {}, "the first must begin at 0"),
        ([(0, text(1)), (0, text(2))], {}, "the first must begin at 0"),
        ([(0, text(1)), (2, text(2, 3))], {}, r"for \[2, 3\] videos"),
    ],
)
def test_wrong_rollouts_are_refused(model: WanModel, context: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(model, context, **options)  # type: ignore[arg-type]
