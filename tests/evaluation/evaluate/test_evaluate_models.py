"""Fidelity, drift, cache and speed of a converted model beside its teacher, against references written longhand."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from evaluate_cases import STREAMING
from hub_server import Blob, Hub
from safetensors.torch import save_file

from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.evaluation.losses import measure_fidelity
from mlaconvert.evaluation.request import Request
from mlaconvert.evaluation.run import evaluate
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.shipped import TINY
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import rollout
from mlaconvert.progress import silent

SaveFolder = Callable[..., Path]
QUICK = Request(clips=3, frames=8, videos=2, steps=2)


def test_models_side_by_side(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded teacher is found beside the models; more cache loses less, and nothing is lost without loss."""
    monkeypatch.chdir(made.parent)
    stages: dict[str, list[tuple[int, int]]] = {}
    found = []
    report = evaluate(
        [str(made / name) for name in ("small", "large", "lossless")],
        QUICK,
        progress=lambda stage, done, total, _="": stages.setdefault(stage, []).append((done, total)),
        on_model=lambda index, one: found.append((index, one.models[0].path)),
    )
    small, large, lossless = report.models
    assert found == [(0, "small"), (1, "large"), (2, "lossless")]
    assert report.teacher == "wan_tiny"
    assert small.fidelity.velocity_error > 1.5 * large.fidelity.velocity_error
    assert abs(lossless.fidelity.excess) < 1e-5
    assert lossless.drift is not None
    assert max(lossless.drift.difference["student"]) < 1e-4
    assert max(lossless.drift.difference["other_seed"]) > 0.1
    tokens = 5 * 2 * 4  # a window of five frames, 4 x 8 latent pixels in patches of 2 x 2
    assert small.cache_bytes == {"teacher": 3 * 192 * tokens * 4, "student": 3 * (9 + 6 + 1) * tokens * 4}
    for stage in ("hash", "clips", "losses", "timesteps", "rollouts"):
        done, total = stages[stage][-1]
        assert done == total, stage
    assert report.data["clips"] == 3
    assert (report.data["latent_height"], report.data["latent_width"]) == (4, 8)
    assert "not trained with" in " ".join(report.conditions["notes"])


def test_models_with_an_exact_present(made: Path) -> None:
    """Beside a lossless one nothing is lost; a lossy one begins its videos as the teacher does."""
    lossless, lossy = evaluate([str(made / name) for name in ("exact_lossless", "exact")], QUICK).models
    assert abs(lossless.fidelity.excess) < 1e-5
    assert max(lossless.fidelity.attention_errors) < 1e-5
    assert lossless.clean_past is not None
    assert lossless.clean_past.velocity_error < 1e-5
    assert lossless.drift is not None
    assert max(lossless.drift.difference["student"]) < 1e-4
    assert lossy.drift is not None
    first, rest = lossy.drift.difference["student"][:2], lossy.drift.difference["student"][2:]
    assert max(first) < 1e-4
    assert min(rest) > 1e-2
    assert lossy.clean_past is not None
    assert lossy.clean_past.velocity_error > 1e-3
    assert lossy.cache_bytes == {"teacher": 3 * 192 * 40 * 4, "student": 3 * (9 + 1) * 40 * 4}


