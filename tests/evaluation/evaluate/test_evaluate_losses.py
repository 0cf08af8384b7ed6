"""Fidelity, drift, cache and speed of a converted model beside its teacher, against references written longhand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import STREAMING
from support import relative

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.evaluation import drift
from mlaconvert.evaluation import losses as losses_module
from mlaconvert.evaluation.drift import RolloutPlan, compare_videos, frame_statistics, paired_rollouts
from mlaconvert.evaluation.losses import measure_fidelity, noisy_batches
from mlaconvert.evaluation.timesteps import CleanPast, TimestepError, has_past, velocity_by_timestep
from mlaconvert.model.blocks import Block
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import Given, LatentSize, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel


@pytest.fixture(scope="session")
def student(made: Path) -> WanModel:
    return load_model(made / "small")


def test_losses_and_errors_are_those_of_each_model_alone(teacher: WanModel, student: WanModel, clips: Clips) -> None:
    """Layer by layer beside the teacher, or model by model with hooks: the same figures."""
    found = measure_fidelity(teacher, student, clips, seed=4)
    inputs: list[list[torch.Tensor]] = [[] for _ in teacher.blocks]
    outputs: list[list[torch.Tensor]] = [[] for _ in teacher.blocks]
    plans: list[Any] = []
    hooks = []
    for i, block in enumerate(teacher.blocks):

        def keep(module: Any, arguments: Any, output: torch.Tensor, i: int = i) -> None:
            inputs[i].append(arguments[0])
            outputs[i].append(output)
            plans.append(arguments[1])

        hooks.append(block.self_attn.register_forward_hook(keep))  # type: ignore[union-attr, operator]
    losses = torch.zeros(2, dtype=torch.float64)
    both: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for batch in noisy_batches(teacher, clips, seed=4):
            for k, model in enumerate((teacher, student)):
                velocity = model(batch.noisy, batch.timestep, batch.context)
                losses[k] += (velocity - batch.target).double().square().sum()
                both[k].append(velocity)
        for hook in hooks:
            hook.remove()
        errors = [
            relative(
                torch.cat([student.blocks[i].self_attn(x, plans[0]) for x in inputs[i]]),  # type: ignore[union-attr, operator]
                torch.cat(outputs[i]),
            )
            for i in range(3)
        ]
    assert found.attention_errors == pytest.approx(errors, rel=1e-4)
    assert found.teacher_loss == pytest.approx(float(losses[0]) / clips.latents.numel(), rel=1e-6)
    assert found.student_loss == pytest.approx(float(losses[1]) / clips.latents.numel(), rel=1e-6)
    assert found.velocity_error == pytest.approx(relative(torch.cat(both[1]), torch.cat(both[0])), rel=1e-5)
    assert min(found.attention_errors) > 0.01


def test_the_teachers_attention_is_computed_once(teacher: WanModel, student: WanModel, clips: Clips) -> None:
    """And all figures are, bit for bit, those of attention on its own and of whole blocks."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hooks = [block.self_attn.register_forward_hook(count) for block in teacher.blocks]  # type: ignore[union-attr, operator]
    found = measure_fidelity(teacher, student, clips, seed=4)
    for hook in hooks:
        hook.remove()
    batches = losses_module.noisy_batches(teacher, clips, seed=4)
    assert calls[0] == len(batches) * len(teacher.blocks)
    sums = torch.zeros(2, len(teacher.blocks), dtype=torch.float64)
    losses = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            p = teacher.prepare(batch.noisy, batch.timestep, batch.context)
            x = p.x
            for i, (block, pupil) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
                assert isinstance(block, Block)
                assert isinstance(pupil, Block)
                inputs = block.attention_input(x, p.modulation)
                expected = block.self_attn(inputs, p.plan)
                sums[0, i] += (pupil.self_attn(inputs, p.plan) - expected).double().square().sum()
                sums[1, i] += expected.double().square().sum()
                x = block(x, p.modulation, p.text, p.image, p.plan, None)
            losses += (teacher.finish(x, p).float() - batch.target).square().sum().double()
    assert found.attention_errors == tuple((sums[0] / sums[1]).sqrt().tolist())
    assert found.teacher_loss == float(losses / clips.latents.numel())


