"""The losses of healing, each against the same thing written longhand with the public model and its cache."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from heal_cases import HEIGHT, STREAMING, STUDENT, TEACHER, WIDTH, make_batch, model, recipe, streamed
from support import relative
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.healing.batches import Batch, Batches, DrawnClips, Rows, mix
from mlaconvert.healing.frames import guided, noisy_layout, velocity
from mlaconvert.healing.objective import Uncast, with_past
from mlaconvert.healing.stages.consistency import Consistency
from mlaconvert.healing.stages.distill import Distill, noise_levels
from mlaconvert.healing.stages.dmd import Critic, Generator
from mlaconvert.healing.stages.few_step import FewStep, Steps, energy_distance, reference_features, stream
from mlaconvert.healing.stages.teacher_forcing import TeacherForcing
from mlaconvert.healing.state import choose_trained
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel


def test_an_empty_prompt_of_another_length_is_padded_as_the_model_does() -> None:
    """Three tokens beside the clips' four, or four beside their two: the same as with zeros written out."""
    net, batch = model(TEACHER, 1), make_batch()
    assert batch.null is not None
    sigma = torch.full((3, 4), 700.0).double()
    layout = noisy_layout(batch.view, STREAMING)

    def predict(text: Tensor) -> Tensor:
        return velocity(net, batch.latents, sigma, text, layout)

    for context, null in ((batch.context, batch.null[:, :3]), (batch.context[:, :2], batch.null)):
        padded = [torch.cat((t, torch.zeros(len(t), 4 - t.shape[1], t.shape[2]).double()), 1) for t in (context, null)]
        without = predict(padded[1].expand(3, -1, -1))
        expected = without + 2.5 * (predict(padded[0]) - without)
        assert relative(guided(predict, context, null, 2.5), expected) < 1e-6
    assert relative(expected, predict(padded[0])) > 1e-3


def test_distill_matches_attention_on_the_teachers_inputs() -> None:
    teacher, student, batch = model(TEACHER, 1), model(STUDENT, 2), make_batch()
    choose_trained(student, "attention")
    loss = Distill(student, teacher, recipe(steps=10, attention_steps=1), STREAMING).loss(batch, 0)
    again = make_batch()
    sigma, _, _ = noise_levels(again, 0.8)
    noise = again.rows.normal(*again.latents.shape[1:]).double()
    noisy = again.latents + sigma[:, None, :, None, None] * (noise - again.latents)
    seen: list[tuple[tuple[Any, ...], Tensor]] = []
    for block in teacher.blocks:
        block.self_attn.register_forward_hook(lambda _, given, made: seen.append((given, made)))
    teacher(noisy, 1000 * sigma, again.context)
    errors = [
        (student.blocks[i].self_attn(given[0], given[1]) - made).square().sum() / made.square().sum()
        for i, (given, made) in enumerate(seen)
    ]
    assert loss.item() == pytest.approx(torch.stack(errors).sum().item() / 2, rel=1e-5)
    assert any((row == 0).any() for row in sigma)
    assert len(set(sigma[0].tolist())) == 2


def test_distill_computes_the_teachers_attention_once() -> None:
    teacher, student, batch = model(TEACHER, 1), model(STUDENT, 2), make_batch()
    choose_trained(student, "attention")
    calls: list[int] = []
    for i, block in enumerate(teacher.blocks):
        block.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    Distill(student, teacher, recipe(steps=10, attention_steps=1), STREAMING).loss(batch, 0)
    assert calls == [0, 1]


@pytest.mark.parametrize(("share", "clean_past"), [(0.0, 0.8), (0.3, 0.4)])
def test_distill_then_matches_velocities_where_frames_are_noisy(share: float, clean_past: float) -> None:
    teacher, student = model(TEACHER, 1), model(STUDENT, 2)
    chosen = recipe(steps=10, attention_steps=1, data_share=share, clean_past=clean_past)
    objective = Distill(student, teacher, chosen, STREAMING)
    for weight in (1.0, 3.5):
        objective.clean_weight = weight
        loss = objective.loss(make_batch(count=9), 1).item()
        expected = velocity_error(teacher, student, make_batch(count=9), weight, share=share, clean_past=clean_past)
        assert loss == pytest.approx(expected, rel=1e-5)


