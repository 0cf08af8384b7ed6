"""Whole healing runs: interrupted and resumed, diverged, on two processes, sharded, and from the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_run_cases import in_processes, run, settings, with_bad_clips
from safetensors.torch import load_file, save_file
from torch import nn

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing import run as heal_run
from mlaconvert.healing.batches import Batches, DrawnClips
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import STAGES
from mlaconvert.healing.state import LAST, load, make_optimizer, save
from mlaconvert.healing.targets import Targets
from mlaconvert.model.load import load_model
from mlaconvert.progress import Progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "stage",
    [
        "distill",
        pytest.param("teacher-forcing", marks=pytest.mark.slow),
        pytest.param("consistency", marks=pytest.mark.slow),
        "dmd",
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(home: Path, tmp_path: Path, stage: str) -> None:
    recipe = settings(stage, accumulate=2 if stage == "distill" else 1)
    straight = run(home, tmp_path / "straight", recipe)
    # In the step after a save; at first also before anything was saved.
    for stop in (1, 3) if stage == "distill" else (3,):

        def interrupt(name: str, done: int, _total: int, _note: str = "", stop: int = stop) -> None:
            if name == stage and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "again", recipe, progress=interrupt)
        assert not (tmp_path / "again").exists()
    again = run(home, tmp_path / "again", recipe)
    assert again.curves == straight.curves
    assert load_model(tmp_path / "again").config.few_step == (stage in ("consistency", "dmd"))
    first, second = contents(tmp_path / "straight"), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] in ([], ["README.md"])
    logs = [(tmp_path / f"{name}.state" / "log.jsonl").read_text().splitlines() for name in ("straight", "again")]
    assert sorted(logs[0]) == sorted(logs[1])


@pytest.mark.slow
def test_soap_goes_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    """Through a turn of its eigenbases before and after the interruption."""
    recipe = settings("distill", steps=13, save_every=7, optimizer="soap", train="all", attention_steps=2)
    straight = run(home, tmp_path / "straight", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "again", recipe, progress=stop_at(8))
    state = load(tmp_path / "again.state" / LAST)["parts"]["student"]
    assert state["steps"] == [7]
    bases = state["optimizer"]["blocks.0.self_attn.kv_a_proj_with_mqa.weight"]["Q"]
    assert [len(basis) for basis in bases] == [11, 48]  # latent 7 and rotary key 4, of width 48
    for basis in bases:
        assert torch.allclose(basis.T @ basis, torch.eye(len(basis)), atol=1e-5)
    assert run(home, tmp_path / "again", recipe).curves == straight.curves
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("straight", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    adam = run(home, tmp_path / "adam", dataclasses.replace(recipe, optimizer="adamw"))
    assert adam.curves.losses[0][1] == straight.curves.losses[0][1]
    assert adam.curves.losses[-1][1] != straight.curves.losses[-1][1]


@pytest.mark.slow
def test_muon_goes_on_bit_for_bit_and_turns_matrices_alone(home: Path, tmp_path: Path) -> None:
    """A matrix has a momentum, the rest the two moments of AdamW."""
    recipe = settings("distill", steps=9, save_every=5, optimizer="muon", train="all", attention_steps=0, warmup=1)
    straight = run(home, tmp_path / "straight", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "again", recipe, progress=stop_at(6))
    moments = load(tmp_path / "again.state" / LAST)["parts"]["student"]["optimizer"]
    assert moments["blocks.0.self_attn.o.weight"].keys() == {"momentum_buffer"}
    assert moments["blocks.0.self_attn.o.bias"].keys() == {"exp_avg", "exp_avg_sq"}
    assert run(home, tmp_path / "again", recipe).curves == straight.curves
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("straight", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_teacher_runs_once_for_clips_that_come_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights with all that it made thrown away in between, also where a killed run left one of them broken.

    Of seven steps the first three have clips of their own, but for those that match attention: the first of all.
    """
    recipe = settings("distill", steps=7, reuse=3, attention_steps=1, validate_every=7, save_every=2)
    made: list[int] = []
    get = Targets.get

    def counting(self: Targets, batch: str, make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        def counted() -> torch.Tensor:
            made.append(int(batch.split("-", maxsplit=1)[0]))
            return make()

        return get(self, batch, counted, device)

    monkeypatch.setattr(Targets, "get", counting)
    straight = run(home, tmp_path / "straight", recipe)
    assert made == [1, 2, 0]
    assert not (tmp_path / "straight.state" / "targets").exists()
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "again", recipe, progress=stop_at(5))
    (kept,) = (tmp_path / "again.state" / "targets").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [
        "0-0-0.safetensors",
        "1-0-0.safetensors",
        "2-0-0.safetensors",
    ]
    (kept / "1-0-0.safetensors").write_bytes(b"torn")
    (kept / "2-0-0.safetensors").unlink()
    made.clear()
    assert run(home, tmp_path / "again", recipe).curves == straight.curves
    assert sorted(made) == [1, 2]
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "other", recipe, progress=stop_at(5))
    (before,) = (tmp_path / "other.state" / "targets").iterdir()
    (tmp_path / "other.state" / LAST).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "other", dataclasses.replace(recipe, seed=1), progress=stop_at(5))
    (after,) = (tmp_path / "other.state" / "targets").iterdir()
    assert after.name != before.name