def test_clips_of_many_tokens_go_in_smaller_batches(
    teacher: WanModel, student: WanModel, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_fidelity(teacher, student, clips)
    assert len(losses_module.noisy_batches(teacher, clips)) == 1
    monkeypatch.setattr("mlaconvert.evaluation.losses.BATCH_TOKENS", 2 * 6 * 8)
    monkeypatch.setattr("mlaconvert.evaluation.conditions.BATCH_TOKENS", 2 * 6 * 8)
    batches = losses_module.noisy_batches(teacher, clips)
    assert [len(batch.noisy) for batch in batches] == [2, 2, 1]
    seen: list[tuple[str, int, int]] = []
    parts = measure_fidelity(teacher, student, clips, progress=lambda *told: seen.append(told[:3]))
    assert seen == [("losses", 0, 3), ("losses", 1, 3), ("losses", 2, 3), ("losses", 3, 3)]
    assert parts.student_loss == pytest.approx(whole.student_loss, rel=1e-6)
    assert parts.attention_errors == pytest.approx(whole.attention_errors, rel=1e-5)


def test_velocity_by_timestep_is_what_a_rollout_would_see(teacher: WanModel, student: WanModel, clips: Clips) -> None:
    """One masked pass here; there clean chunks are written into a cache, then the newest one is run from it."""
    clips = Clips(clips.latents[:, :, :4], clips.context)  # fits the window, as masked passes ask for
    found = velocity_by_timestep(teacher, student, clips, seed=6)
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(6))
    assert [step.timestep for step in found] == list(Sampler.many_step(8).timesteps)
    few = Sampler.few_step().timesteps
    assert all(any(math.isclose(t, step.timestep, rel_tol=1e-6) for step in found) for t in few)
    for step in (found[0], found[-1]):
        sigma = step.timestep / 1000
        outputs = []
        for model in (teacher, student):
            cache = LatentCache(model.config, batch=5, height=4, width=8)
            with torch.no_grad():
                model(clips.latents[:, :, :2], torch.zeros(5), clips.context, cache=cache)
                noisy = (1 - sigma) * clips.latents[:, :, 2:] + sigma * noise[:, :, 2:]
                level = torch.full((5,), step.timestep)
                outputs.append(model(noisy, level, clips.context, cache=cache, start_frame=2))
        target = noise[:, :, 2:] - clips.latents[:, :, 2:]
        assert step.velocity_error == pytest.approx(relative(outputs[1], outputs[0]), rel=1e-3)
        assert step.teacher_loss == pytest.approx(float((outputs[0] - target).square().mean()), rel=1e-4)
        assert step.student_loss == pytest.approx(float((outputs[1] - target).square().mean()), rel=1e-4)


def test_clean_pasts_are_summed_up_as_every_timestep_alone_in_float64(
    teacher: WanModel, student: WanModel, clips: Clips
) -> None:
    """Both models in float64, from a cache of clean chunks; losses summed before they are compared, errors averaged."""
    clips = Clips(clips.latents[:, :, :4], clips.context)
    steps = velocity_by_timestep(teacher, student, clips, seed=6)
    found = CleanPast.of(steps)
    latents, context = clips.latents.double(), clips.context.double()
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(6)).double()
    past, target = latents[:, :, :2], (noise - latents)[:, :, 2:]
    wide = [copy.deepcopy(model).double() for model in (teacher, student)]
    losses: list[list[float]] = []
    errors: list[float] = []
    for timestep in Sampler.many_step(8).timesteps:
        sigma, velocities = timestep / 1000, []
        for model in wide:
            cache = LatentCache(model.config, batch=5, height=4, width=8, dtype=torch.float64)
            noisy = (1 - sigma) * latents[:, :, 2:] + sigma * noise[:, :, 2:]
            with torch.no_grad():
                model(past, torch.zeros(5), context, cache=cache)
                level = torch.full((5,), timestep, dtype=torch.float64)
                velocities.append(model(noisy, level, context, cache=cache, start_frame=2).double())
        losses.append([float((velocity - target).square().mean()) for velocity in velocities])
        errors.append(float((velocities[1] - velocities[0]).norm() / velocities[0].norm()))
    theirs, ours = (sum(column) for column in zip(*losses, strict=True))
    assert found.excess == pytest.approx(ours / theirs - 1, rel=1e-3)
    assert found.velocity_error == pytest.approx(sum(errors) / 8, rel=1e-4)
    assert (found.teacher_loss, found.student_loss) == pytest.approx((theirs / 8, ours / 8), rel=1e-5)
    # Other ways to sum up would give other numbers.
    assert abs(sum(b / a for a, b in losses) / 8 - ours / theirs) > 0.01 * found.excess
    assert abs((sum(error**2 for error in errors) / 8) ** 0.5 - found.velocity_error) > 0.001 * found.velocity_error


def test_clean_pasts_by_hand() -> None:
    """Two timesteps of 1 and 3 lose 2 and 3: 5 / 4, not the mean of 2 and 1."""
    steps = [
        TimestepError(timestep=1000.0, velocity_error=0.5, teacher_loss=1.0, student_loss=2.0),
        TimestepError(timestep=750.0, velocity_error=0.1, teacher_loss=3.0, student_loss=3.0),
    ]
    found = CleanPast.of(steps)
    assert (found.teacher_loss, found.student_loss, found.excess) == (2.0, 2.5, 0.25)
    assert found.velocity_error == pytest.approx(0.3)
    assert found.to_json() == {
        "teacher_loss": 2.0,
        "student_loss": 2.5,
        "excess": 0.25,
        "velocity_error": found.velocity_error,
    }


def test_only_clips_of_more_than_one_chunk_have_a_past(clips: Clips) -> None:
    frames = {frames: Clips(clips.latents[:, :, :frames], clips.context) for frames in (1, 2, 3, 6)}
    assert [has_past(STREAMING, some) for some in frames.values()] == [False, False, True, True]  # chunks of two frames
    assert not any(has_past(None, some) for some in frames.values())


