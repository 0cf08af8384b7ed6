"""The losses of healing, each against the same thing written longhand with the public model and its cache."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

import pytest
import torch
from heal_cases import HEIGHT, STREAMING, STUDENT, TEACHER, WIDTH, beside_present, make_batch, model, recipe, streamed
from support import relative
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError
from mlaconvert.healing.batches import Batches
from mlaconvert.healing.estimate import estimate
from mlaconvert.healing.frames import forcing_layout, noisy_layout, velocity, views
from mlaconvert.healing.recipe import heal_recipe_names, learning_rate, load_heal_recipe
from mlaconvert.healing.stages import STAGES
from mlaconvert.healing.state import choose_trained
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.flops import forward_work
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import window_views


def test_views_are_what_the_newest_chunk_sees() -> None:
    found = views(8, STREAMING)
    assert [view.frames for view in found] == [(0, 1, 2, 3), (0, 2, 3, 4, 5), (0, 4, 5, 6, 7)]
    assert [view.chunks for view in found] == [(2, 2), (1, 2, 2), (1, 2, 2)]
    cache = LatentCache(TEACHER, batch=1, height=HEIGHT, width=WIDTH)
    for start in range(0, 8, 2):
        window = cache.begin(start, 2)
    assert found[-1].positions == tuple(sorted(window.key_frames.tolist()))
    absolute = dataclasses.replace(STREAMING, positions="absolute")
    assert views(8, absolute)[-1].positions == (0, 4, 5, 6, 7)
    assert [view.frames for view in views(3, None)] == [(0, 1, 2)]


@pytest.mark.parametrize("sink", [0, 1, 2])
def test_windows_hold_the_newest_frames_in_the_chunks_that_they_came_in(sink: int) -> None:
    """Several chunks deep; the oldest one may have lost frames to the window's edge."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=9, sink_frames=sink)
    for (frames, chunks), end in zip(window_views(14, streaming), range(2, 15, 2), strict=True):
        recent = list(range(end)) if end <= 9 else list(range(end - 9 + sink, end))
        groups = [len(list(group)) for _, group in groupby(recent, lambda frame: frame // 2)]
        first = list(range(sink)) if end > 9 else []
        assert frames == first + recent
        assert chunks == (*([sink] if first else []), *groups)


@pytest.mark.parametrize("config", [TEACHER, STUDENT], ids=["dense", "latent"])
def test_the_forcing_pass_is_every_chunk_behind_its_clean_past(config: WanConfig) -> None:
    net, batch = model(config, 3), make_batch()
    clean, noisy = batch.latents, batch.latents + 0.5
    timestep = torch.tensor([[700.0, 700, 300, 300]] * 3).double()
    both = torch.cat((clean[:, :, :2], noisy), 2)
    levels = torch.cat((torch.zeros(3, 2).double(), timestep), 1)
    found = velocity(net, both, levels, batch.context, forcing_layout(batch.view, STREAMING))[:, :, 2:]
    first = streamed(net, [], noisy[:, :, :2], timestep[:, 0], batch.context)
    second = streamed(net, [clean[:, :, :2]], noisy[:, :, 2:], timestep[:, 2], batch.context)
    assert relative(found, torch.cat((first, second), 2)) < 1e-6


def test_the_forcing_mask_with_a_sink() -> None:
    """Three chunks of 1, 2, 2 frames behind each other: the last one sees the sink and the chunk before it, clean."""
    layout = forcing_layout(views(8, STREAMING)[-1], STREAMING)
    assert layout.positions == (0, 1, 2, 0, 1, 2, 3, 4)
    seen = [row.nonzero().flatten().tolist() for row in layout.visible]
    assert seen == [[0], [0, 1, 2], [0, 1, 2], [3], [0, 4, 5], [0, 4, 5], [0, 1, 2, 6, 7], [0, 1, 2, 6, 7]]


def test_checkpointing_changes_nothing() -> None:
    net, batch = model(STUDENT, 3), make_batch()
    layout, timestep = noisy_layout(batch.view, STREAMING), torch.full((3, 4), 400.0).double()
    gradients = []
    for checkpointing in (False, True):
        choose_trained(net, "all")
        net.zero_grad()
        out = velocity(net, batch.latents, timestep, batch.context, layout, checkpointing=checkpointing)
        out.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 60
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class Numbered:
    """Clips that hold their own number."""

    fingerprint, null = "numbered", None
    clip_shape = (3, 8, HEIGHT, WIDTH)

    def clips(self, numbers: list[int]) -> Any:
        values = torch.tensor(numbers).float().view(-1, 1, 1, 1, 1)
        return Clips(values.expand(-1, *self.clip_shape), torch.zeros(len(numbers), 1, 10))

    validation = clips  # type: ignore[assignment]


def test_batches_are_the_same_however_many_processes_share_them() -> None:
    alone = Batches(Numbered(), recipe(batch=6, accumulate=2), STREAMING).batch(3, 1)
    pair = [Batches(Numbered(), recipe(batch=3, accumulate=2), STREAMING, rank=r, world=2).batch(3, 1) for r in (0, 1)]
    assert torch.equal(alone.latents, torch.cat([b.latents for b in pair]))
    assert torch.equal(alone.rows.normal(4), torch.cat([b.rows.normal(4) for b in pair]))
    assert alone.view == pair[0].view == pair[1].view
    assert alone.shared == pair[0].shared == pair[1].shared


def test_batches_never_repeat_and_see_every_view() -> None:
    batches = Batches(Numbered(), recipe(batch=2, accumulate=2), STREAMING)
    seen = [batches.batch(step, micro) for step in range(12) for micro in range(2)]
    assert sorted(float(x) for b in seen for x in b.latents[:, 0, 0, 0, 0]) == list(range(48))
    assert {b.view for b in seen} == set(views(8, STREAMING))
    assert not torch.equal(seen[0].rows.normal(3), batches.batch(0, 0, "critic").rows.normal(3))


def test_every_stage_has_a_shipped_recipe_that_parses() -> None:
    found = {name: load_heal_recipe(name, {}).resolved() for name in heal_recipe_names()}
    assert {r.stage for r in found.values()} == set(STAGES)
    paper = [found[f"videomla-{stage}"] for stage in list(STAGES)[1:]]
    assert [r.lr for r in paper] == [5e-6, 2e-6, 2e-6]
    assert all(r.betas == (0.0, 0.999) for r in paper)
    assert (paper[2].critic_lr, paper[2].critic_steps, paper[2].ema, paper[2].guidance) == (4e-7, 5, 0.99, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "magic"}, "options: stage is 'magic': give distill, teacher-forcing"),
        ({}, "no stage; give one with --stage"),
        ({"stage": "distill", "stepz": 3}, "unknown field 'stepz'"),
        ({"stage": "distill", "steps": 0}, "steps is 0"),
        ({"stage": "distill", "lr": -1.0}, "lr is -1.0"),
        ({"stage": "distill", "ema": 1.0}, "ema is 1.0"),
        ({"stage": "distill", "steps": 5, "attention_steps": 6}, "attention_steps is 6"),
        ({"stage": "consistency", "solver_steps": 10}, "solver_steps is 10"),
        ({"stage": "distill", "max_loss_ratio": 1.0}, "max_loss_ratio is 1.0"),
        ({"stage": "distill", "guidance": -1.0}, "guidance is -1.0"),
        ({"stage": "distill", "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_heal_recipe(None, options)
    assert message in str(raised.value)


def test_wrong_recipe_files_are_named(tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (("stepz: 3", "unknown field 'stepz'"), ("- a", "a recipe is a mapping"), ("a: [", "YAML")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as raised:
            load_heal_recipe(path, {"stage": "distill"})
        assert str(raised.value).startswith(str(path))
    with pytest.raises(ConfigError, match=r"shipped healing recipes: .*tiny-distill"):
        load_heal_recipe("nothing", {})


def test_recipe_files_take_numbers_as_they_are_written(tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    for text, value in (("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), ("3.e-2", 0.03), ("1e+0", 1.0), ("1", 1.0)):
        path.write_text(f"stage: distill\nlr: {text}\n")
        assert load_heal_recipe(path, {}).lr == value
    path.write_text("stage: distill\nlr: 1e-5x\n")
    with pytest.raises(ConfigError, match=r"lr is .*: give a number"):
        load_heal_recipe(path, {})


def test_the_rate_rises_and_falls() -> None:
    settings = recipe(steps=110, warmup=10)
    rates = [learning_rate(settings, step, 2.0) for step in range(110)]
    assert rates[:2] == [0.2, 0.4]
    assert max(rates) == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02, rel=0.05)
    assert learning_rate(recipe(steps=110, schedule="constant"), 109, 2.0) == 2.0


def test_flops_are_those_that_torch_counts() -> None:
    """Of a dense teacher that sees everything, where both count every pair of tokens."""
    config = dataclasses.replace(TEACHER, streaming=None, num_heads=3)  # heads of 16, which need no padding
    net = model(config, 1).float()
    view = views(3, None)[0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no fused CPU kernel
        net(torch.randn(1, 3, 3, HEIGHT, WIDTH), torch.zeros(1, 3), torch.randn(1, 4, 10))
    assert forward_work(config, noisy_layout(view, None).visible, 6).flops == counter.get_total_flops()


def test_pairs_of_an_exact_present_take_whole_heads() -> None:
    """By hand, beside a model of the same weights whose present is latent: 2 x 2 frames of 6 tokens each."""
    exact = beside_present("latent")
    assert exact.mla is not None
    view = views(4, STREAMING)[0]
    assert view.chunks == (2, 2)
    found = forward_work(exact, noisy_layout(view, STREAMING).visible, 6).flops
    past, present = 12 * 12, 2 * 12 * 12  # the second chunk sees the first, and each itself
    attention = 2 * 4 * ((6 + 6 + 9) * past + 2 * 12 * present)
    cross = 2 * 4 * 2 * 12 * 24 * 5
    everywhere = forward_work(TEACHER, noisy_layout(view, STREAMING).visible, 6).flops
    dense = 2 * (2 * 4 * 2 * 12 * (past + present) + cross)
    # Latent, rotary key and both ways back, and queries by head; the teacher's four projections are there as well.
    more = 2 * 24 * (48 * 7 + 7 * 6 + 4 * (6 + 9) * 7 + 4 * (6 + 6) * 12 + 4 * 12 * 9)
    assert found == everywhere - dense + 2 * (attention + cross + more)


def test_the_estimate_counts_what_is_trained_only() -> None:
    view = views(4, STREAMING)[0]
    few, many = (
        estimate(recipe("dmd"), STUDENT, TEACHER, [(n,)], view, size=(HEIGHT, WIDTH), rates=1e9) for n in (100, 1000)
    )
    assert many.memory["optimizer"] == 10 * few.memory["optimizer"] == 8000
    assert many.memory["gradients"] == 4000
    shapes = [(5, 3), (5000, 2), (7,)]  # 5000 is too wide for a basis of its own
    soap = recipe("dmd", optimizer="soap")
    third = estimate(soap, STUDENT, TEACHER, shapes, view, size=(HEIGHT, WIDTH))
    assert third.memory["optimizer"] == 8 * (15 + 10_000 + 7) + 8 * (25 + 9 + 4)
    assert third.memory["critic"] > few.memory["critic"]
    again = estimate(recipe(steps=7, reuse=3, batch=5), STUDENT, TEACHER, shapes, view, size=(HEIGHT, WIDTH))
    assert again.disk == 3 * 5 * 4 * (3 * 4 * HEIGHT * WIDTH)
    fewer, usual = (again.flops, estimate(recipe(batch=5), STUDENT, TEACHER, shapes, view, size=(HEIGHT, WIDTH)).flops)
    theirs = forward_work(TEACHER, noisy_layout(view, STREAMING).visible, 6).flops
    assert usual - fewer == pytest.approx(5 * theirs * 3 / 7)  # one step matches attention, three keep velocities
    muon = estimate(recipe("dmd", optimizer="muon"), STUDENT, TEACHER, shapes, view, size=(HEIGHT, WIDTH))
    assert muon.memory["optimizer"] == 4 * (15 + 10_000) + 8 * 7
    assert few.memory["weights"] == many.memory["weights"] == 4 * sum(p.numel() for p in WanModel(STUDENT).parameters())
    assert few.seconds == pytest.approx(few.flops / 1e9)
    assert few.total_memory < many.total_memory
