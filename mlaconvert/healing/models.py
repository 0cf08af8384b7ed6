"""The models of a healing run: its student's and its teacher's files, opened and checked, and their weights."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import draws_clips, open_teacher, refuse_dense
from mlaconvert.conversion.records import read_record
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.families.causal import assumption_line
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource, Source
from mlaconvert.files.find import experts
from mlaconvert.files.inputs import refuse_foreign_links
from mlaconvert.files.names import CONVERSION_NAME, HEALING_NAME, README_NAME, public_name
from mlaconvert.healing.batches import mix
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import stage_of
from mlaconvert.healing.stages.stage import Models
from mlaconvert.healing.state import choose_trained
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


def open_pair(stack: ExitStack, source: Source, teacher: AnySource | None) -> tuple[Checkpoint, Checkpoint, bool]:
    """The student's checkpoint, its teacher's, and whether the built-in model's clips are theirs.

    Raises InputError when the teacher is not known or not found.
    """
    pair = experts(source.path, source.revision)
    if pair and source.subfolder is None:
        raise InputError(f"{source} holds two experts; heal one with --subfolder {pair[0]} or --subfolder {pair[1]}")
    student = stack.enter_context(open_checkpoint(source))
    if teacher is None:
        refuse_dense(student, source, "heal")
    path = student.store.path
    folder = path if path.is_dir() else path.parent
    refuse_foreign_links(folder, (README_NAME, CONVERSION_NAME, HEALING_NAME))  # the output's go on from them
    conversion = read_record(folder / CONVERSION_NAME)
    read_record(folder / HEALING_NAME)  # the output's will continue it
    found = stack.enter_context(open_teacher(str(folder), conversion, teacher=teacher, subfolder=source.subfolder))
    _check_pair(student, found)
    return student, found, draws_clips(found, conversion)


def _check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    for name in ("dim", "num_layers", "in_dim", "out_dim", "patch_size", "text_dim"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise InputError(
                f"the student has {name} {ours}, the teacher {teacher.store.path} {theirs}; "
                "give the model it was made from"
            )


def regime_of(recipe: HealRecipe, student: WanConfig, teacher: WanConfig) -> StreamingConfig | None:
    """How the student sees time in this stage. Raises ConfigError for stages that need a streaming model, and where
    a student whose present is exact would have no past.
    """
    if student.patch_size[0] != 1:
        raise ConfigError(f"patches span {student.patch_size[0]} frames; healing needs patches of one frame")
    stage = stage_of(recipe.stage)
    if stage.needs_streaming_student and student.streaming is None:
        raise ConfigError(f"stage {recipe.stage} needs a streaming student; convert with `streaming` in the recipe")
    if stage.needs_streaming_teacher and teacher.streaming is None:
        raise ConfigError(f"stage {recipe.stage} needs a streaming teacher; give the teacher-forced model as --teacher")
    # A bidirectional teacher is no guide to a causal pass: both then see the whole clip.
    streaming = None if stage.sees_as_teacher and teacher.streaming is None else student.streaming
    if streaming is None and student.mla is not None and student.mla.present == "exact":
        raise ConfigError(
            f"stage {recipe.stage} shows the student whole clips, as its bidirectional teacher sees them; its present "
            "is exact, so nothing would be read from latents: give a streaming teacher, or take a stage that needs none"
        )
    return streaming


def assumptions(student: Checkpoint, teacher: Checkpoint) -> list[str]:
    """What is assumed of how student and teacher see time, a line each."""
    lines = {}
    for who, model in (("student", student), ("teacher", teacher)):
        config = model.config
        lines[who] = assumption_line(model.timing, streaming=config.streaming, few_step=config.few_step)
    return [f"{who}: {line}" for who, line in lines.items() if line is not None]


def load_models(recipe: HealRecipe, student: Checkpoint, teacher: Checkpoint, device: torch.device) -> Models:
    """The student in float32, what it learns chosen, and the frozen teacher."""
    half = recipe.precision == "bf16" and device.type != "cpu"
    pupil = trainable(student, device)
    choose_trained(pupil, recipe.train)
    return Models(
        student=pupil,
        teacher=load_model(teacher, dtype=torch.bfloat16 if half else torch.float32, device=device),
        copy_teacher=lambda: trainable(teacher, device),
    )


def trainable(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> WanModel:
    """The model of a checkpoint in float32, its weights copied out of the file, which training must not touch."""
    model = load_model(checkpoint, dtype=torch.float32, device=device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def identity_of(checkpoint: Checkpoint) -> str:
    """Tells a teacher from another, from the outside: hashing it may take minutes."""
    sizes = sorted((file.name, file.stat().st_size) for file in checkpoint.store.files)
    return f"{name_of(checkpoint)} {mix(str(sizes)):x}"


def name_of(checkpoint: Checkpoint) -> str:
    """A Hub id as given; of a local path only its last part."""
    if checkpoint.is_tiny:
        return "tiny"
    return public_name(str(checkpoint.store.source))
