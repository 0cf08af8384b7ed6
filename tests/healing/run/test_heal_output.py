"""Whole healing runs: interrupted and resumed, diverged, on two processes, sharded, and from the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from heal_run_cases import run, save_teacher, settings
from safetensors.torch import load_file

from mlaconvert.cli.heal import _estimate_text
from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.loop import DivergedError
from mlaconvert.healing.run import heal, plan
from mlaconvert.healing.stages.distill import Distill
from mlaconvert.healing.state import LAST, load
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model

FILES = ["README.md", "config.json", "conversion.json", WEIGHTS_NAME, "healing.json", "healing.png"]


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


@pytest.mark.slow
def test_distill_needs_no_data(home: Path, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    (tmp_path / "student").symlink_to(home / "student")
    stages: list[str] = []
    recipe = settings("distill", steps=1, clips=4)
    report = heal(
        tmp_path / "student",
        tmp_path / "out",
        recipe,
        listener=Listener(progress=lambda stage, *_: stages.append(stage)),
        teacher=tmp_path / "teacher",
        cpu=True,
    )
    made = sorted((tmp_path / "out.state" / "clips").iterdir())
    assert [path.name for path in made] == ["clips-00000.safetensors"]
    assert load_file(made[0])["latents"].shape == (4, 3, 6, 24, 32)
    assert {"generate", "distill"} <= set(stages)
    assert len(report.curves.losses) == 1


@pytest.mark.slow
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
    probed = invoke("heal", home / "student", *flags, "--cpu").stdout
    assert re.search(r"time +\S+ s a step, about \d+ \w+ on cpu besides validations", probed)
    data = json.loads(invoke("heal", home / "student", *flags, "--json").stdout)
    assert data["total_memory"] == sum(data["memory"].values())
    generated = invoke("heal", home / "student", "--stage", "distill", "--dry-run")
    assert generated.exit_code == 0, generated.stderr


def test_a_gpu_that_is_too_small_is_said_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what makes a run smaller; and a rate that was given tells the time without a probe."""
    found = plan(home / "student", settings("distill"), data=home / "clips", flops_per_second=1e9)
    assert found.seconds == pytest.approx(found.flops / 1e9)
    assert plan(home / "student", settings("distill"), data=home / "clips").seconds is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (found.total_memory - 1, 2**40))
    last = _estimate_text(found, settings("distill"), "cuda").splitlines()[-1]
    assert last.startswith("memory        does not fit: about ")
    assert last.endswith("--gradient-checkpointing or --precision bf16, or shard it (accelerate launch)")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (found.total_memory, 2**40))
    assert "does not fit" not in _estimate_text(found, settings("distill"), "cuda")


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