def test_the_same_batches_come_again() -> None:
    """Each process and each part of a step has its own."""
    recipe = settings("distill", steps=8, reuse=3, accumulate=2).resolved()
    batches = [Batches(DrawnClips(), recipe, StreamingConfig(), rank=rank, world=2) for rank in range(2)]
    assert [batches[0].batch(step).name for step in range(4)] == ["0-0-0", "1-0-0", "2-0-0", "0-0-0"]
    assert torch.equal(batches[0].batch(5, 1).latents, batches[0].batch(2, 1).latents)
    every = [one.batch(step, micro) for one in batches for step in range(3) for micro in range(2)]
    assert len({batch.name for batch in every}) == len({float(batch.latents.sum()) for batch in every}) == 12


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("dmd", {"data_share": 0.1}, "data_share is 0.1, but only stage distill has it"),
        ("teacher-forcing", {"reuse": 2}, "reuse is 2, but only stage distill has it"),
        ("distill", {"reuse": 9}, "reuse is 9: give 1 to the 4 steps"),
        ("distill", {"data_share": 1.0}, "data_share"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(stage: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(stage, **options)


def test_a_step_of_muon_has_the_size_of_adamws() -> None:
    """In every direction alike: 0.2 of the rate is the root of the mean square (arXiv 2502.16982, section 2.2)."""
    layer = nn.Linear(96, 40)
    net = nn.ModuleDict({"blocks": nn.ModuleList([layer]), "head": nn.Linear(40, 5)})
    recipe = settings("teacher-forcing", optimizer="muon", weight_decay=0.25).resolved()
    optimizer = make_optimizer(net, recipe, 1e-2)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.25), (3, 0.25)]
    assert optimizer.param_groups[0]["momentum"] == 0.95
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in layer.parameters()]
    layer(torch.randn(128, 96, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    weight, bias = (p.detach() - old for p, old in zip(layer.parameters(), before, strict=True))
    values = torch.linalg.svdvals(weight)
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.3)
    assert values.max() < 2 * values.min()
    assert bias.abs().tolist() == pytest.approx([1e-2] * 40, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["soap", "muon"])
def test_what_needs_whole_matrices_is_not_for_sharded_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=rf"optimizer {optimizer} needs whole matrices; launch without --use_fsdp"):
        run(home, tmp_path / "out", settings("distill", optimizer=optimizer), cpu=False)
    assert list(tmp_path.iterdir()) == []


def _killed(home: Path, output: Path, recipe: HealRecipe) -> None:
    """In a process of its own: a run that is killed in its fifth step."""

    def die(stage: str, done: int, _total: int, _note: str = "") -> None:
        if stage == recipe.stage and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    run(home, output, recipe, progress=die)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.slow
