"""Whole healing runs: interrupted and resumed, diverged, on two processes, sharded, and from the command line."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file
from test_heal import STREAMING, TEACHER
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.inputs import refuse_foreign_links
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing import run as heal_run
from mlaconvert.healing.loop import DivergedError
from mlaconvert.healing.output import plot_curves
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.run import heal, plan
from mlaconvert.healing.stages import few_step as fewstep
from mlaconvert.healing.stages.distill import Distill
from mlaconvert.healing.state import LAST, load, save
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

HANG = 600  # seconds after which a child process is given up
FILES = ["README.md", "config.json", "conversion.json", WEIGHTS_NAME, "healing.json", "healing.png"]


def save_teacher(folder: Path, streaming: Any = STREAMING) -> Path:
    made = WanModel(TEACHER)
    randomize(made, 1)
    folder.mkdir(parents=True)
    save_file(made.state_dict(), folder / WEIGHTS_NAME)
    names = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")
    config = {"_class_name": "CausalWanModel", "model_type": "t2v", "patch_size": [1, 2, 2]}
    config |= {name: getattr(TEACHER, name) for name in names}
    config["streaming"] = dataclasses.asdict(streaming) if streaming else None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its conversion and clips."""
    root = tmp_path_factory.mktemp("heal")
    save_teacher(root / "teacher")
    settings = ConvertRecipe(
        init="svd", kv_rank=7, rope_dim=4, q_rank="none", key_norm="token", height=4, width=6, vae_stride=1
    )
    convert(root / "teacher", root / "student", settings)
    g = torch.Generator().manual_seed(0)
    (root / "clips").mkdir()
    for i, count in enumerate((5, 8)):
        clips = {
            "latents": torch.randn(count, 3, 6, 4, 6, generator=g),
            "context": torch.randn(count, 4, 10, generator=g),
        }
        save_file(clips, root / "clips" / f"{i}.safetensors")
    save_file({"context": torch.randn(1, 4, 10, generator=g)}, root / "clips" / "null_context.safetensors")
    return root


@pytest.fixture(autouse=True)
def short_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewstep, "TEACHER_STEPS", 2)


def settings(stage: str, **options: Any) -> HealRecipe:
    base: dict[str, Any] = {"stage": stage, "steps": 4, "batch": 2, "lr": 2e-3, "warmup": 2, "validation_clips": 3}
    base |= {"validate_every": 2, "save_every": 2, "critic_steps": 2, "tracker": "none", "solver_steps": 8}
    return HealRecipe(**base | options)


def run(home: Path, output: Path, recipe: HealRecipe, **options: Any) -> Any:
    return heal(home / "student", output, recipe, **{"data": home / "clips", "cpu": True} | options)


def in_processes(target: Callable[..., None], *arguments: tuple[Any, ...]) -> list[int | None]:
    """Exit codes of `target`, called in a fresh process for each of `arguments`; None for one that hangs.

    They are never forked: OpenMP's threads do not survive a fork, and the child waits for them for ever.
    """
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=target, args=each) for each in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(HANG)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- output ----------------------------------------------------------------------------------------------------------