def velocity_error(
    teacher: WanModel,
    student: WanModel,
    batch: Batch,
    clean_weight: float,
    *,
    share: float = 0.0,
    clean_past: float = 0.8,
) -> float:
    """Of the noisy frames of two chunks, weighted to the schedule, or by `clean_weight` behind a clean chunk.

    Held to the teacher's velocity, or by a `share` to what leads from the clips to the noise.
    """
    sigma, weight, _ = noise_levels(batch, clean_past)
    noise = batch.rows.normal(*batch.latents.shape[1:]).double()
    noisy = batch.latents + sigma[:, None, :, None, None] * (noise - batch.latents)
    wanted = (1 - share) * teacher(noisy, 1000 * sigma, batch.context) + share * (noise - batch.latents)
    difference = wanted - student(noisy, 1000 * sigma, batch.context)
    errors = [
        float(difference[i, :, f].square().mean() * weight[i, f] * (clean_weight if sigma[i, 0] == 0 else 1))
        for i, f in product(*map(range, sigma.shape))
        if sigma[i, f] > 0
    ]
    assert errors
    return sum(errors) / len(errors)


@pytest.mark.parametrize("frames", [2, 4])
def test_distill_is_validated_by_the_same_error_always(frames: int) -> None:
    """On 11 clips, more than go through the models at once."""
    teacher, student, batch = model(TEACHER, 1), model(STUDENT, 2), make_batch(frames, count=11)
    objective = Distill(student, teacher, recipe(steps=10, attention_steps=4), STREAMING)
    objective.clean_weight = 2.5
    clips = Clips(batch.latents, batch.context)
    found = [objective.validate(clips) for _ in range(2)]
    expected = dataclasses.replace(batch, rows=Rows([mix("validate", i) for i in range(11)]))
    assert found == [pytest.approx(velocity_error(teacher, student, expected, 2.5), rel=1e-5)] * 2


@pytest.mark.parametrize(("seed", "nearer"), [(1, True), (5, False)])
def test_a_clean_past_counts_by_what_the_teacher_itself_loses_there(seed: int, nearer: bool) -> None:
    """Its losses on all clips chunk by chunk, each behind what its cache holds, with either past in turn.

    Where it loses more behind clean ones, all count the same.
    """
    teacher, student, batch = model(TEACHER, seed), model(STUDENT, 2), make_batch(count=11)
    batch = dataclasses.replace(batch, latents=0.1 * batch.latents)
    objective = Distill(student, teacher, recipe(clean_weight=0.7), STREAMING)
    objective.prepare_validation(Clips(batch.latents, batch.context), None)
    plain, clean = (teacher_loss(teacher, batch, clean_past) for clean_past in (0.0, 1.0))
    assert (plain / clean > 1.01) is nearer
    assert objective.clean_weight == pytest.approx(0.7 * max(plain / clean, 1), rel=1e-5)


def teacher_loss(teacher: WanModel, batch: Batch, clean_past: float) -> float:
    """Mean over noisy chunks, of which there are two behind noisy pasts and the second behind clean ones."""
    rows = Rows([mix("validate", i) for i in range(len(batch.latents))])
    sigma, weight, _ = noise_levels(dataclasses.replace(batch, rows=rows), clean_past)
    noise = rows.normal(*batch.latents.shape[1:]).double()
    noisy = batch.latents + sigma[:, None, :, None, None] * (noise - batch.latents)
    losses = []
    for i, first in product(range(len(sigma)), (2,) if clean_past else (0, 2)):
        past = [] if first == 0 else [(noisy[i : i + 1, :, :2], sigma[i : i + 1, 0])]
        found = behind(teacher, past, noisy[i : i + 1, :, first : first + 2], sigma[i, first], batch.context[i : i + 1])
        error = (found - (noise - batch.latents)[i : i + 1, :, first : first + 2]).square().mean()
        losses.append(float(error * weight[i, first]))
    return sum(losses) / len(losses)