def test_a_killed_process_leaves_a_state_to_go_on_from(home: Path, tmp_path: Path) -> None:
    recipe = settings("teacher-forcing", steps=6)
    straight = run(home, tmp_path / "straight", recipe)
    assert in_processes(_killed, (home, tmp_path / "killed", recipe)) == [-signal.SIGKILL]
    assert load(tmp_path / "killed.state" / LAST)["step"] == 4
    lines: list[str] = []
    assert run(home, tmp_path / "killed", recipe, say=lines.append).curves == straight.curves
    assert lines[0] == f"going on from step 4, saved in {tmp_path / 'killed.state'}"


def stop_at(step: int) -> Progress:
    def interrupt(stage: str, done: int, _total: int, _note: str = "") -> None:
        if stage in STAGES and done == step:
            raise KeyboardInterrupt

    return interrupt


def test_the_state_of_another_run_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out", settings("distill"), progress=stop_at(3))
    for change, name in (({"seed": 1}, "seed"), ({"train": "latent"}, "train"), ({"steps": 9}, "steps")):
        with pytest.raises(ConfigError, match=rf"holds a run with another {name} \(.* instead of .*\); .*--restart"):
            run(home, tmp_path / "out", settings("distill", **change))
    other = tmp_path / "clips"
    other.mkdir()
    save_file(load_file(home / "clips" / "1.safetensors"), other / "1.safetensors")
    with pytest.raises(ConfigError, match="holds a run with another data"):
        run(home, tmp_path / "out", settings("distill"), data=other)
    run(home, tmp_path / "out", settings("distill", steps=9), restart=True)


def test_a_lower_rate_may_go_on(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out", settings("distill"), progress=stop_at(3))
    report = run(home, tmp_path / "out", settings("distill", lr=1e-3))
    assert [row[2] for row in report.curves.losses][:2] == [1e-3, 2e-3]
    assert report.curves.losses[2][2] == 1e-3


@pytest.mark.slow
def test_a_run_without_bad_clips_goes_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    """Eleven good clips of thirteen, of which the last two were held back when there were three."""
    clips = with_bad_clips(home, tmp_path / "clips", 2, 6)
    recipe = settings("teacher-forcing", steps=6, bad_shards="skip")
    lines: list[str] = []
    straight = run(home, tmp_path / "straight", recipe, data=clips, say=lines.append)
    assert lines[0].endswith("(2 of its 8 clips: 2, 6, counted from 0)")
    assert "2 of 13 clips and 0 whole shards are left out; 9 clips are trained on, 2 validated on" in lines[1]
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out", recipe, data=clips, progress=stop_at(3))
    assert run(home, tmp_path / "out", recipe, data=clips).curves == straight.curves
    # Others that are left out make another run.
    other = with_bad_clips(home, tmp_path / "other", 2)
    with pytest.raises(ConfigError, match="holds a run with another data"):
        run(home, tmp_path / "out", recipe, data=other, overwrite=True)
    with pytest.raises(InputError, match="has values that are not finite"):
        run(home, tmp_path / "out", dataclasses.replace(recipe, bad_shards="refuse"), data=clips, overwrite=True)


def test_a_run_that_meets_a_bad_clip_goes_on_without_it(home: Path, tmp_path: Path) -> None:
    """What it had done stays. With this seed the bad clip is the tenth that is drawn, two a step."""
    clips = with_bad_clips(home, tmp_path / "clips", 2)
    recipe = settings("teacher-forcing", steps=7, save_every=1)
    with pytest.raises(InputError, match=r"1\.safetensors: has values that are not finite"):
        run(home, tmp_path / "out", recipe, data=clips)
    assert load(tmp_path / "out.state" / LAST)["step"] == 4
    lines: list[str] = []
    skipping = dataclasses.replace(recipe, bad_shards="skip")
    report = run(home, tmp_path / "out", skipping, data=clips, say=lines.append)
    assert f"going on from step 4, saved in {tmp_path / 'out.state'}" in lines
    assert len(report.curves.losses) == 7
    with pytest.raises(ConfigError, match="holds a run with another data"):
        run(home, tmp_path / "out", skipping, data=with_bad_clips(home, tmp_path / "more", 2, 4), overwrite=True)


def test_processes_that_see_different_clips_are_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal_run, "gather_object", lambda mine: [*mine, "0123456789abcdef"])
    with pytest.raises(InputError, match="processes see different clips there"):
        run(home, tmp_path / "out", settings("distill"))
    assert not (tmp_path / "out.state").exists()