def test_the_output_is_a_model_folder_like_any_other(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    report = run(home, tmp_path / "out", settings("distill", steps=20, validate_every=5, lr=1e-2), say=lines.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    healed, student = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path / "out", home / "student"))
    assert {n: t.shape for n, t in healed.items()} == {n: t.shape for n, t in student.items()}
    changed = {name for name in healed if not torch.equal(healed[name], student[name])}
    assert changed == {name for name in healed if ".self_attn." in name}
    assert (tmp_path / "out" / "config.json").read_text() == (home / "student" / "config.json").read_text()
    data = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert data["teacher"] == "teacher"
    assert data["recipe"]["lr"] == 1e-2
    assert len(data["losses"]["rows"]) == 20
    assert [step for step, _ in data["validation"]] == [0, 5, 10, 15, 20]
    # What is written is what had the best validation, and it can be measured again.
    best = min(data["validation"], key=lambda row: row[1])
    assert [data["written"]["step"], data["written"]["validation"]] == best
    assert best[1] < data["validation"][0][1]
    clips = torch.cat([load_file(home / "clips" / f"{i}.safetensors")["latents"] for i in (0, 1)])[-3:, :, :4]
    context = load_file(home / "clips" / "1.safetensors")["context"][-3:]
    written, teacher = load_model(tmp_path / "out"), load_model(home / "teacher")
    again = Distill(written, teacher, settings("distill"), written.config.streaming)
    assert again.validate(Clips(clips, context)) == pytest.approx(best[1], rel=1e-5)
    assert report.best[1] == best[1]
    assert [len(x) for x in data["rank_budget_occupancy"].values()] == [2, 2]
    assert "The model has not been trained since" not in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "healing.png").read_bytes().startswith(b"\x89PNG")
    assert any("step 20/20: loss" in line for line in lines)
    log = [json.loads(line) for line in (tmp_path / "out.state" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in log) == 20


def test_a_student_of_an_older_version_comes_out_with_the_class_that_reads_it(home: Path, tmp_path: Path) -> None:
    student = shutil.copytree(home / "student", tmp_path / "student")
    raw = json.loads((student / "config.json").read_text())
    old = {name: value for name, value in raw.items() if name != "quantization_config"}
    (student / "config.json").write_text(json.dumps(old | {"_class_name": "CausalWanModel"}))
    recipe = settings("distill", steps=1, batch=1)
    heal(student, tmp_path / "out", recipe, teacher=home / "teacher", data=home / "clips", cpu=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw
    assert raw["_class_name"] == "WanMLATransformer3DModel"


def test_a_healed_model_can_be_healed_again(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "one", settings("distill", steps=1))
    heal(
        tmp_path / "one",
        tmp_path / "two",
        settings("teacher-forcing", steps=1),
        teacher=home / "teacher",
        data=home / "clips",
        cpu=True,
    )
    data = json.loads((tmp_path / "two" / "healing.json").read_text())
    assert [stage["recipe"]["stage"] for stage in data["before"]] == ["distill"]


def test_distill_needs_no_data(home: Path, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    (tmp_path / "student").symlink_to(home / "student")
    stages: list[str] = []
    recipe = settings("distill", steps=1, clips=4)
    report = heal(
        tmp_path / "student",
        tmp_path / "out",
        recipe,
        teacher=tmp_path / "teacher",
        cpu=True,
        progress=lambda stage, *_: stages.append(stage),
    )
    made = sorted((tmp_path / "out.state" / "clips").iterdir())
    assert [path.name for path in made] == ["clips-00000.safetensors"]
    assert load_file(made[0])["latents"].shape == (4, 3, 6, 24, 32)
    assert {"generate", "distill"} <= set(stages)
    assert len(report.curves.losses) == 1


def test_a_trained_teacher_of_the_built_in_model_still_draws_its_clips(tmp_path: Path) -> None:
    """So its stages follow each other as the paper's do, with the first stage's model as the next one's teacher."""
    recipe = ConvertRecipe(init="svd", kv_rank=7, rope_dim=4, height=24, width=32, vae_stride=1)
    convert("tiny", tmp_path / "student", recipe)
    teacher = tmp_path / "teacher"
    forcing = settings("teacher-forcing", steps=1, batch=1, validation_clips=1)
    heal(tmp_path / "student", teacher, forcing, cpu=True)
    report = heal(
        tmp_path / "student",
        tmp_path / "out",
        settings("distill", steps=1, batch=1, validation_clips=1),
        teacher=teacher,
        cpu=True,
    )
    assert report.teacher == "teacher"
    assert not (tmp_path / "out.state" / "clips").exists()  # none was generated
    assert plan(tmp_path / "student", settings("consistency"), teacher=teacher).tokens > 0
    stranger = shutil.copytree(tmp_path / "student", tmp_path / "stranger")
    record = json.loads((stranger / "conversion.json").read_text())
    record["source"]["sha256"] = "0" * 64
    (stranger / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="needs clips"):
        plan(stranger, settings("consistency"), teacher=teacher)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["distill", "teacher-forcing", "consistency", "dmd"])
def test_an_interrupted_run_goes_on_bit_for_bit(home: Path, tmp_path: Path, stage: str) -> None:
    recipe = settings(stage, accumulate=2 if stage == "distill" else 1)
    straight = run(home, tmp_path / "straight", recipe)
    # In the step after a save; at first also before anything was saved.
    for stop in (1, 3) if stage == "distill" else (3,):

        def interrupt(_: str, done: int, total: int, stop: int = stop) -> None:
            if done == stop:
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


def test_soap_is_not_for_sharded_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"optimizer soap needs whole matrices; launch without --use_fsdp"):
        run(home, tmp_path / "out", settings("distill", optimizer="soap"), cpu=False)
    assert list(tmp_path.iterdir()) == []


def _killed(home: Path, output: Path, recipe: HealRecipe) -> None:
    """In a process of its own: a run that is killed in its fifth step."""

    def die(_: str, done: int, total: int) -> None:
        if done == 5:
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


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def interrupt(_: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return interrupt


def test_the_state_of_another_run_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "out", settings("distill"), progress=stop_at(3))
    for change, name in (({"seed": 1}, "seed"), ({"train": "latent"}, "train"), ({"steps": 9}, "steps")):
        with pytest.raises(ConfigError, match=f"holds a run with another {name}; .*--restart"):
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


def with_bad_clips(home: Path, folder: Path, *rows: int) -> Path:
    """The clips of `home`, with an infinity in these rows of the second of the two shards, of 5 and 8 clips."""
    shutil.copytree(home / "clips", folder)
    clips = load_file(folder / "1.safetensors")
    for row in rows:
        clips["latents"][row, 1, 2, 3, 0] = torch.inf
    save_file(clips, folder / "1.safetensors")
    return folder


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


# --- diverging -------------------------------------------------------------------------------------------------------


def test_a_run_that_explodes_stops_with_its_last_good_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlaconvert.healing.stages.teacher_forcing import TeacherForcing

    whole = TeacherForcing.loss
    for factor, what in ((float("nan"), "loss nan"), (1e4, "the running median is")):

        def loss(self: Any, batch: Any, step: int, factor: float = factor) -> torch.Tensor:
            return whole(self, batch, step) * (factor if step == 13 else 1)

        monkeypatch.setattr(TeacherForcing, "loss", loss)
        output = tmp_path / what[:4]
        with pytest.raises(DivergedError, match=rf"diverged at step 14 \(.*{what}.*--lr") as raised:
            run(home, output, settings("teacher-forcing", steps=20, save_every=4))
        assert raised.value.exit_code == 1
        assert f"the last good state is in {output}.state" in str(raised.value)
        state = load(tmp_path / f"{what[:4]}.state" / LAST)
        assert state["step"] == 12
        assert all(t.isfinite().all() for t in state["parts"]["student"]["weights"].values())
        assert not output.exists()


# --- input that does not fit -----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", WEIGHTS_NAME):
        (bare / name).symlink_to(home / "student" / name)
    poor = tmp_path / "poor"
    poor.mkdir()
    save_file(load_file(home / "clips" / "0.safetensors"), poor / "0.safetensors")
    both = save_teacher(tmp_path / "bidirectional", None)
    distill, out = settings("distill"), tmp_path / "out"
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (InputError, "does not record what it was converted from", lambda: heal(bare, out, distill)),
        (InputError, "no such folder of clips", lambda: run(home, out, distill, data=tmp_path / "none")),
        (ConfigError, "needs clips", lambda: run(home, out, settings("dmd"), data=None)),
        (ConfigError, "null_context", lambda: run(home, out, settings("dmd"), data=poor)),
        (ConfigError, "needs a streaming teacher", lambda: run(home, out, settings("consistency"), teacher=both)),
        (InputError, "has dim 48, the teacher .* 192", lambda: run(home, out, distill, teacher="tiny")),
        (OutputError, "exists", lambda: run(home, bare, distill)),
        (OutputError, "does not exist", lambda: run(home, tmp_path / "a" / "b", distill)),
        (OutputError, "no healing run's state", lambda: run(home, out, distill, state=poor, restart=True)),
    ]
    before = sorted(tmp_path.rglob("*"))
    for error, message, call in cases:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "conversion.json", "healing.json"])
