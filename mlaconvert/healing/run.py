"""`heal`: one stage of training from a converted model folder to a healed one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import gather_object

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.provenance import comes_from_tiny, open_teacher
from mlaconvert.conversion.records import read_record
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.families.causal import assumption_line
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.find import experts
from mlaconvert.files.inputs import refuse_foreign_links, refuse_links
from mlaconvert.files.names import CONVERSION_NAME, HEALING_NAME, README_NAME, public_name
from mlaconvert.files.staging import Staging, claim, disk_errors
from mlaconvert.files.writer import is_model
from mlaconvert.healing.batches import Batches, Source, generate_source, mix, open_source
from mlaconvert.healing.estimate import Estimate, estimate
from mlaconvert.healing.loop import Progress, Run, make_accelerator, tracker_missing
from mlaconvert.healing.objective import Objective
from mlaconvert.healing.output import HealReport, occupancy, specs_of, with_weights, write_model
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.consistency import Consistency
from mlaconvert.healing.stages.distill import Distill
from mlaconvert.healing.stages.dmd import Critic, Generator
from mlaconvert.healing.stages.few_step import FewStep, reference_features
from mlaconvert.healing.stages.teacher_forcing import TeacherForcing
from mlaconvert.healing.state import BEST, LAST, choose_trained, load
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

Say = Callable[[str], None]


def heal(
    source: str | Path,
    output: Path,
    recipe: HealRecipe,
    *,
    teacher: str | Path | None = None,
    subfolder: str | None = None,
    data: Path | None = None,
    state: Path | None = None,
    cpu: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> HealReport:
    """Train the model folder `source` for one stage and write the result to `output`, whole or not at all.

    `teacher` is by default what the model was converted from, as its conversion.json says. `data` is a folder of clips
    (`mlaconvert.clips.folder`); the built-in model draws its own, and distill can do without. The run keeps its state
    in `state` (by default `output` with ".state" added): called again after an interruption it goes on from there, bit
    for bit on a CPU; `restart` begins again. Afterwards the state stays, with a log. Processes that a launcher started
    share the work; each must call this.

    Raises InputError for what does not fit, OutputError for paths that cannot be written, DivergedError when training
    has to stop.
    """
    report, tell = progress or (lambda *_: None), say or (lambda _: None)
    recipe, output = recipe.resolved(), Path(output)
    folder = state or output.with_name(f"{output.name}.state")
    accelerator: Accelerator | None = None
    with ExitStack() as stack:
        student_file, teacher_file, draws = _open(stack, source, teacher, subfolder)
        streaming = _regime(recipe, student_file.config, teacher_file.config)
        found = open_source(recipe, data, student_file.config, tell, draws=draws)
        _check_guidance(recipe, found)
        staging = Staging(output, "heal", overwrite=overwrite)
        staging.check(sum(spec.nbytes for spec in specs_of(student_file)), kind="model", replaceable=is_model)
        accelerator = make_accelerator(recipe, None if tracker_missing(recipe) else folder / "logs", cpu=cpu)
        stack.callback(_forget)
        main = accelerator.is_main_process
        tell = tell if main else (lambda _: None)
        report = report if main else (lambda *_: None)
        for note in _notes(student_file, teacher_file):
            tell(note)
        if tracker_missing(recipe):
            tell(f"TensorBoard is not installed (pip install tensorboard); the log is {folder / 'log.jsonl'}")
        models = _Models(recipe, student_file, teacher_file, accelerator)  # reads all weights, so may refuse them
        if main:
            stack.enter_context(staging.held())
            stack.enter_context(claim(folder, "heal"))  # which another run may have as well, whatever its output
            stack.enter_context(_left_only_by_work(folder))
        with accelerator.main_process_first():
            _make_folder(folder, restart=restart and main)
        if found is None:
            with accelerator.main_process_first():
                found = generate_source(recipe, models.teacher, folder / "clips", tell, report, write=main)
        if len(set(gather_object([found.fingerprint]))) > 1:
            raise InputError(f"{data or folder}: processes see different clips there; give all of them the same files")
        batches = Batches(
            found,
            recipe,
            streaming,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
            whole=recipe.stage == "dmd",
        )
        clips = batches.validation()
        objective, critic = _objectives(recipe, models, streaming)
        if isinstance(objective, FewStep):
            objective._reference = reference_features(models.teacher, clips, found.null, recipe.guidance)
        identity = {
            "data": found.fingerprint,
            "model": student_file.store.sha256(),
            "teacher": _identity(teacher_file),
        }
        run = Run(objective, critic, batches, clips, recipe, folder, accelerator, identity)
        if recipe.tracker != "none" and not tracker_missing(recipe):
            accelerator.init_trackers("heal")
        with disk_errors(folder, "what was saved last is kept"):
            run.train(report, tell)
        best = load(folder / BEST, "weights", "step", "validation")
        weights = best["weights"]
        result = HealReport(
            output=output,
            recipe=recipe,
            teacher=_public(teacher_file),
            curves=run.curves,
            best=(int(best["step"]), float(best["validation"])),
            occupancy={
                "before": occupancy(student_file),
                "after": occupancy(with_weights(student_file, weights)),
            },
        )
        if main:
            write_model(student_file, result, weights, staging)
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()
    return result


def plan(
    source: str | Path,
    recipe: HealRecipe,
    *,
    teacher: str | Path | None = None,
    subfolder: str | None = None,
    data: Path | None = None,
    flops_per_second: float | None = None,
) -> Estimate:
    """What `heal` would need, without running anything: all checks of its input, and an estimate of one step."""
    recipe = recipe.resolved()
    with ExitStack() as stack:
        student_file, teacher_file, draws = _open(stack, source, teacher, subfolder)
        streaming = _regime(recipe, student_file.config, teacher_file.config)
        found = open_source(recipe, data, student_file.config, lambda _: None, draws=draws)
        _check_guidance(recipe, found)
        config = student_file.config
        if found is None:
            video = default_video(config)
            frames = recipe.frames or 3 * (config.streaming or StreamingConfig()).chunk_frames
            shape = (config.out_dim, frames, video.height // video.vae_stride, video.width // video.vae_stride)
        else:
            shape = found.clip_shape  # type: ignore[assignment]
        with torch.device("meta"):
            model = WanModel(config)
        names = set(choose_trained(model, recipe.train))
        trained = [tuple(p.shape) for name, p in model.named_parameters() if name in names]
        view = max(
            Batches(_Shape(shape), recipe, streaming, whole=recipe.stage == "dmd").views, key=lambda v: len(v[0])
        )
        return estimate(
            recipe,
            config,
            teacher_file.config,
            trained,
            view,
            height=shape[2],
            width=shape[3],
            flops_per_second=flops_per_second,
        )


@dataclasses.dataclass
class _Shape:
    """Clips of which only the shape is known."""

    clip_shape: tuple[int, ...]
    fingerprint: str = ""
    null: Any = None

    def clips(self, numbers: list[int]) -> Any:
        raise NotImplementedError

    def validation(self, count: int) -> Any:
        raise NotImplementedError


class _Models:
    """The student in float32, what it learns chosen, and the frozen teacher."""

    def __init__(self, recipe: HealRecipe, student: Checkpoint, teacher: Checkpoint, accelerator: Accelerator) -> None:
        device = accelerator.device
        half = recipe.precision == "bf16" and device.type != "cpu"
        self.student = trainable(student, device)
        self.trained = choose_trained(self.student, recipe.train)
        self.teacher = load_model(teacher, dtype=torch.bfloat16 if half else torch.float32, device=device)
        self.open_teacher, self.device = teacher, device


def trainable(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> WanModel:
    """The model of a checkpoint in float32, its weights copied out of the file, which training must not touch."""
    model = load_model(checkpoint, dtype=torch.float32, device=device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _objectives(
    recipe: HealRecipe, models: _Models, streaming: StreamingConfig | None
) -> tuple[Objective, Objective | None]:
    """The stage's objective, and for dmd the critic's."""
    student, teacher = models.student, models.teacher
    if recipe.stage == "distill":
        return Distill(student, teacher, recipe, streaming), None
    if recipe.stage == "teacher-forcing":
        return TeacherForcing(student, recipe, streaming), None
    if recipe.stage == "consistency":
        return Consistency(student, teacher, recipe, streaming), None
    fake = trainable(models.open_teacher, models.device)
    choose_trained(fake, "all")
    critic = Critic(fake, recipe)
    return Generator(student, teacher, critic, recipe), critic


def _open(
    stack: ExitStack, source: str | Path, teacher: str | Path | None, subfolder: str | None
) -> tuple[Checkpoint, Checkpoint, bool]:
    """The student's checkpoint, its teacher's, and whether the built-in model's clips are theirs.

    Raises InputError when the teacher is not known or not found.
    """
    pair = experts(source)
    if pair and subfolder is None:
        raise InputError(f"{source} holds two experts; heal one with --subfolder {pair[0]} or --subfolder {pair[1]}")
    student = stack.enter_context(open_checkpoint(source, subfolder=subfolder))
    path = student.store.path
    folder = path if path.is_dir() else path.parent
    refuse_foreign_links(folder, (README_NAME, CONVERSION_NAME, HEALING_NAME))  # the output's go on from them
    conversion = read_record(folder / CONVERSION_NAME)
    read_record(folder / HEALING_NAME)  # the output's will continue it
    named = None if teacher is None else str(teacher)
    found = stack.enter_context(open_teacher(str(folder), conversion, teacher=named, subfolder=subfolder))
    _check_pair(student, found)
    return student, found, found.is_tiny or comes_from_tiny(conversion)


def _check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    for name in ("dim", "num_layers", "in_dim", "out_dim", "patch_size", "text_dim"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise InputError(
                f"the student has {name} {ours}, the teacher {teacher.store.path} {theirs}; "
                "give the model it was made from"
            )


def _regime(recipe: HealRecipe, student: WanConfig, teacher: WanConfig) -> StreamingConfig | None:
    """How the student sees time in this stage. Raises ConfigError for stages that need a streaming model."""
    if student.patch_size[0] != 1:
        raise ConfigError(f"patches span {student.patch_size[0]} frames; healing needs patches of one frame")
    if recipe.stage in ("consistency", "dmd") and student.streaming is None:
        raise ConfigError(f"stage {recipe.stage} needs a streaming student; convert with `streaming` in the recipe")
    if recipe.stage == "consistency" and teacher.streaming is None:
        raise ConfigError("stage consistency needs a streaming teacher; give the teacher-forced model as --teacher")
    # A bidirectional teacher is no guide to a causal pass: both then see the whole clip.
    return student.streaming if recipe.stage != "distill" or teacher.streaming is not None else None


def _notes(student: Checkpoint, teacher: Checkpoint) -> list[str]:
    """What is assumed of how student and teacher see time, a line each."""
    lines = {}
    for who, model in (("student", student), ("teacher", teacher)):
        config = model.config
        lines[who] = assumption_line(model.timing, streaming=config.streaming, few_step=config.few_step)
    return [f"{who}: {line}" for who, line in lines.items() if line is not None]


def _check_guidance(recipe: HealRecipe, source: Source | None) -> None:
    if recipe.stage in ("consistency", "dmd") and recipe.guidance != 1 and source is not None and source.null is None:
        raise ConfigError(
            f"guidance {recipe.guidance:g} needs the embedding of an empty prompt: put null_context.safetensors with "
            "`context` [1, T, text_dim] beside the clips, or give --guidance 1"
        )


@contextmanager
def _left_only_by_work(folder: Path) -> Iterator[None]:
    """Remove a new state folder when the input is refused before anything was saved."""
    is_new = not folder.exists()
    try:
        yield
    except InputError:
        if is_new and not (folder / LAST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _make_folder(folder: Path, *, restart: bool) -> None:
    try:
        if restart and folder.exists():
            if any(folder.iterdir()) and not (folder / "log.jsonl").is_file():
                raise OutputError(f"{folder} is no healing run's state, so it is not deleted; choose another --state")
            shutil.rmtree(folder)
        refuse_links(folder)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used ({error.strerror or error}); choose another --state") from None


def _identity(checkpoint: Checkpoint) -> str:
    """Tells a teacher from another, from the outside: hashing it may take minutes."""
    sizes = sorted((file.name, file.stat().st_size) for file in checkpoint.store.files)
    return f"{_public(checkpoint)} {mix(str(sizes)):x}"


def _public(checkpoint: Checkpoint) -> str:
    """A Hub id as given; of a local path only its last part."""
    if checkpoint.is_tiny:
        return "tiny"
    return public_name(str(checkpoint.store.source))


def _forget() -> None:
    """Let the next run in this process choose its own settings: accelerate keeps the first ones."""
    if PartialState().num_processes == 1:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
