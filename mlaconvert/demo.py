"""The whole job on the model that ships: analyze, convert, compare with the teacher, show the frames side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlaconvert.analyze import Analysis, analyze
from mlaconvert.cache import LatentCache
from mlaconvert.config import StreamingConfig
from mlaconvert.convert import ConversionReport, convert, load_recipe
from mlaconvert.evaluate import Evaluation, evaluate
from mlaconvert.families import open_checkpoint
from mlaconvert.model import WanModel, load_model
from mlaconvert.rollout import Sampler, rollout
from mlaconvert.tiny.clips import HEIGHT, HELD_BACK, WIDTH, embed_captions, held_back, null_context, sample_scenes

FRAMES = 60
CAPTIONS = 3
STEPS = 12
GUIDANCE = 1.5
SCALE = 4  # screen pixels per pixel of the tiny videos
CLIPS = 64

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; `sheet` shows the teacher's frames above the student's, `movie` both side by side."""

    analysis: Analysis
    report: ConversionReport
    evaluation: Evaluation
    teacher_bytes: int
    student_bytes: int
    sheet: Path
    movie: Path

    @property
    def reduction_percent(self) -> float:
        """How much smaller the student's measured cache is."""
        return 100 * (1 - self.student_bytes / self.teacher_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the figures and where the pictures are."""
        return {
            "analysis": self.analysis.to_json(),
            "conversion": [model.to_json() for model in self.report.models],
            "evaluation": dataclasses.asdict(self.evaluation) | {"excess": self.evaluation.excess},
            "cache_bytes": {"teacher": self.teacher_bytes, "converted": self.student_bytes},
            "reduction_percent": self.reduction_percent,
            "model": str(self.report.output),
            "pictures": [str(self.sheet), str(self.movie)],
        }


def run_demo(output: Path, progress: Progress) -> Demo:
    """Convert the tiny model into `output`/tiny-mla and compare; the figures are those of this run.

    Raises OutputError when that folder exists.
    """
    with open_checkpoint("tiny") as checkpoint:
        analysis = analyze(checkpoint, progress=lambda done, total: progress("analyze", done, total))
    output.mkdir(parents=True, exist_ok=True)
    recipe = dataclasses.replace(load_recipe("tiny"), init="calibrated", nope_dim=None)
    report = convert("tiny", output / "tiny-mla", recipe, progress=progress)
    teacher, student = load_model("tiny"), load_model(output / "tiny-mla")
    progress("evaluate", 0, 1)
    evaluation = evaluate(teacher, student, held_back(CLIPS))
    progress("evaluate", 1, 1)
    chunk = (teacher.config.streaming or StreamingConfig()).chunk_frames
    total, done = 2 * ((FRAMES // chunk - 1) * (STEPS + 1) + 1), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("generate", done, total)

    videos = [generate(model, step) for model in (teacher, student)]
    sheet, movie = output / "frames.png", output / "frames.gif"
    contact_sheet(videos).save(sheet)
    save_movie(videos, movie)
    return Demo(
        analysis=analysis,
        report=report,
        evaluation=evaluation,
        teacher_bytes=cache_bytes(teacher),
        student_bytes=cache_bytes(student),
        sheet=sheet,
        movie=movie,
    )


def generate(model: WanModel, on_step: Callable[[], None] | None = None) -> Tensor:
    """Videos [CAPTIONS, 3, FRAMES, HEIGHT, WIDTH] that continue the first chunk of held-back clips.

    The noise is the same for every model.
    """
    scenes = sample_scenes(CAPTIONS, HELD_BACK + 1)
    chunk = (model.config.streaming or StreamingConfig()).chunk_frames
    chunks = rollout(
        model,
        embed_captions(scenes.tokens()),
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        sampler=Sampler.many_step(STEPS, guidance=GUIDANCE),
        null_context=null_context(),
        prefix=scenes.draw(torch.arange(chunk)),
        on_step=on_step,
    )
    return torch.cat(list(chunks), 2)


def cache_bytes(model: WanModel) -> int:
    """Measured bytes of the model's cache for one video in float32."""
    return LatentCache(model.config, batch=1, height=HEIGHT, width=WIDTH).nbytes


def contact_sheet(videos: list[Tensor], columns: int = 10) -> Image.Image:
    """Frames at even steps in time: a row per model below each other, caption by caption."""
    picked = torch.linspace(0, videos[0].shape[2] - 1, columns).round().long()
    rows = [video[row, :, picked] for row in range(len(videos[0])) for video in videos]  # [3, columns, H, W]
    return _image(torch.cat([torch.cat(list(row.unbind(1)), 2) for row in rows], 1))


def save_movie(videos: list[Tensor], path: Path) -> None:
    """An animated GIF, 16 frames a second: models from left to right, captions from top to bottom."""
    both = torch.cat(videos, 4)  # [N, 3, F, H, models * W]
    frames = [_image(torch.cat(list(both[:, :, i].unbind(0)), 1)) for i in range(both.shape[2])]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=62, loop=0)


def _image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture, enlarged without smoothing."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    picture = Image.fromarray(values.numpy())
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
