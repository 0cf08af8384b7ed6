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
from conftest import relative
from hub_server import Blob, Hub
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.evaluation import drift
from mlaconvert.evaluation import losses as losses_module
from mlaconvert.evaluation.drift import RolloutPlan, compare_videos, frame_statistics, paired_rollouts
from mlaconvert.evaluation.losses import evaluate, noisy_batches
from mlaconvert.evaluation.request import Request
from mlaconvert.evaluation.run import evaluate_models
from mlaconvert.evaluation.timesteps import velocity_by_timestep
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.shipped import TINY
from mlaconvert.model.blocks import Block
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import silent

SaveFolder = Callable[..., Path]
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
QUICK = Request(clips=3, frames=8, videos=2, steps=2)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def made(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the golden model beside conversions of it: streaming, lossless and bidirectional ones."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "wan_tiny").symlink_to(golden)
    video = {"height": 32, "width": 64, "streaming": STREAMING}
    recipes = {
        "small": ConvertRecipe(init="svd", kv_rank=9, q_rank="none", key_norm="token", **video),
        "large": ConvertRecipe(init="svd", kv_rank=60, q_rank="none", key_norm="token", **video),
        "lossless": ConvertRecipe(init="lossless", **video),
        "both_ways": ConvertRecipe(init="svd", kv_rank=9, height=32, width=64),
    }
    for name, recipe in recipes.items():
        convert(golden, folder / name, recipe)
    return folder


@pytest.fixture(scope="session")
def clips() -> Clips:
    """Five clips of six frames, 4 x 8 latent pixels."""
    generator = torch.Generator().manual_seed(3)
    return Clips(torch.randn(5, 16, 6, 4, 8, generator=generator), torch.randn(5, 7, 40, generator=generator))


@pytest.fixture(scope="session")
def teacher(golden: Path) -> WanModel:
    return load_model(golden, streaming=STREAMING)


@pytest.fixture(scope="session")
def student(made: Path) -> WanModel:
    return load_model(made / "small")


# --- losses and errors ---------------------------------------------------------------------------------------------


def test_losses_and_errors_are_those_of_each_model_alone(teacher: WanModel, student: WanModel, clips: Clips) -> None:
    """Layer by layer beside the teacher, or model by model with hooks: the same figures."""
    found = evaluate(teacher, student, clips, seed=4)
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
    found = evaluate(teacher, student, clips, seed=4)
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
    whole = evaluate(teacher, student, clips)
    assert len(losses_module.noisy_batches(teacher, clips)) == 1
    monkeypatch.setattr("mlaconvert.evaluation.losses.BATCH_TOKENS", 2 * 6 * 8)
    monkeypatch.setattr("mlaconvert.evaluation.conditions.BATCH_TOKENS", 2 * 6 * 8)
    batches = losses_module.noisy_batches(teacher, clips)
    assert [len(batch.noisy) for batch in batches] == [2, 2, 1]
    seen: list[tuple[str, int, int]] = []
    parts = evaluate(teacher, student, clips, progress=lambda *told: seen.append(told[:3]))
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


# --- drift and speed -----------------------------------------------------------------------------------------------


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
            frames=12,
            height=4,
            width=8,
            sampler=Sampler.many_step(2),
            seed=9,
            prefix=clips.latents[:3, :, :2],
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


# --- several models ------------------------------------------------------------------------------------------------


def test_models_side_by_side(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded teacher is found beside the models; more cache loses less, and nothing is lost without loss."""
    monkeypatch.chdir(made.parent)
    stages: dict[str, list[tuple[int, int]]] = {}
    found = []
    report = evaluate_models(
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


def test_json_has_the_fields_that_a_card_quotes(made: Path, clips: Clips, tmp_path: Path) -> None:
    save_file({"latents": clips.latents, "context": clips.context}, tmp_path / "clips.safetensors")
    request = dataclasses.replace(QUICK, data=tmp_path, clips=4)
    data = json.loads(json.dumps(evaluate_models([str(made / "small")], request, progress=silent).to_json()))
    assert list(data) == ["teacher", "data", "conditions", "versions", "models"]
    (model,) = data["models"]
    assert model["excess"] == pytest.approx(model["student_loss"] / model["teacher_loss"] - 1)
    assert len(model["attention_errors"]) == 3
    assert len(model["velocity_by_timestep"]) == 8
    assert model["frames_per_second"].keys() == {"teacher", "student", "ratio"}
    assert len(model["drift"]["difference"]["student"]) == 8
    assert data["data"]["from"] == f"clips of the folder {tmp_path.name}"
    assert data["data"]["clips"] == 4
    assert str(made) not in json.dumps(data)
    assert str(tmp_path) not in json.dumps(data)
    # The clips' own figures: nothing of them was generated.
    with open_checkpoint(made / "wan_tiny") as opened:
        teacher = load_model(opened, streaming=STREAMING)
    expected = evaluate(teacher, load_model(made / "small"), Clips(clips.latents[:4], clips.context[:4]))
    assert model["teacher_loss"] == pytest.approx(expected.teacher_loss, rel=1e-6)


def test_without_rollouts_there_is_no_speed(made: Path) -> None:
    report = evaluate_models([str(made / "small")], dataclasses.replace(QUICK, frames=0), progress=silent)
    (model,) = report.to_json()["models"]
    assert model["drift"] is model["frames_per_second"] is report.conditions["rollout"] is None
    assert model["cache_bytes"]["teacher"] > model["cache_bytes"]["student"]


def test_a_bidirectional_model_generates_whole_clips(made: Path) -> None:
    report = evaluate_models([str(made / "both_ways")], QUICK, progress=silent)
    assert report.conditions["streaming"] is None
    assert report.conditions["rollout"]["latent_frames"] == report.data["latent_frames"]
    assert report.conditions["rollout"]["given_frames"] == 0
    (model,) = report.models
    assert model.video is not None
    assert model.video.shape[2] == report.data["latent_frames"]


def test_generated_clips_are_not_those_of_a_calibration(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        seeds.append(options["seed"])
        return rollout(*arguments, **options)

    monkeypatch.setattr("mlaconvert.clips.teacher_made.rollout", spy)
    monkeypatch.setattr("mlaconvert.evaluation.losses.BATCH_TOKENS", 2 * 5 * 8)
    monkeypatch.setattr("mlaconvert.evaluation.conditions.BATCH_TOKENS", 2 * 5 * 8)
    evaluate_models([str(made / "small")], dataclasses.replace(QUICK, frames=0), progress=silent)
    first = min(seeds)
    assert first > 10**9
    assert seeds == [first, first + 2]  # clips in batches of two, a seed each


def test_the_teacher_has_to_be_the_recorded_one(made: Path, golden: Path, tmp_path: Path) -> None:
    (tmp_path / "small").symlink_to(made / "small")
    source = str(tmp_path / "small")
    with pytest.raises(InputError, match=r"converted from wan_tiny, which was not found .*--teacher"):
        evaluate_models([source], QUICK, progress=silent)
    other = tmp_path / "wan_tiny"
    other.mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (other / file).write_bytes((golden / file).read_bytes())
    state = load_model(other).state_dict()
    save_file({name: 1.01 * tensor for name, tensor in state.items()}, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="its SHA-256 differs"):
        evaluate_models([source], QUICK, progress=silent)
    report = evaluate_models([source], dataclasses.replace(QUICK, teacher=str(golden), frames=0), progress=silent)
    assert "named by hand" in " ".join(report.conditions["notes"])
    own = shutil.copytree(TINY, tmp_path / "own", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    convert("tiny", tmp_path / "drawn", ConvertRecipe(init="svd", kv_rank=9, height=24, width=32, vae_stride=1))
    request = dataclasses.replace(QUICK, teacher=str(own), frames=0)
    report = evaluate_models([str(tmp_path / "drawn")], request, progress=silent)
    assert report.data["from"] == "clips of the built-in model that training never drew"
    assert "named by hand" in " ".join(report.conditions["notes"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (bare / file).write_bytes((made / "small" / file).read_bytes())
    with pytest.raises(InputError, match="does not record what it was converted from"):
        evaluate_models([str(bare)], QUICK, progress=silent)


def test_what_cannot_be_compared_is_refused(
    made: Path, golden_state: Any, golden_config: Any, save_folder: SaveFolder
) -> None:
    small = str(made / "small")
    with pytest.raises(InputError, match="small and both_ways see time differently"):
        evaluate_models([small, str(made / "both_ways")], QUICK, progress=silent)
    save_folder(golden_state, golden_config, "pair/transformer")
    pair = save_folder(golden_state, golden_config, "pair/transformer_2").parent
    with pytest.raises(InputError, match="two experts; evaluate one with --subfolder transformer or"):
        evaluate_models([str(pair)], QUICK, progress=silent)
    wide = golden_state | {"patch_embedding.weight": torch.randn(96, 20, 1, 2, 2)}
    images = save_folder(wide, golden_config | {"model_type": "i2v", "in_dim": 20}, "images")
    with pytest.raises(InputError, match="image-to-video"):
        evaluate_models([str(images)], QUICK, progress=silent)
    with pytest.raises(InputError, match="name at least one"):
        evaluate_models([], QUICK, progress=silent)
    for name, least in (("clips", 1), ("frames", 0), ("videos", 1), ("steps", 1), ("seed", 0)):
        values: Any = {name: least - 1}
        with pytest.raises(ConfigError, match=f"^{name} is {least - 1}: give {least} or more$"):
            Request(**values)
        Request(**{name: least})
    with pytest.raises(ConfigError, match="frames is 2, of which 2 are given"):
        evaluate_models([small], dataclasses.replace(QUICK, frames=2), progress=silent)


def test_one_expert_of_two(made: Path, golden: Path, tmp_path: Path) -> None:
    pair, converted = tmp_path / "pair", tmp_path / "pair_mla"
    for folder in ("transformer", "transformer_2"):
        (pair / folder).mkdir(parents=True)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            (pair / folder / file).write_bytes((golden / file).read_bytes())
    convert(pair, converted, ConvertRecipe(init="svd", kv_rank=9, height=32, width=64))
    request = dataclasses.replace(QUICK, subfolder="transformer_2", frames=0)
    report = evaluate_models([str(converted)], request, progress=silent)
    assert report.teacher == "pair"
    assert "One expert alone" in " ".join(report.conditions["notes"])
    named = dataclasses.replace(request, teacher=str(pair))
    assert evaluate_models([str(converted)], named, progress=silent).models[0].fidelity == report.models[0].fidelity


# --- the command ---------------------------------------------------------------------------------------------------

FLAGS = ("--clips", 2, "--frames", 6, "--videos", 1, "--steps", 1)


def test_the_command_shows_saves_and_prints_json(made: Path, tmp_path: Path) -> None:
    scores = {"motion_smoothness": [0.975, []]}
    (tmp_path / "a_eval_results.json").write_text(json.dumps(scores))
    one, page = made / "small", tmp_path / "both.html"
    flags = (*FLAGS, "--save", "--html", page, "--vbench", tmp_path, "--vbench", tmp_path)
    result = invoke("evaluate", one, made / "large", *flags)
    assert result.exit_code == 0, result.stderr
    for word in ("Beside wan_tiny", "small", "large", "validation loss", "layer 2", "frames a second"):
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
    convert("alice/wan/dit", tmp_path / "out", ConvertRecipe(init="svd"), revision=first)
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
