"""The whole job on the model that ships: analyze, convert, compare with the teacher, show the frames side by side."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.clips.tiny.clips import HEIGHT, HELD_BACK, WIDTH, embed_captions, null_context, sample_scenes
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.analyze import analyze
from mlaconvert.conversion.recipes import load_recipe
from mlaconvert.conversion.report import ConversionReport
from mlaconvert.conversion.run import convert
from mlaconvert.conversion.spectra import Analysis
from mlaconvert.errors import OutputError
from mlaconvert.evaluation.compare import ModelEvaluation, compare_on_clips, with_rollouts
from mlaconvert.evaluation.conditions import TINY_GUIDANCE, TINY_STEPS, tiny_conditions
from mlaconvert.evaluation.drift import RolloutPlan
from mlaconvert.evaluation.report import EvaluationReport, make_report
from mlaconvert.files.inputs import read_json
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.output import Output
from mlaconvert.generation.movies import save_movie
from mlaconvert.generation.sheets import contact_sheet, side_by_side
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.units import format_bytes, percent, signed_percent

FRAMES = 60
CAPTIONS = 3
STEPS, GUIDANCE = TINY_STEPS, TINY_GUIDANCE
CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; `sheet` has rows of frames, the teacher's above the student's, `movie` both side by side."""

    analysis: Analysis
    report: ConversionReport
    evaluation: EvaluationReport
    model: Path
    sheet: Path
    movie: Path

    def to_json(self) -> dict[str, Any]:
        """Plain data: the figures and where the pictures are."""
        found = self.evaluation.models[0]
        return {
            "analysis": self.analysis.to_json(),
            "conversion": [model.to_json() for model in self.report.models],
            "evaluation": self.evaluation.to_json(),
            "reduction_percent": 100 * found.cache_reduction,
            "model": str(self.model),
            "pictures": [str(self.sheet), str(self.movie)],
        }


