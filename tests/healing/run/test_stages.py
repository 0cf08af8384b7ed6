"""A stage of healing is one file: a new one runs with a line in the registry, and nothing else names the others."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heal_cases import HEIGHT, STREAMING, STUDENT, TEACHER, WIDTH, make_batch, model
from safetensors.torch import load_file
from test_house import MODULES
from torch import Tensor

import mlaconvert.healing.stages
from mlaconvert.clips.folder import Clips
from mlaconvert.errors import ConfigError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.batches import Batch
from mlaconvert.healing.estimate import estimate
from mlaconvert.healing.frames import noisy_layout, views
from mlaconvert.healing.objective import Objective
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.run import heal, plan
from mlaconvert.healing.stages import STAGES, Entry, stage_of
from mlaconvert.healing.stages.dmd import Critic, Generator
from mlaconvert.healing.stages.stage import Stage
from mlaconvert.model.flops import forward_work
from mlaconvert.model.load import load_model


class Still(Objective):
    """Answers nothing but zero to clean clips: the simplest loss that moves the weights."""

    def loss(self, batch: Batch, step: int) -> Tensor:
        timestep = torch.zeros(batch.latents.shape[0], batch.latents.shape[2])
        layout = noisy_layout(batch.view, STREAMING)
        return self.run(self.student, batch.latents, timestep, batch.context, layout).square().mean()

    def validate(self, clips: Clips) -> float:
        return float(self.student(clips.latents, torch.zeros(len(clips.latents)), clips.context).square().mean())


STAGE = Stage(
    objective=lambda models, recipe, streaming: Still(models.student, recipe),
    flops=lambda passes: 5 * passes.forward(passes.student, noisy_layout(passes.view, passes.student.streaming)),
    lr=3e-3,
    betas=(0.1, 0.2),
    ema=0.25,
    needs_streaming_student=True,
    few_step=True,
    holds_teacher=False,
)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> HealRecipe:
    monkeypatch.setitem(STAGES, "still", Entry(__name__, "nothing that moves"))
    return HealRecipe(stage="still", steps=2, batch=2, warmup=0, validation_clips=2, tracker="none")


def test_a_stage_of_ones_own_needs_one_line(home: Path, tmp_path: Path, still: HealRecipe) -> None:
    resolved = still.resolved()
    assert (resolved.lr, resolved.betas, resolved.ema) == (3e-3, (0.1, 0.2), 0.25)
    report = heal(home / "student", tmp_path / "out", still, data=home / "clips", cpu=True)
    assert [row[0] for row in report.curves.losses] == [1, 2]
    assert report.best[0] == 2
    assert report.best[1] < report.curves.validation[0][1]
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (home / "student", tmp_path / "out"))
    assert {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])} == {"self_attn"}
    assert load_model(tmp_path / "out").config.few_step
    assert "stage still, 2 steps" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="stage still needs clips"):
        plan(home / "student", still, teacher=home / "teacher")


def test_a_stage_counts_its_own_flops(still: HealRecipe) -> None:
    view = views(4, STREAMING)[0]
    found = estimate(still.resolved(), STUDENT, TEACHER, [(5, 3)], view, size=(HEIGHT, WIDTH))
    once = forward_work(STUDENT, noisy_layout(view, STREAMING).visible, 6).flops
    assert found.flops == 2 * 5 * once  # two clips
    assert (found.memory["teacher"], found.memory["critic"], found.memory["average"]) == (0, 0, 4 * 15)


def test_an_unknown_stage_is_refused_with_those_that_there_are(still: HealRecipe) -> None:
    with pytest.raises(ConfigError, match=r"stage is 'stil': give distill, .*, still"):
        HealRecipe(stage="stil")


def test_every_stage_is_whole() -> None:
    for name in STAGES:
        stage = stage_of(name)
        assert 0 < stage.lr < 1e-3
        assert all(0 <= beta < 1 for beta in (*stage.betas, stage.ema))


def test_only_a_stages_own_file_knows_its_name() -> None:
    """What asks for a stage by name would have to be found and changed for the next one."""
    names, words = set(STAGES), re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, STAGES))})(?![\w-])")
    inside = f"{mlaconvert.healing.stages.__name__.removeprefix('mlaconvert.')}"
    for name, path in MODULES.items():
        if name == inside or name.startswith(f"{inside}."):
            continue
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings, of fields too
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in prose:
                continue
            assert node.value not in names, f"{name}:{node.lineno} names stage {node.value}"
            if name.startswith("healing") or name == "cli.heal":
                assert not words.search(node.value), f"{name}:{node.lineno} names a stage: {node.value}"


def test_calls_reach_the_weights_through_what_wraps_them() -> None:
    """DDP and FSDP hook into the wrapper's forward; a critic is asked through its own."""
    settings: dict[str, Any] = {"critic_steps": 1}
    recipe = HealRecipe(stage="dmd", **settings).resolved()
    critic = Critic(model(TEACHER, 6), recipe)
    generator = Generator(model(STUDENT, 2), model(TEACHER, 1), critic, recipe)
    asked: list[str] = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Objective) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, method: Any, *args: Any) -> Any:
            asked.append(f"{type(self.inner).__name__}.{method.__name__}")
            return self.inner(method, *args)

    for objective in (critic, generator):
        assert objective.call(objective.phase, 0) == "dmd"  # by itself before anything wraps it
        objective.go_through(Wrapper(objective))
    trained: Any = SimpleNamespace()
    loss = generator.train_loss(make_batch(), 0, trained)
    assert asked == ["Generator.loss", "Critic.score"]
    assert torch.equal(loss, generator.loss(make_batch(), 0))
    asked.clear()
    generator.critic_loss(make_batch(), 0)
    assert asked == ["Generator.rollout", "Critic.loss"]
    assert not [name for name, _ in generator.named_parameters() if not name.startswith("student.")]


def test_a_shared_choice_is_even_and_not_the_exit_step() -> None:
    """All numbers of [0, 1) in turn: each of 2 to 5 comes as often, whichever of four steps they stand for."""
    for count in (2, 3, 4, 5):
        found = [(int(4 * i / 20_000), make(i / 20_000).shared_choice(count)) for i in range(20_000)]
        for step in range(4):
            for choice in range(count):
                assert found.count((step, choice)) == pytest.approx(5000 / count, rel=0.03)
    assert make(0.6).shared_choice(5) == int(0.6 * 7919) % 5 == 1  # runs that were begun draw what they drew


def make(shared: float) -> Batch:
    return Batch(latents=torch.empty(0), context=torch.empty(0), null=None, view=None, rows=None, shared=shared)  # type: ignore[arg-type]