def test_json_has_the_fields_that_a_card_quotes(made: Path, clips: Clips, tmp_path: Path) -> None:
    save_file({"latents": clips.latents, "context": clips.context}, tmp_path / "clips.safetensors")
    request = dataclasses.replace(QUICK, data=tmp_path, clips=4)
    data = json.loads(json.dumps(evaluate([str(made / "small")], request, progress=silent).to_json()))
    assert list(data) == ["teacher", "data", "conditions", "versions", "models"]
    (model,) = data["models"]
    assert model["excess"] == pytest.approx(model["student_loss"] / model["teacher_loss"] - 1)
    assert len(model["attention_errors"]) == 3
    steps, clean = model["velocity_by_timestep"], model["clean_past"]
    assert len(steps) == 8
    sums = [math.fsum(step[f"{who}_loss"] for step in steps) for who in ("teacher", "student")]
    assert [clean["teacher_loss"], clean["student_loss"]] == pytest.approx([total / 8 for total in sums])
    assert clean["excess"] == pytest.approx(sums[1] / sums[0] - 1)
    assert clean["velocity_error"] == pytest.approx(math.fsum(step["velocity_error"] for step in steps) / 8)
    assert model["frames_per_second"].keys() == {"teacher", "student", "ratio"}
    assert len(model["drift"]["difference"]["student"]) == 8
    assert data["data"]["from"] == f"the last clips of the folder {tmp_path.name}"
    assert data["data"]["clips"] == 4
    assert str(made) not in json.dumps(data)
    assert str(tmp_path) not in json.dumps(data)
    # The clips' own figures: nothing of them was generated.
    with open_checkpoint(made / "wan_tiny") as opened:
        teacher = load_model(opened, streaming=STREAMING)
    expected = measure_fidelity(teacher, load_model(made / "small"), Clips(clips.latents[-4:], clips.context[-4:]))
    assert model["teacher_loss"] == pytest.approx(expected.teacher_loss, rel=1e-6)


def test_clips_that_a_conversion_was_fitted_to_are_said(made: Path, clips: Clips, tmp_path: Path) -> None:
    """The last ones of a folder are measured on; where they reach back into the first, a line says so."""
    save_file({"latents": clips.latents, "context": clips.context}, tmp_path / "clips.safetensors")
    shutil.copytree(made / "small", tmp_path / "fitted")
    path, total = tmp_path / "fitted" / "conversion.json", len(clips.latents)
    record = json.loads(path.read_text())
    for fitted, said in ((total - 4, False), (total - 3, True)):
        record["recipe"] |= {"init": "calibrated", "clips": fitted}
        path.write_text(json.dumps(record))
        request = dataclasses.replace(QUICK, data=tmp_path, clips=4, frames=0, teacher=str(made / "wan_tiny"))
        report = evaluate([str(tmp_path / "fitted")], request, progress=silent)
        notes = " ".join(report.to_json()["conditions"]["notes"])
        assert (f"The folder has {total} clips, and the conversion was fitted to {fitted}" in notes) == said


def test_without_rollouts_there_is_no_speed(made: Path) -> None:
    report = evaluate([str(made / "small")], dataclasses.replace(QUICK, frames=0), progress=silent)
    (model,) = report.to_json()["models"]
    assert model["drift"] is model["frames_per_second"] is report.conditions["rollout"] is None
    assert model["cache_bytes"]["teacher"] > model["cache_bytes"]["student"]


def test_a_bidirectional_model_generates_whole_clips(made: Path) -> None:
    report = evaluate([str(made / "both_ways")], QUICK, progress=silent)
    assert report.conditions["streaming"] is None
    assert report.conditions["rollout"]["latent_frames"] == report.data["latent_frames"]
    assert report.conditions["rollout"]["given_frames"] == 0
    (model,) = report.models
    assert model.video is not None
    assert model.video.shape[2] == report.data["latent_frames"]
    assert report.to_json()["models"][0]["clean_past"] is model.clean_past is None  # it has no past


def test_clips_of_one_chunk_have_no_past(made: Path, clips: Clips, tmp_path: Path) -> None:
    save_file({"latents": clips.latents[:, :, :2].contiguous(), "context": clips.context}, tmp_path / "c.safetensors")
    request = dataclasses.replace(QUICK, data=tmp_path, frames=0)
    (model,) = evaluate([str(made / "small")], request, progress=silent).models
    assert model.clean_past is None
    assert len(model.timesteps) == 8