def make_folder(output: Path) -> None:
    """Make the folder of a demo. Raises OutputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made a folder ({error.strerror}); choose another with -o DIR") from None


def _unseen(_result: Analysis | ConversionReport) -> None:
    """Show nothing to anybody."""


@dataclass(frozen=True, kw_only=True)
class DemoListener(Listener):
    """Who is told what the demo does and finds, as it comes: `say` a sentence before each stage and one after it."""

    on_result: Callable[[Analysis | ConversionReport], None] = _unseen
    """Told what the first two stages found."""


def run_demo(output: Path, listener: DemoListener | None = None, *, overwrite: bool = False) -> Demo:
    """Convert the tiny model into `output`/tiny-mla and compare; the figures are those of this run.

    Raises OutputError when that folder exists (without `overwrite`), or `output` cannot be one.
    """
    told = listener or DemoListener()
    progress = told.progress
    make_folder(output)
    path = output / "tiny-mla"
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another folder with -o DIR, or delete it")
    told.say(
        "1 of 4, analyze: how far do the weights of attention compress by themselves? The model is `tiny`, a small "
        "trained one that ships and makes video chunk by chunk, as large streaming models do."
    )
    analysis = analyze("tiny", progress=progress)
    told.on_result(analysis)
    told.say(_analysed(analysis))
    told.say(
        "2 of 4, convert: clips run through the model, and each layer gets the latent that loses least of what "
        "attention makes of them; then 100 steps refit all layers at once. Nothing else is trained."
    )
    report = convert(
        "tiny",
        Output(path, overwrite=overwrite),
        load_recipe("tiny"),
        listener=Listener(progress=progress),
    )
    told.on_result(report)
    told.say(_converted(report))
    teacher, student = load_model("tiny"), load_model(path)
    plan = rollout_plan(teacher)
    conditions = dataclasses.replace(tiny_conditions(teacher.config.streaming, clips=CLIPS), rollout=plan)
    told.say(
        f"3 of 4, compare: both models predict the same {CLIPS} clips that neither has seen, at the same noise; then "
        "the cache is measured."
    )
    found = compare_on_clips(teacher, student, conditions, path=path.name, progress=progress)
    told.say(_compared(found))
    told.say(
        f"4 of 4, rollouts: long videos made chunk by chunk, where each chunk sees the others only through the cache, "
        f"so that errors can add up. {CAPTIONS} videos of {FRAMES} frames continue {plan.given} given ones: by the "
        "teacher, by the converted model from the same noise, and by the teacher from another noise, to tell chance."
    )
    found = with_rollouts(found, teacher, student, plan, progress=progress)
    found = dataclasses.replace(found, conversion=read_json(path / CONVERSION_NAME))
    told.say(_rolled_out(found))
    sheet, movie = output / "frames.png", output / "frames.gif"
    if found.teacher_video is not None and found.video is not None:
        videos, names = [found.teacher_video, found.video], ["teacher", "converted"]
        contact_sheet(videos, names, given=plan.given).save(sheet)
        save_movie(side_by_side(videos, names), movie)
    return Demo(
        analysis=analysis,
        report=report,
        evaluation=make_report(teacher, "tiny", conditions, [found]),
        model=path,
        sheet=sheet,
        movie=movie,
    )


def _analysed(analysis: Analysis) -> str:
    kept = analysis.summary()["energy_at_budget"].median
    return (
        f"A latent of {analysis.kv_rank} channels in place of {2 * analysis.dim} for keys and values keeps "
        f"{percent(kept)} of the weights' energy in the median layer. Weights must serve any input, so by themselves "
        "little would be left; the inputs that really come need far fewer channels, and the next stage looks at those."
    )


def _converted(report: ConversionReport) -> str:
    (model,) = report.models
    cached, dense = model.plan.config.cache_words
    less = signed_percent(model.plan.config.cache_share - 1)
    saved = f"A token now caches {cached} in all layers instead of {dense} ({less})"
    if not model.losses:  # so few clips that none was held back
        return f"{saved}."
    first, *_, last = model.losses.values()
    change = signed_percent(last / first - 1)
    return f"{saved}; on clips held back from it, the loss behind clean pasts changes by {change}."


def _compared(found: ModelEvaluation) -> str:
    clean, sizes = found.clean_past, found.cache_bytes
    assert clean is not None
    return (
        f"The cache shrinks from {format_bytes(sizes['teacher'])} to {format_bytes(sizes['student'])} in float32 "
        f"({signed_percent(-found.cache_reduction)}). Behind clean pasts, as in every rollout, the predicted velocity "
        f"is off by {percent(clean.velocity_error)}, and the loss changes by {signed_percent(clean.excess)}."
    )


def _rolled_out(found: ModelEvaluation) -> str:
    assert found.drift is not None
    late = found.drift.late_difference
    return (
        f"In the last third of the frames the converted model's videos differ from the teacher's by "
        f"{percent(late['student'])}; the teacher's own from another noise differ by {percent(late['other_seed'])}."
    )


def next_commands(demo: Demo) -> list[tuple[str, str]]:
    """Commands to go on with, each with what it is for."""
    model, folder = demo.model, demo.model.parent
    return [
        (f"mlaconvert generate {_quoted(model)} -o {_quoted(folder / 'video')} --seconds 8", "a longer video by it"),
        (
            f"mlaconvert heal {_quoted(model)} -o {_quoted(folder / 'tiny-healed')} --recipe tiny-distill",
            "train it closer to the teacher; half an hour on a CPU",
        ),
        ("mlaconvert analyze CHECKPOINT --gpu-gb 24", "what it would save on a model of yours, and on your GPU"),
        ("mlaconvert convert CHECKPOINT -o DIR --dry-run", "what converting it would do and need"),
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def rollout_plan(model: WanModel) -> RolloutPlan:
    """Rollouts of `FRAMES` frames that continue the first chunk of `CAPTIONS` held-back clips, from one noise."""
    scenes = sample_scenes(CAPTIONS, HELD_BACK + 1)
    streaming = model.config.streaming or StreamingConfig()
    return RolloutPlan(
        context=embed_captions(scenes.tokens()),
        prefix=scenes.draw(torch.arange(streaming.chunk_frames)),
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        sampler=Sampler.many_step(STEPS, guidance=GUIDANCE),
        null_context=null_context(),
        streaming=streaming,
        seed=0,
    )


def generate(model: WanModel, on_step: Callable[[], None] | None = None) -> Tensor:
    """The model's videos [CAPTIONS, 3, FRAMES, HEIGHT, WIDTH] under `rollout_plan`."""
    return torch.cat(list(rollout_plan(model).chunks(model, on_step=on_step)), 2)