def behind(net: WanModel, past: list[tuple[Tensor, Tensor]], chunk: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """Velocity of a chunk behind others, through the model's own cache; each has a noise level."""
    cache = LatentCache(net.config, batch=1, height=HEIGHT, width=WIDTH, dtype=torch.float64)
    start = 0
    for frames, level in [*past, (chunk, sigma[None])]:
        found = net(frames, 1000 * level, context, cache=cache, start_frame=start)
        start += frames.shape[2]
    return found


def test_distill_weighs_its_noise_levels_to_the_schedule() -> None:
    """Against integrals over shift 5: of levels and of what is rare, near zero; there most draws are."""
    batch = dataclasses.replace(make_batch(), rows=Rows([mix("levels", i) for i in range(6000)]))
    sigma, weight, behind_clean = (x[:, ::2] for x in noise_levels(batch, 0.8))  # the first frame of each chunk
    place = (torch.arange(10**6).double() + 0.5) / 10**6
    schedule = 5 * place / (1 + 4 * place)
    has_past = sigma[:, 0] == 0
    assert has_past.double().mean() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(behind_clean, torch.stack((torch.zeros_like(has_past), has_past), 1))
    for chunk in (0, 1):
        s, w = sigma[~has_past, chunk].double(), weight[~has_past, chunk].double()
        assert w.mean() == pytest.approx(1, rel=0.04)
        for power in (0.5, 1.0, 3.0):
            assert (w * s**power).mean() == pytest.approx(float((schedule**power).mean()), rel=0.05)
        low, rare = (s < 0.1).double(), float((schedule < 0.1).double().mean())
        assert (w * low).mean() == pytest.approx(rare, rel=0.2)
        assert low.mean() > 8 * rare
    # Behind clean pasts: the schedule down to where a sampler of twenty steps ends, all alike.
    s, schedule = sigma[has_past, 1].double(), schedule[place > 0.05]
    assert s.min() >= 5 * 0.05 / 1.2
    for power in (0.5, 1.0, 3.0):
        assert (s**power).mean() == pytest.approx(float((schedule**power).mean()), rel=0.02)
    assert (weight[behind_clean] == 1).all()
    assert (weight[sigma == 0] == 0).all()


def test_a_steps_samples_cover_the_schedule_evenly() -> None:
    """However they are shared among processes and micro-batches, and anew in every step."""
    source = DrawnClips(2)

    def places(step: int, *, batch: int, accumulate: int, world: int) -> Tensor:
        made = recipe("teacher-forcing", batch=batch, accumulate=accumulate, steps=3)
        parts = [
            Batches(source, made, None, rank=rank, world=world).batch(step, micro).rows.strata(2)
            for micro in range(accumulate)
            for rank in range(world)
        ]
        return torch.cat(parts)

    whole = places(1, batch=12, accumulate=1, world=1)
    for column in whole.T:
        assert sorted((12 * column).int().tolist()) == list(range(12))
    assert not torch.equal((12 * whole[:, 0]).int(), (12 * whole[:, 1]).int())
    assert torch.equal(places(1, batch=2, accumulate=3, world=2), whole)
    assert not torch.equal((12 * places(2, batch=12, accumulate=1, world=1)).int(), (12 * whole).int())


def test_the_past_that_noisy_frames_see_is_clean() -> None:
    """In a view of chunks of 1, 2 and 2 frames the past is the first three: unlike the rest in number."""
    batch = make_batch(8, view=-1)
    noisy, sigma = batch.latents + 0.5, torch.rand(3, 5, generator=torch.Generator().manual_seed(4))
    latents, timestep = with_past(batch, noisy, sigma)
    assert torch.equal(latents, torch.cat((batch.latents[:, :, :3], noisy), 2))
    assert torch.equal(timestep, torch.cat((torch.zeros(3, 3), 1000 * sigma), 1))


@pytest.mark.parametrize("length", [2, 4, 5])
def test_teacher_forcing_is_flow_matching_chunk_by_chunk(length: int) -> None:
    """With an empty prompt that is shorter than the captions, as long, or longer: zeros fill up either."""
    count = 12
    student, batch = model(STUDENT, 2), make_batch(count=count)
    null = torch.randn(1, length, TEACHER.text_dim, generator=torch.Generator().manual_seed(3)).double()
    batch = dataclasses.replace(batch, null=null)
    loss = TeacherForcing(student, recipe("teacher-forcing"), STREAMING).loss(batch, 0)
    rows = make_batch(count=count).rows
    uniform = rows.strata(2)
    sigma = 5 * uniform / (1 + 4 * uniform)
    noise = rows.normal(*batch.latents.shape[1:]).double()
    empty = rows.uniform(1, 1).flatten() < 0.1
    assert 0 < empty.sum() < count
    context = torch.zeros(count, TEACHER.text_len, TEACHER.text_dim).double()
    for i in range(count):
        text = null[0] if empty[i] else batch.context[i]
        context[i, : len(text)] = text
    total = torch.zeros(()).double()
    for chunk in range(2):
        part = slice(2 * chunk, 2 * chunk + 2)
        level = sigma[:, chunk, None, None, None, None].double()
        x = (1 - level) * batch.latents[:, :, part] + level * noise[:, :, part]
        past = [batch.latents[:, :, :2]] if chunk else []
        found = streamed(student, past, x, 1000 * sigma[:, chunk].double(), context)
        total += (found - (noise - batch.latents)[:, :, part]).square().mean() / 2
    assert loss.item() == pytest.approx(float(total), rel=1e-5)


def test_consistency_is_one_guided_step_and_the_average_beyond_it() -> None:
    teacher, student, average = model(TEACHER, 1), model(STUDENT, 2), model(STUDENT, 5)
    settings = recipe("consistency", solver_steps=8, guidance=2.5)
    batch = make_batch()
    target = Consistency(average, teacher, settings, STREAMING).target(batch)
    loss = Consistency(student, teacher, settings, STREAMING).loss(batch, 0, target)
    rows = make_batch().rows
    index = rows.integers(8, 2)
    noise = rows.normal(*batch.latents.shape[1:]).double()
    level = [1 - i / 8 for i in range(9)]
    grid = torch.tensor([5 * s / (1 + 4 * s) for s in level]).float().double()
    errors = []
    for chunk in range(2):
        part, past = slice(2 * chunk, 2 * chunk + 2), [batch.latents[:, :, :2]] if chunk else []
        now, after = (grid[index[:, chunk] + i][:, None, None, None, None] for i in (0, 1))
        x = (1 - now) * batch.latents[:, :, part] + now * noise[:, :, part]

        def flow(net: WanModel, x: Tensor, level: Tensor, text: Tensor, past: list[Tensor] = past) -> Tensor:
            return streamed(net, past, x, 1000 * level.flatten(), text)

        null = batch.null.expand_as(batch.context)  # type: ignore[union-attr]
        empty, full = flow(teacher, x, now, null), flow(teacher, x, now, batch.context)
        solved = x + (after - now) * (empty + 2.5 * (full - empty))
        expected = solved - after * flow(average, solved, after, batch.context)
        found = x - now * flow(student, x, now, batch.context)
        errors.append(((found - expected).square() + 1e-6).sqrt() - 1e-3)
    assert loss.item() == pytest.approx(float(torch.cat(errors, 2).mean()), rel=1e-5)


def test_the_students_timesteps_are_among_the_solvers_levels() -> None:
    made = Consistency(model(STUDENT, 2), model(TEACHER, 1), recipe("consistency"), STREAMING)
    assert all((1000 * made.grid - t).abs().min() < 1e-3 for t in Sampler.few_step().timesteps)
    assert (made.grid[0], made.grid[-1]) == (1, 0)


def longhand_stream(net: WanModel, noise: Tensor, context: Tensor, taken: int) -> Tensor:
    """Self-generation with the public model and its cache."""
    cache = LatentCache(net.config, batch=len(noise), height=HEIGHT, width=WIDTH, dtype=torch.float64)
    levels, made = [t / 1000 for t in Sampler.few_step().timesteps], []
    for start in range(0, noise.shape[3], 2):
        part = slice(start, start + 2)
        x = noise[:, 0, :, part]
        for i in range(taken):
            t = torch.full((len(x),), 1000 * levels[i]).double()
            clean = x - levels[i] * net(x, t, context, cache=cache, start_frame=start)
            if i + 1 < taken:
                x = (1 - levels[i + 1]) * clean + levels[i + 1] * noise[:, i + 1, :, part]
        net(clean, torch.zeros(len(x)).double(), context, cache=cache, start_frame=start)
        made.append(clean)
    return torch.cat(made, 2)


@pytest.mark.parametrize("taken", [1, 3])
def test_streams_are_the_models_own_rollouts_beyond_the_window(taken: int) -> None:
    net, batch = model(STUDENT, 2), make_batch()
    noise = torch.randn(3, 4, 3, 8, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4)).double()
    steps = Steps(Sampler.few_step().timesteps, taken)
    choose_trained(net, "all")
    live = stream(net, batch.context, chunks=(2, 2, 2, 2), noise=noise, steps=steps, live=True)
    with torch.no_grad():
        plain = stream(net, batch.context, chunks=(2, 2, 2, 2), noise=noise, steps=steps)
        expected = longhand_stream(net, noise, batch.context, taken)
    assert relative(plain, expected) < 1e-5
    assert relative(live.detach(), plain) < 1e-6
    assert live.requires_grad