def test_a_torn_state_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out", settings("distill"), progress=stop_at(3))
    last = tmp_path / "out.state" / LAST
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.pt: cannot be read .*--restart"):
        run(home, tmp_path / "out", settings("distill"))


@pytest.mark.parametrize("signal_raised", [KeyboardInterrupt, SystemExit])
def test_an_interruption_of_a_save_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_raised: type[BaseException]
) -> None:
    class Stops(torch.nn.Parameter):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise signal_raised

    save(tmp_path / LAST, {"step": 1})
    with pytest.raises(signal_raised):
        save(tmp_path / LAST, {"first": torch.zeros(9), "second": Stops(torch.zeros(2))})

    def interrupted(*_: Any) -> None:  # as torch's zip writer does when it is closed half-way
        error = RuntimeError("unexpected pos 27648960 vs 27648848")
        error.__context__ = signal_raised()
        raise error

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(signal_raised):
        save(tmp_path / LAST, {"step": 2})
    assert load(tmp_path / LAST)["step"] == 1


@pytest.mark.slow
def test_a_run_of_an_earlier_form_of_the_loss_goes_on(home: Path, tmp_path: Path) -> None:
    """Its weights are kept; that its validations were lower, by another measure, does not make them the best."""
    recipe, out, said = settings("distill", steps=6), tmp_path / "out", list[str]()
    with pytest.raises(KeyboardInterrupt):
        run(home, out, recipe, progress=stop_at(4))
    state = torch.load(tmp_path / "out.state" / LAST, weights_only=True)
    assert state.pop("form") == 2
    kept = json.loads(state["recipe"])
    state["recipe"] = json.dumps({k: v for k, v in kept.items() if k not in ("clean_past", "data_share", "reuse")})
    state["best"] = [2, 1e-9]
    torch.save(state, tmp_path / "out.state" / LAST)
    report = run(home, out, recipe, say=said.append)
    assert said[0].startswith("going on from step 4, ")
    assert said[1].startswith("this run began under an earlier form of the loss")
    assert len(report.curves.losses) == 6
    assert report.best[0] == 6  # the only one that was validated since


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_it_came_in(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Long before the next save: the step is finished and saved, which a line says, and the run goes on behind it."""
    recipe = settings("distill", steps=5, save_every=100, validate_every=100)
    straight = run(home, tmp_path / "straight", recipe)
    before = signal.getsignal(number)

    def interrupt(stage: str, done: int, _total: int, _note: str = "") -> None:
        if stage == "distill" and done == 2:
            os.kill(os.getpid(), number)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        run(home, tmp_path / "again", recipe, progress=interrupt, say=said.append)
    assert signal.getsignal(number) is before
    if number == signal.SIGINT:
        kept = f"step 3 of 5 is saved in {tmp_path / 'again.state'}; the same command goes on from there"
        assert stopped.value.args == (kept,)
    else:
        assert stopped.value.args == (143,)
    assert "interrupted: the state is saved after this step; interrupt again to stop at once" in said
    assert load(tmp_path / "again.state" / LAST)["step"] == 3
    again = run(home, tmp_path / "again", recipe, say=said.append)
    assert f"going on from step 3, saved in {tmp_path / 'again.state'}" in said
    assert again.curves == straight.curves
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("straight", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a terminal; a shell ignores it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once(home: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, _total: int, _note: str = "") -> None:
        if stage == "distill" and done == 1:
            signal.raise_signal(signal.SIGINT)  # in this thread: two of a process may come as one
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(home, tmp_path / "out", settings("distill", steps=3, save_every=100), progress=interrupt)
    assert stopped.value.args == ("no step is saved yet; the same command begins again",)
    assert not (tmp_path / "out.state" / LAST).exists()
    run(home, tmp_path / "out", settings("distill", steps=1, save_every=1))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt, match="no step is saved yet"):
        run(home, tmp_path / "none", settings("distill"), progress=stop_at(0))
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(home, tmp_path / "out", settings("distill", steps=1), progress=stop_at(1))
    kept = f"what was saved last is kept in {tmp_path / 'out.state'}; the same command goes on from there"
    assert stopped.value.args == (kept,)
