"""Evaluate converted models side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mlaconvert.config.camera import CameraConfig
from mlaconvert.conversion.provenance import open_teacher, refuse_dense
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.evaluation.compare import ModelEvaluation, compare
from mlaconvert.evaluation.conditions import draw_conditions
from mlaconvert.evaluation.report import EvaluationReport, make_report
from mlaconvert.evaluation.request import Request, SourceRecord, read_record_of
from mlaconvert.evaluation.vbench import VBenchScores
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource, Source, as_source
from mlaconvert.files.find import experts
from mlaconvert.files.names import CONVERSION_NAME, HEALING_NAME, public_name
from mlaconvert.model.load import load_model
from mlaconvert.progress import Progress, silent


def evaluate(
    sources: Sequence[AnySource],
    request: Request | None = None,
    *,
    vbench: Sequence[VBenchScores] = (),
    teacher_vbench: VBenchScores | None = None,
    progress: Progress = silent,
    on_model: Callable[[int, EvaluationReport], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Evaluate converted models side by side: folders, checkpoints or Hub ids that were made from one teacher.

    report = evaluate(["wan-mla", "wan-healed"], Request(data=Path("clips"), frames=0, device="cuda"))
    print(report.models[0].cache_reduction, report.to_json())

    The teacher is the one that conversion.json records, found by its name (from here, beside the model, or on the Hub)
    and checked by its hash, unless `request` names another. Two models are in memory at a time. `vbench` are
    scores of the models, in order. `on_model(index, report)` is told of each model as soon as it is done, `say` of
    rollouts that will take a CPU long.

    Raises InputError for models that cannot be compared, a teacher that cannot be found, and unfit clips.
    """
    if not sources:
        raise InputError("no model to evaluate; name at least one folder, checkpoint or Hub id")
    if vbench and len(vbench) != len(sources):
        raise InputError(f"{len(vbench)} VBench results for {len(sources)} models; give one for each, in their order")
    request = request or Request()
    records = _read_sources([as_source(source) for source in sources], request)
    first = records[0]
    with open_teacher(
        str(first.source),
        first.conversion,
        teacher=request.teacher,
        subfolder=first.source.subfolder,
        progress=progress,
    ) as opened:
        teacher = load_model(
            opened, dtype=request.dtype or first.dtype, device=request.device, streaming=first.config.streaming
        )
        conditions = draw_conditions(opened, teacher, first, request, progress, say)
        name = public_name(opened.store.source)
    if conditions.rollout is not None and say is not None:
        line = conditions.rollout.warning(teacher, len(records))
        if line is not None:
            say(line)
    evaluations: list[ModelEvaluation] = []
    for i, record in enumerate(records):
        student = load_model(record.source, dtype=teacher.dtype, device=request.device, cache_dtype=request.cache_dtype)
        model = dataclasses.replace(
            compare(teacher, student, conditions, path=record.name, progress=progress),
            conversion=record.conversion,
            healing=record.healing,
            vbench=vbench[i] if vbench else None,
        )
        del student  # before the next one is loaded
        evaluations.append(model)
        if on_model is not None:
            on_model(i, make_report(teacher, name, conditions, [model], teacher_vbench=teacher_vbench))
    return make_report(teacher, name, conditions, evaluations, teacher_vbench=teacher_vbench)


def _read_sources(sources: Sequence[Source], request: Request) -> list[SourceRecord]:
    """The models' records. Raises InputError for models that cannot be evaluated, or not side by side."""
    names = [public_name(str(source)) for source in sources]
    if len(set(names)) < len(names):  # folders of one name: their parents tell them apart
        names = ["/".join(Path(source.path).expanduser().resolve().parts[-2:]) for source in sources]
    records = []
    for source, name in zip(sources, names, strict=True):
        if not source.subfolder and (pair := experts(source.path, source.revision)):
            raise InputError(
                f"{source} holds two experts; evaluate one with --subfolder {pair[0]} or --subfolder {pair[1]}"
            )
        with open_checkpoint(source) as opened:
            if isinstance(opened.config, CameraConfig):
                opened.check_runs()
            if opened.config.in_dim != opened.config.out_dim or opened.config.image_dim is not None:
                raise UnsupportedModelError(
                    f"{source} is an image-to-video model; clips hold no image for it, so it cannot be evaluated yet"
                )
            if request.teacher is None:
                refuse_dense(opened, source, "evaluate")
            records.append(
                SourceRecord(
                    source=source,
                    name=name if request.cache_dtype is None else f"{name}, {request.cache_dtype} cache",
                    config=dataclasses.replace(opened.config, cache_dtype=request.cache_dtype),
                    dtype=opened.dtype,
                    conversion=read_record_of(opened.store, CONVERSION_NAME),
                    healing=read_record_of(opened.store, HEALING_NAME),
                )
            )
    first = records[0]
    for record in records[1:]:
        if record.config.streaming != first.config.streaming:
            raise InputError(f"{first.name} and {record.name} see time differently; evaluate them one by one")
        if request.teacher is None and record.origin.sha256 != first.origin.sha256:
            raise InputError(f"{first.name} and {record.name} come from different teachers; evaluate them one by one")
    return records