def test_gradients_come_from_the_last_step_of_each_chunk_alone() -> None:
    net, batch = model(STUDENT, 2), make_batch()
    choose_trained(net, "all")
    noise = torch.randn(3, 4, 3, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4)).double()
    gradients = []
    for checkpointing in (False, True):
        net.zero_grad()
        clip = stream(
            net,
            batch.context,
            chunks=(2, 2),
            noise=noise,
            steps=Steps(Sampler.few_step().timesteps, 2),
            live=True,
            checkpointing=checkpointing,
        )
        clip[:, :, 2:].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    # Longhand: the second chunk's last step in one masked pass behind a first chunk that is constant.
    net.zero_grad()
    with torch.no_grad():
        first = stream(net, batch.context, chunks=(2,), noise=noise, steps=Steps(Sampler.few_step().timesteps, 2))
        level, after = (t / 1000 for t in Sampler.few_step().timesteps[:2])
        x = noise[:, 0, :, 2:]
        x = x - level * streamed(net, [first], x, torch.full((3,), 1000 * level).double(), batch.context)
        x = torch.lerp(x, noise[:, 1, :, 2:], after)
    levels = torch.tensor([[0.0, 0, 1000 * after, 1000 * after]] * 3).double()
    layout = noisy_layout(batch.view, STREAMING)

    past = [None, None]  # what each layer remembers of the first chunk, without gradients

    def forget(i: int) -> Any:
        attention: Any = net.blocks[i].self_attn
        compress = type(attention).compress

        def replaced(x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
            made = compress(attention, x, keys)
            return tuple(torch.cat((entry[:, :12].detach(), entry[:, 12:]), 1) for entry in made)

        return replaced

    for i in range(len(past)):
        net.blocks[i].self_attn.compress = forget(i)  # type: ignore[method-assign, union-attr]
    flow = velocity(net, torch.cat((first, x), 2), levels, batch.context, layout)[:, :, 2:]
    (x - after * flow).square().sum().backward()
    for name in ("blocks.0.self_attn.kv_a_proj_with_mqa.weight", "blocks.1.self_attn.kv_b_proj.weight"):
        expected = dict(net.named_parameters())[name].grad
        assert expected is not None
        for found in gradients:
            assert relative(found[name], expected) < 1e-5


def test_dmd_pulls_towards_the_real_score_and_away_from_the_fake_one() -> None:
    teacher, student, fake = model(TEACHER, 1), model(STUDENT, 2), model(TEACHER, 6)
    settings = recipe("dmd", guidance=2.0)
    critic = Critic(fake, settings)
    generator = Generator(student, teacher, critic, settings)
    clip = torch.randn(3, 3, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9)).double()
    gradient, seen = generator.gradient(make_batch(), clip)
    assert seen.frames == (0, 1, 2, 3)
    rows = make_batch().rows
    uniform = 0.02 + 0.96 * rows.uniform(1)
    sigma = (5 * uniform / (1 + 4 * uniform)).double()
    noise = rows.normal(*clip.shape[1:]).double()
    level = sigma[..., None, None, None]
    noisy = (1 - level) * clip + level * noise
    batch = make_batch()
    null = batch.null.expand_as(batch.context)  # type: ignore[union-attr]
    full, empty, wrong = (
        noisy - level * net(noisy, 1000 * sigma[:, 0], text)
        for net, text in ((teacher, batch.context), (teacher, null), (fake, batch.context))
    )
    real = empty + 2.0 * (full - empty)
    expected = (wrong - real) / (clip - real).abs().mean((1, 2, 3, 4), keepdim=True)
    assert relative(gradient, expected) < 1e-5