def test_what_a_link_leads_to_is_not_copied_into_the_output(home: Path, tmp_path: Path, name: str) -> None:
    """Whoever made the folder would else have a file of the user's in a model that is published next."""
    folder = shutil.copytree(home / "student", tmp_path / "student")
    (tmp_path / "mine").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=f"{name} is a link, and what it leads to would be copied"):
        heal(folder, tmp_path / "out", settings("distill", steps=1), teacher=home / "teacher")
    assert {path.name for path in tmp_path.iterdir()} == {"student", "mine"}
    # In the Hub's cache, all files are links: those to its own blobs are read.
    cache = tmp_path / "models--alice--student"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(home / "student", snapshot)
    shutil.copy(home / "student" / "README.md", cache / "blobs" / "1")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../blobs/1")
    refuse_foreign_links(snapshot, ["README.md", "conversion.json"])
    (cache / "blobs" / "1").unlink()
    (cache / "blobs" / "1").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"README\.md is a link"):
        refuse_foreign_links(snapshot, ["README.md"])


def test_a_bidirectional_teacher_distills_what_it_sees(home: Path, tmp_path: Path) -> None:
    both = save_teacher(tmp_path / "bidirectional", None)
    report = run(home, tmp_path / "out", settings("distill", attention_steps=1), teacher=both)
    assert len(report.curves.losses) == 4