def test_frame_statistics_of_known_pictures() -> None:
    """A flat frame, a slow wave and a chequerboard, 8 x 12; two videos of three channels each."""
    rows, columns = torch.arange(8.0)[:, None], torch.arange(12.0)
    flat = torch.full((8, 12), 0.25)
    wave = (2 * math.pi * columns / 12).cos().expand(8, 12)
    board = 1 - 2 * ((rows + columns) % 2)
    video = torch.stack((flat, wave, board)).expand(2, 3, 3, 8, 12)
    found = frame_statistics(video)
    assert found["mean"].tolist() == pytest.approx([0.25, 0, 0], abs=1e-6)
    assert found["std"].tolist() == pytest.approx([0, 0.5**0.5, 1], abs=1e-6)
    assert found["detail"].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    moved = [float((b - a).square().mean()) ** 0.5 for a, b in ((flat, wave), (wave, board))]
    assert found["motion"].tolist() == pytest.approx(moved)
    # Half slow, half fast, by energy: the wave has half the board's variance.
    mixed = frame_statistics((wave * 2**0.5 + board).expand(1, 1, 1, 8, 12))
    assert mixed["detail"].tolist() == pytest.approx([0.5])


def test_drift_compares_frame_by_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(2, 3, 6, 5, 7, generator=generator) for _ in range(3))
    found = compare_videos(first, second, third, given=2)
    for who, video in (("student", second), ("other_seed", third)):
        expected = [relative(video[:, :, f], first[:, :, f]) for f in range(6)]
        assert found.difference[who] == pytest.approx(expected)
        assert found.late_difference[who] == pytest.approx(sum(expected[-2:]) / 2)
    deviation = found.deviation["student"]
    stds = [frame_statistics(video)["std"][-2:].mean() for video in (second, first)]
    means = [frame_statistics(video)["mean"][-2:].mean() for video in (second, first)]
    assert deviation["std"] == pytest.approx(float(stds[0] / stds[1] - 1))
    assert deviation["mean"] == pytest.approx(float((means[0] - means[1]) / stds[1]))
    same = compare_videos(first, first, third)
    assert set(same.difference["student"]) == {0.0}
    assert set(same.deviation["student"].values()) == {0.0}
    assert json.loads(json.dumps(found.to_json()))["given_frames"] == 2


def plan_of(clips: Clips, *, frames: int = 12, given: int = 2) -> RolloutPlan:
    return RolloutPlan(
        context=clips.context[:3],
        prefix=clips.latents[:3, :, :given] if given else None,
        frames=frames,
        height=4,
        width=8,
        sampler=Sampler.many_step(2),
        null_context=None,
        streaming=STREAMING,
        seed=9,
    )


def test_paired_rollouts_are_each_models_own(teacher: WanModel, student: WanModel, clips: Clips) -> None:
    plan, steps = plan_of(clips), []
    pair = paired_rollouts(teacher, student, plan, lambda: steps.append(1))
    assert len(steps) == 2 * plan.passes == 2 * (1 + 5 * 3)
    for model, video in zip((teacher, student), pair[:2], strict=True):
        alone = rollout(
            model,
            clips.context[:3],
            size=LatentSize(frames=12, height=4, width=8),
            given=Given(prefix=clips.latents[:3, :, :2]),
            sampler=Sampler.many_step(2),
            seed=9,
        )
        torch.testing.assert_close(video, torch.cat(list(alone), 2))
    assert not torch.equal(pair[0], pair[1])
    other = torch.cat(list(plan.chunks(teacher, seed=plan.other_seed)), 2)
    assert torch.equal(other[:, :, :2], pair[0][:, :, :2])  # given
    # Every video has another noise, not the next video's.
    assert not torch.equal(other[0, :, 2:], pair[0][1, :, 2:])
    assert plan.other_seed == 9 + 3


def test_speed_is_that_of_chunks_with_a_full_window(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the models move: 5 and 2 seconds a chunk, but 60 and 7 while the window fills."""
    now = 0.0
    order = []

    class Timed:
        def __init__(self, name: str, first: float, later: float) -> None:
            self.name, self.first, self.later = name, first, later

    def chunks(self: RolloutPlan, model: Any, **_: Any) -> Iterator[torch.Tensor]:
        nonlocal now
        for i in range(6):
            now += model.first if i < 4 else model.later
            order.append(model.name)
            yield torch.zeros(3, 16, 2, 4, 8)

    monkeypatch.setattr(RolloutPlan, "chunks", chunks)
    monkeypatch.setattr(drift.time, "perf_counter", lambda: now)
    models: Any = (Timed("teacher", 60.0, 5.0), Timed("student", 7.0, 2.0))
    wide = StreamingConfig(chunk_frames=2, window_frames=9, sink_frames=1)
    *_, speed = paired_rollouts(*models, dataclasses.replace(plan_of(clips), streaming=wide))
    assert speed.teacher == pytest.approx(3 * 2 / 5)  # three videos, two frames a chunk
    assert speed.student == pytest.approx(3 * 2 / 2)
    assert speed.ratio == pytest.approx(2.5)
    assert order[:4] == ["teacher", "student", "student", "teacher"]
