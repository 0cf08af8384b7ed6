"""Several models beside one teacher, with everything needed to measure again."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlaconvert import __version__
from mlaconvert.evaluation.compare import ModelEvaluation
from mlaconvert.evaluation.conditions import Conditions
from mlaconvert.evaluation.drift import RolloutPlan
from mlaconvert.evaluation.vbench import VBenchScores
from mlaconvert.evaluation.verdict import Verdict, judge
from mlaconvert.model.wan import WanModel


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Several models beside one teacher, with everything needed to measure again.

    `data`, `conditions` and `versions` are plain data; `pixels` is true when latents are RGB pixels in [-1, 1].
    """

    teacher: str
    data: dict[str, Any]
    conditions: dict[str, Any]
    versions: dict[str, str]
    pixels: bool
    models: tuple[ModelEvaluation, ...]
    teacher_vbench: VBenchScores | None = None

    def verdicts(self) -> list[Verdict]:
        """What the figures of each model come to."""
        return [
            judge({**model.to_json(), "conditions": self.conditions}, model.conversion, model.healing)
            for model in self.models
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as evaluation.json holds it: every figure and verdict, no frames."""
        data: dict[str, Any] = {
            "teacher": self.teacher,
            "data": self.data,
            "conditions": self.conditions,
            "versions": self.versions,
            "models": [
                {**model.to_json(), "verdict": verdict.to_json()}
                for model, verdict in zip(self.models, self.verdicts(), strict=True)
            ],
        }
        if self.teacher_vbench is not None:
            data["teacher_vbench"] = self.teacher_vbench.to_json()
        return data


def make_report(
    teacher: WanModel, name: str, conditions: Conditions, models: Sequence[ModelEvaluation], **extra: Any
) -> EvaluationReport:
    """A report of `models`, evaluated beside `teacher` (called `name`) under `conditions`."""
    clips, plan = conditions.clips, conditions.rollout
    count, _, frames, height, width = clips.latents.shape
    device = teacher.patch_embedding.weight.device
    streaming = teacher.config.streaming
    return EvaluationReport(
        teacher=name,
        data={
            "from": conditions.clips_from,
            "clips": count,
            "latent_frames": frames,
            "latent_height": height,
            "latent_width": width,
        },
        conditions={
            "seed": conditions.seed,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "attention": teacher.attention_mode,
            "streaming": dataclasses.asdict(streaming) if streaming else None,
            "rollout": None if plan is None else _plan_json(plan),
            "notes": list(conditions.notes),
        },
        versions={"mlaconvert": __version__, "torch": torch.__version__, "python": platform.python_version()},
        pixels=teacher.config.works_on_pixels,
        models=tuple(models),
        **extra,
    )


def _plan_json(plan: RolloutPlan) -> dict[str, Any]:
    return {
        "videos": plan.context.shape[0],
        "latent_frames": plan.frames,
        "given_frames": plan.given,
        "window_frames": plan.streaming.window_frames,
        "timesteps": [round(t, 4) for t in plan.sampler.timesteps],
        "renoise": plan.sampler.renoise,
        "guidance": plan.sampler.guidance,
        "seed": plan.seed,
        "other_seed": plan.other_seed,
    }