def test_generated_clips_are_not_those_of_a_calibration(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        seeds.append(options["seed"])
        return rollout(*arguments, **options)

    monkeypatch.setattr("mlaconvert.clips.teacher_made.rollout", spy)
    monkeypatch.setattr("mlaconvert.evaluation.losses.BATCH_TOKENS", 2 * 5 * 8)
    monkeypatch.setattr("mlaconvert.evaluation.conditions.BATCH_TOKENS", 2 * 5 * 8)
    evaluate([str(made / "small")], dataclasses.replace(QUICK, frames=0), progress=silent)
    first = min(seeds)
    assert first > 10**9
    assert seeds == [first, first + 2]  # clips in batches of two, a seed each


@pytest.mark.slow
def test_the_teacher_has_to_be_the_recorded_one(made: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "small").symlink_to(made / "small")
    source = str(tmp_path / "small")
    with pytest.raises(InputError, match=r"converted from wan_tiny, which was not found .*--teacher"):
        evaluate([source], QUICK, progress=silent)
    other = tmp_path / "wan_tiny"
    other.mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (other / file).write_bytes((golden / file).read_bytes())
    state = load_model(other).state_dict()
    save_file({name: 1.01 * tensor for name, tensor in state.items()}, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="its SHA-256 differs"):
        evaluate([source], QUICK, progress=silent)
    report = evaluate([source], dataclasses.replace(QUICK, teacher=str(golden), frames=0), progress=silent)
    assert "named by hand" in " ".join(report.conditions["notes"])
    own = shutil.copytree(TINY, tmp_path / "own", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    convert("tiny", tmp_path / "drawn", ConvertRecipe(init="svd", kv_rank=9, height=24, width=32, vae_stride=1))
    request = dataclasses.replace(QUICK, teacher=str(own), frames=0)
    report = evaluate([str(tmp_path / "drawn")], request, progress=silent)
    assert report.data["from"] == "clips of the built-in model that training never drew"
    assert "named by hand" in " ".join(report.conditions["notes"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (bare / file).write_bytes((made / "small" / file).read_bytes())
    with pytest.raises(InputError, match="does not record what it was converted from"):
        evaluate([str(bare)], QUICK, progress=silent)


def test_what_cannot_be_compared_is_refused(
    made: Path, golden_state: Any, golden_config: Any, save_folder: SaveFolder
) -> None:
    small = str(made / "small")
    with pytest.raises(InputError, match="small and both_ways see time differently"):
        evaluate([small, str(made / "both_ways")], QUICK, progress=silent)
    save_folder(golden_state, golden_config, "pair/transformer")
    pair = save_folder(golden_state, golden_config, "pair/transformer_2").parent
    with pytest.raises(InputError, match="two experts; evaluate one with --subfolder transformer or"):
        evaluate([str(pair)], QUICK, progress=silent)
    wide = golden_state | {"patch_embedding.weight": torch.randn(96, 20, 1, 2, 2)}
    images = save_folder(wide, golden_config | {"model_type": "i2v", "in_dim": 20}, "images")
    with pytest.raises(InputError, match="image-to-video"):
        evaluate([str(images)], QUICK, progress=silent)
    with pytest.raises(InputError, match="name at least one"):
        evaluate([], QUICK, progress=silent)
    for name, least in (("clips", 1), ("frames", 0), ("videos", 1), ("steps", 1), ("seed", 0)):
        values: Any = {name: least - 1}
        with pytest.raises(ConfigError, match=f"^{name} is {least - 1}: give {least} or more$"):
            Request(**values)
        Request(**{name: least})
    with pytest.raises(ConfigError, match="frames is 2, of which 2 are given"):
        evaluate([small], dataclasses.replace(QUICK, frames=2), progress=silent)


def test_one_expert_of_two(made: Path, golden: Path, tmp_path: Path) -> None:
    pair, converted = tmp_path / "pair", tmp_path / "pair_mla"
    for folder in ("transformer", "transformer_2"):
        (pair / folder).mkdir(parents=True)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            (pair / folder / file).write_bytes((golden / file).read_bytes())
    convert(pair, converted, ConvertRecipe(init="svd", kv_rank=9, height=32, width=64))
    request = dataclasses.replace(QUICK, frames=0)
    report = evaluate([Source(converted, subfolder="transformer_2")], request, progress=silent)
    assert report.teacher == "pair"
    assert "One expert alone" in " ".join(report.conditions["notes"])
    named = dataclasses.replace(request, teacher=str(pair))
    assert (
        evaluate([Source(converted, subfolder="transformer_2")], named, progress=silent).models[0].fidelity
        == report.models[0].fidelity
    )


FLAGS = ("--clips", 2, "--frames", 6, "--videos", 1, "--steps", 1)


def test_the_command_shows_saves_and_prints_json(made: Path, tmp_path: Path) -> None:
    scores = {"motion_smoothness": [0.975, []]}
    (tmp_path / "a_eval_results.json").write_text(json.dumps(scores))
    one, page = made / "small", tmp_path / "both.html"
    flags = (*FLAGS, "--save", "--html", page, "--vbench", tmp_path, "--vbench", tmp_path)
    result = invoke("evaluate", one, made / "large", *flags)
    assert result.exit_code == 0, result.stderr
    for word in ("Beside wan_tiny", "small", "large", "noisy pasts", "clean pasts", "layer 2", "frames a second"):
        assert word in result.stdout
    saved = json.loads((one / "evaluation.json").read_text())
    assert [model["path"] for model in saved["models"]] == ["small"]
    assert saved["models"][0]["vbench"]["scores"] == {"motion_smoothness": 0.975}
    assert "<!doctype html>" in (one / "report.html").read_text()
    assert "motion smoothness" in page.read_text()
    assert str(page) in result.stderr
    plain = invoke("evaluate", one, *FLAGS, "--json")
    again = json.loads(plain.stdout)
    timed = ("frames_per_second", "vbench")
    for entry in (again["models"][0], saved["models"][0]):
        for name in timed:
            entry.pop(name, None)
    assert again == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user/repo", "--save"], "user/repo is no folder on this disk to save into"),
        (["{made}/small", "--html", "{made}/none/page.html"], "none does not exist; create it first"),
        (["{made}/small", "--dtype", "int8"], "dtype is 'int8'"),
        (["{made}/small", "--vbench", "{made}"], "no *_eval_results.json there"),
        (["{made}/small", "--data", "{made}"], "no *.safetensors shards"),
        (["{made}/small", "--clips", "0"], "clips is 0: give 1 or more"),
        (["{made}/none"], "there is no such file or folder"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage(made: Path, arguments: list[str], message: str) -> None:
    result = invoke("evaluate", *(argument.format(made=made) for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_too_few_scores(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a_eval_results.json").write_text('{"motion_smoothness": [0.9, []]}')
    result = invoke("evaluate", made / "small", made / "large", "--vbench", tmp_path)
    assert result.exit_code == 2
    assert "1 VBench results for 2 models" in result.stderr


def test_the_teacher_on_the_hub_is_of_the_recorded_commit(hub: Hub, golden: Path, tmp_path: Path) -> None:
    files = {f"dit/{name}": Blob((golden / name).read_bytes(), True) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    other = files[f"dit/{WEIGHTS_NAME}"].data
    newer = files | {f"dit/{WEIGHTS_NAME}": Blob(other[:-4] + b"\0\0\0\0", True)}
    repo = hub.create("alice/wan")
    first = repo.commit(files)
    repo.commit(newer)
    convert(Source("alice/wan/dit", revision=first), tmp_path / "out", ConvertRecipe(init="svd"))
    conversion = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert conversion["source"]["revision"] == first
    with open_teacher(str(tmp_path / "out"), conversion) as teacher:
        assert teacher.store.revision == first
        assert teacher.store.files[0].read_bytes() == other
    # A history that was rewritten since may still have the same files.
    repo.commits = [("f" * 40, files)]
    with open_teacher(str(tmp_path / "out"), conversion) as teacher:
        assert teacher.store.revision == "f" * 40
    repo.commits = [("e" * 40, newer)]
    with pytest.raises(InputError, match="alice/wan/dit is another model"), open_teacher("out", conversion):
        pass