def test_the_dmd_loss_has_that_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model(STUDENT, 2), model(TEACHER, 1), Critic(model(TEACHER, 6), recipe("dmd")), recipe("dmd"))
    batch = make_batch()
    clip = batch.latents.clone().requires_grad_()
    monkeypatch.setattr(generator, "rollout", lambda *_: clip)
    generator.loss(batch, 0).backward()
    expected, _ = generator.gradient(make_batch(), clip.detach())
    assert clip.grad is not None
    assert relative(clip.grad, expected / expected.numel()) < 1e-5


def test_the_critic_learns_what_the_student_makes() -> None:
    fake, batch = model(TEACHER, 6), make_batch()
    loss = Critic(fake, recipe("dmd")).loss(batch, 0, Uncast((batch.latents,)))
    rows = make_batch().rows
    uniform = 0.02 + 0.96 * rows.uniform(1)
    sigma = (5 * uniform / (1 + 4 * uniform)).double()
    noise = rows.normal(*batch.latents.shape[1:]).double()
    noisy = torch.lerp(batch.latents, noise, sigma[..., None, None, None])
    found = fake(noisy, 1000 * sigma[:, 0], batch.context)
    assert loss.item() == pytest.approx(float((found - (noise - batch.latents)).square().mean()), rel=1e-5)


