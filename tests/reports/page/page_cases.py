"""What several of these tests are made of."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import torch

from mlaconvert.evaluation.compare import ModelEvaluation
from mlaconvert.evaluation.drift import Speed, compare_videos
from mlaconvert.evaluation.losses import Fidelity
from mlaconvert.evaluation.report import EvaluationReport
from mlaconvert.evaluation.timesteps import CleanPast, TimestepError
from mlaconvert.evaluation.vbench import VBenchScores

VOID = {"meta", "img", "line", "circle", "rect", "polyline", "br"}


class Page(HTMLParser):
    """Every element with its attributes; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def video(seed: int, channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 11, 6, 10, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def model(name: str, seed: int, *, channels: int = 3, layers: int = 4) -> ModelEvaluation:
    teacher, student, other = (video(i, channels) for i in (0, seed, 99))
    return ModelEvaluation(
        path=name,
        fidelity=Fidelity(
            teacher_loss=0.1,
            student_loss=0.1 + 0.01 * seed,
            velocity_error=0.02 * seed,
            attention_errors=tuple(0.01 * seed * (i + 1) for i in range(layers)),
        ),
        timesteps=tuple(
            TimestepError(timestep=t, velocity_error=0.1 * seed, teacher_loss=0.2, student_loss=0.2 + 0.1 * seed)
            for t in (1000.0, 750.0, 416.67)
        ),
        clean_past=CleanPast(teacher_loss=0.002, student_loss=0.002 + 0.001 * seed, velocity_error=0.015 * seed),
        cache_bytes={"teacher": 4096, "student": 1024},
        drift=compare_videos(teacher, student, other, given=3),
        speed=Speed(teacher=10.0, ratio=1.25),
        teacher_video=teacher,
        video=student,
        conversion={
            "source": {"name": "a<b", "sha256": "0f" * 32},
            "recipe": {"init": "svd", "kv_rank": 9, "seed": 0, "q_rank": None},
            "layers": [
                {
                    "layer": i,
                    "effective_rank": 5 + i,
                    "energy_at_kv_rank": 0.5,
                    "singular_values": [3.0, 2.0, 1.0, 0.5 + i],
                }
                for i in range(layers)
            ],
        },
        healing={"recipe": {"steps": 150, "loss": "velocity"}, "written": {"step": 125, "validation": 0.1025}},
        vbench=VBenchScores(scores={"motion_smoothness": 0.9 + 0.01 * seed}, videos={"motion_smoothness": 4}),
    )


def report(*models: ModelEvaluation, pixels: bool = True, **changes: Any) -> EvaluationReport:
    return EvaluationReport(
        teacher="wan & co",
        data={"from": "clips", "clips": 3, "latent_frames": 6},
        conditions={
            "seed": 0,
            "streaming": {"chunk_frames": 3},
            "rollout": {"videos": 2, "latent_frames": 11, "given_frames": 3},
            "notes": ["One seed."],
        }
        | changes,
        versions={"mlaconvert": "0.0", "torch": "2"},
        pixels=pixels,
        models=models,
    )
