"""The whole job on the model that ships: analyze, convert, compare with the teacher, show the frames side by side."""

from __future__ import annotations

import dataclasses
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
from mlaconvert.evaluation.compare import compare
from mlaconvert.evaluation.conditions import TINY_GUIDANCE, TINY_STEPS, tiny_conditions
from mlaconvert.evaluation.drift import RolloutPlan
from mlaconvert.evaluation.report import EvaluationReport, make_report
from mlaconvert.files.inputs import read_json
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.output import Output
from mlaconvert.generation.movies import contact_sheet, save_movie, side_by_side
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Progress

FRAMES = 60
CAPTIONS = 3
STEPS, GUIDANCE = TINY_STEPS, TINY_GUIDANCE
CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; `sheet` shows the teacher's frames above the student's, `movie` both side by side."""

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


def run_demo(output: Path, progress: Progress, *, overwrite: bool = False) -> Demo:
    """Convert the tiny model into `output`/tiny-mla and compare; the figures are those of this run.

    Raises OutputError when that folder exists (without `overwrite`), or `output` cannot be one.
    """
    make_folder(output)
    if (output / "tiny-mla").exists() and not overwrite:
        raise OutputError(f"{output / 'tiny-mla'} exists; choose another folder with -o DIR, or delete it")
    analysis = analyze("tiny", progress=progress)
    path = output / "tiny-mla"
    report = convert(
        "tiny", Output(path, overwrite=overwrite), load_recipe("tiny"), listener=Listener(progress=progress)
    )
    teacher, student = load_model("tiny"), load_model(path)
    conditions = dataclasses.replace(
        tiny_conditions(teacher.config.streaming, clips=CLIPS), rollout=rollout_plan(teacher)
    )
    found = compare(teacher, student, conditions, path=path.name, progress=progress)
    found = dataclasses.replace(found, conversion=read_json(path / CONVERSION_NAME))
    sheet, movie = output / "frames.png", output / "frames.gif"
    if found.teacher_video is not None and found.video is not None:
        videos = [found.teacher_video, found.video]
        contact_sheet(videos).save(sheet)
        save_movie(side_by_side(videos), movie)
    return Demo(
        analysis=analysis,
        report=report,
        evaluation=make_report(teacher, "tiny", conditions, [found]),
        model=path,
        sheet=sheet,
        movie=movie,
    )


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