def test_mixed_precision_trains_float32_weights(home: Path, tmp_path: Path) -> None:
    recipe = settings("distill", precision="bf16", gradient_checkpointing=True, steps=2)
    report = run(home, tmp_path / "out", recipe)
    exact = run(home, tmp_path / "exact", settings("distill", steps=2))
    assert load(tmp_path / "out.state" / LAST)["parts"]["student"]["weights"].popitem()[1].dtype == torch.float32
    assert report.curves.losses[0][1] == pytest.approx(exact.curves.losses[0][1], rel=0.05)
    assert report.curves.losses[0][1] != exact.curves.losses[0][1]


def test_saved_moments_are_those_of_what_is_trained(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", settings("distill", train="latent", steps=2))
    part = load(tmp_path / "out.state" / LAST)["parts"]["student"]
    assert set(part["optimizer"]) == set(part["weights"])
    assert all("self_attn" in name and "k_norm_proj" not in name for name in part["weights"])


def test_the_plot_draws_short_and_long_runs() -> None:
    from mlaconvert.healing.loop import Curves

    for steps in (1, 50):
        curves = Curves(losses=[[i + 1, 1.0, 0.1, 1.0] for i in range(steps)], validation=[[0, 1.0], [steps, 0.5]])
        assert plot_curves(curves, settings("dmd")).startswith(b"\x89PNG")


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(home: Path, tmp_path: Path) -> None:
    """Through the launcher, as users start it, and without the bad clips, which both leave out."""
    clips = with_bad_clips(home, tmp_path / "clips", 1, 7)
    flags = ["--data", str(clips), "--bad-shards", "skip", "--stage", "teacher-forcing", "--steps", "4", "--cpu"]
    flags += ["--lr", "2e-3"]
    flags += ["--save-every", "2", "--validate-every", "2", "--tracker", "none"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = tmp_path / "pair"
    done = subprocess.run(
        [*launch, "-m", "mlaconvert", "heal", str(home / "student"), "-o", str(output), *flags, "--batch", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 4/4") == done.stderr.count("are left out") == 1  # only one process speaks
    alone = CliRunner().invoke(
        app, ["heal", str(home / "student"), "-o", str(tmp_path / "alone"), *flags, "--batch", "4"]
    )
    assert alone.exit_code == 0, alone.stderr
    ours, theirs = (load_file(folder / WEIGHTS_NAME) for folder in (output, tmp_path / "alone"))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours)
    assert load(tmp_path / "pair.state" / LAST)["processes"] == 2


def sharded(home: Path, folder: Path) -> None:
    """One of two processes: train with torch's fully_shard, save, restore into a fresh objective, and train on."""
    from test_heal import STREAMING
    from torch.distributed.fsdp import fully_shard

    from mlaconvert.clips.folder import ClipFolder
    from mlaconvert.healing.batches import Batches, Stored
    from mlaconvert.healing.models import trainable
    from mlaconvert.healing.stages.distill import Distill
    from mlaconvert.healing.state import Trained, choose_trained, make_optimizer, save

    together = torch.distributed.is_initialized()
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if together else (1, 0)
    recipe = settings("distill", batch=2, train="attention", attention_steps=2).resolved()
    with open_checkpoint(home / "student") as student, open_checkpoint(home / "teacher") as teacher:
        clips = ClipFolder(home / "clips", student.config)
        # Alone, one process does what the two would: each loss is over its own clips.
        shares = [
            Batches(Stored(clips, None, held=1, seed=0), recipe, STREAMING, rank=r, world=2)
            for r in ((rank,) if together else (0, 1))
        ]
        frozen = load_model(teacher)

        def start() -> tuple[Trained, Any]:
            objective = Distill(trainable(student), frozen, recipe, STREAMING)
            choose_trained(objective.student, recipe.train)
            if world > 1:
                units = [m for m in objective.modules() if type(m).__name__ in objective._no_split_modules]
                for module in [*reversed(units), objective]:
                    fully_shard(module)
            optimizer = make_optimizer(objective, recipe, 2e-3)
            return Trained(objective, optimizer, 0.9), objective

        trained, objective = start()
        losses = []
        for step in range(4):
            if step == 3:  # a fresh start from a saved state in the middle
                state = trained.state()
                trained, objective = start()
                trained.restore(state)
            loss = torch.stack([objective.call(objective.loss, share.batch(step), step) for share in shares]).mean()
            loss.backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            trained.follow(step)
            losses.append(loss.item())
        with torch.no_grad(), trained.averaged():
            value = objective.call(objective.loss, shares[0].batch(9), 9).item()
        kinds = {type(p).__name__ for p in trained.parameters.values()}
        state = {"weights": trained.state()["weights"], "average": trained.weights()}
    if rank == 0:
        save(folder / f"{world}.pt", {"state": state, "losses": losses, "value": value, "kinds": sorted(kinds)})


@pytest.mark.slow
def test_a_sharded_run_is_the_whole_run(home: Path, tmp_path: Path) -> None:
    sharded(home, tmp_path)
    assert in_processes(_in_group, *((rank, home, tmp_path) for rank in range(2))) == [0, 0]
    one, two = load(tmp_path / "1.pt"), load(tmp_path / "2.pt")
    assert (one["kinds"], two["kinds"]) == (["Parameter"], ["DTensor"])
    assert two["value"] == pytest.approx(one["value"], rel=1e-4)
    for kind in ("weights", "average"):
        for name, tensor in one["state"][kind].items():
            assert torch.allclose(two["state"][kind][name], tensor, atol=2e-5), name


def _in_group(rank: int, home: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    sharded(home, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- the command line ------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_heal_from_the_command_line(home: Path, tmp_path: Path) -> None:
    flags = ("--stage", "distill", "--steps", 2, "--data", home / "clips", "--lr", "1e-3", "--cpu", "--tracker", "none")
    result = invoke("heal", home / "student", "-o", tmp_path / "out", *flags, "--json", "--batch", 2)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["recipe"] | {"stage": "distill", "steps": 2, "lr": 1e-3, "batch": 2} == data["recipe"]
    assert "step 2/2" in result.stderr
    assert f"written to {tmp_path / 'out'}" in result.stderr
    assert "no later state validated better" not in result.stderr
    result = invoke("heal", home / "student", "-o", tmp_path / "worse", *flags, "--lr", 0.5, "--ema", 0)
    assert "step 0, validation" in result.stderr
    assert "no later state validated better" in result.stderr


def test_dry_run_writes_nothing(home: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "videomla-dmd", "--data", home / "clips", "--dry-run")
    result = invoke("heal", home / "student", *flags, "--tflops", 0.1)
    assert result.exit_code == 0, result.stderr
    for word in ("dmd, 1000 steps", "critic", "FLOPs", "a step", "roughly"):
        assert word in result.stdout
    assert "not estimated" in invoke("heal", home / "student", *flags).stdout
    data = json.loads(invoke("heal", home / "student", *flags, "--json").stdout)
    assert data["total_memory"] == sum(data["memory"].values())
    generated = invoke("heal", home / "student", "--stage", "distill", "--dry-run")
    assert generated.exit_code == 0, generated.stderr


def test_wrong_usage_is_one_sentence(home: Path, tmp_path: Path) -> None:
    student, out = home / "student", tmp_path / "out"
    for arguments, message in (
        ((student, "--stage", "distill"), "give one with -o DIR"),
        ((student, "-o", out), "no stage"),
        ((student, "-o", out, "--stage", "magic"), "stage is 'magic': give distill, "),
        ((student, "-o", out, "--stage", "distill", "--train", "some"), "train is 'some': give latent, "),
        ((tmp_path / "none", "-o", out, "--stage", "distill"), "there is no such file or folder"),
        ((student, "-o", out, "--stage", "teacher-forcing"), "give a folder of them with --data DIR"),
    ):
        result = invoke("heal", *arguments)
        assert result.exit_code == 2, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