def test_the_exit_step_is_shared_and_every_step_gets_its_turn() -> None:
    generator = Generator(model(STUDENT, 2), model(TEACHER, 1), Critic(model(TEACHER, 6), recipe("dmd")), recipe("dmd"))
    clips = {i: generator.rollout(make_batch(shared=(i + 0.5) / 4), False) for i in range(4)}
    for i in range(4):
        rows = make_batch().rows
        noise = rows.normal(4, 3, 4, HEIGHT, WIDTH).double()
        assert relative(clips[i], longhand_stream(generator.student, noise, make_batch().context, i + 1)) < 1e-5


def test_energy_distance_longhand() -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = (list(torch.randn(2, 5, 7, generator=g).double()) for _ in range(2))
    between = sum((a[i] - b[i]).norm() for a in ours for b in theirs for i in range(5)) / 20
    spread = [sum((side[0][i] - side[1][i]).norm() for i in range(5)) / 5 for side in (ours, theirs)]
    expected = (2 * between - spread[0] - spread[1]) / spread[1]
    assert energy_distance(ours, theirs) == pytest.approx(float(expected), rel=1e-9)


def test_energy_distance_sees_blur_and_bias_but_not_other_draws() -> None:
    g = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(400, 1, generator=g)

    def draw(scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
        return [means + shift + scale * torch.randn(400, 8, generator=g) for _ in range(2)]

    theirs = draw()
    assert abs(energy_distance(draw(), theirs)) < 0.05
    assert energy_distance(draw(scale=0.3), theirs) > 0.1
    assert energy_distance(draw(shift=0.5), theirs) > 0.05


def test_the_distance_compares_rollouts_from_noise() -> None:
    """The students' and the teacher's: of the clips only the prompts and the length count."""
    batch = make_batch(frames=4)
    teacher = model(TEACHER, 1)
    clips = Clips(batch.latents, batch.context)
    found = reference_features(teacher, clips, batch.null, 2.0)
    assert found[0].shape == (3, 4 * 2 * TEACHER.dim)
    for frame in range(4):
        inside = slice(frame * 2 * TEACHER.dim, (frame + 1) * 2 * TEACHER.dim)
        assert relative(found[0][:, inside], found[1][:, inside]) > 1e-3
    other = Clips(torch.randn_like(clips.latents), clips.context)
    again = reference_features(teacher, other, batch.null, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    student = FewStep(model(STUDENT, 2), teacher, recipe("consistency"), found)
    near, far = student.distance(clips), FewStep(model(STUDENT, 3), teacher, recipe("consistency"), again)
    assert near == student.distance(other) != far.distance(clips)
    assert student.distance(Clips(clips.latents, torch.zeros_like(clips.context))) != near
