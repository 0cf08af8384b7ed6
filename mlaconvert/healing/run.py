"""`heal`: one stage of training from a converted model folder to a healed one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import gather_object

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.families.changed import with_tensors
from mlaconvert.families.source import AnySource, as_source
from mlaconvert.files.inputs import refuse_links
from mlaconvert.files.output import AnyOutput, as_output
from mlaconvert.files.staging import Staging, claim, disk_errors
from mlaconvert.files.whole import remove_partial
from mlaconvert.files.writer import is_model
from mlaconvert.healing.batches import Batches, ClipSource, clips_to_generate, generate_source, open_source
from mlaconvert.healing.estimate import Estimate, estimate
from mlaconvert.healing.loop import Run, make_accelerator, tracker_missing
from mlaconvert.healing.models import assumptions, identity_of, load_models, name_of, open_pair, regime_of
from mlaconvert.healing.output import HealReport, occupancy, specs_of, write_model
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import stage_of
from mlaconvert.healing.state import BEST, LAST, choose_trained, load
from mlaconvert.healing.targets import Targets
from mlaconvert.listener import Listener
from mlaconvert.model.device import resolve_device
from mlaconvert.model.rates import Rates, probe
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import silent


def heal(
    source: AnySource,
    output: AnyOutput,
    recipe: HealRecipe,
    *,
    teacher: AnySource | None = None,
    data: str | Path | None = None,
    state: Path | None = None,
    cpu: bool = False,
    listener: Listener | None = None,
) -> HealReport:
    """Train the model folder `source` for one stage and write the result to `output`, whole or not at all.

    heal("wan-mla", "wan-healed", HealRecipe(stage="distill", steps=1000, lr=1e-4), data="clips")

    `teacher` is by default what the model was converted from, as its conversion.json says. `data` is a folder of clips
    (`mlaconvert.clips.folder`); the built-in model draws its own, and distill can do without. The run keeps its state
    in `state` (by default `output` with ".state" added): called again after an interruption it goes on from there, bit
    for bit on a CPU, or with `Output.restart` begins again. Afterwards the state stays, with a log. Processes that a
    launcher started share the work; each must call this.

    Raises InputError for what does not fit, OutputError for paths that cannot be written, DivergedError when training
    has to stop.
    """
    told, target = listener or Listener(), as_output(output)
    report, tell = told.progress, told.say
    recipe, path, stage = recipe.resolved(), Path(target.path), stage_of(recipe.stage)
    folder = state or path.with_name(f"{path.name}.state")
    accelerator: Accelerator | None = None
    with ExitStack() as stack:
        student_file, teacher_file, draws = open_pair(stack, as_source(source), teacher)
        streaming = regime_of(recipe, student_file.config, teacher_file.config)
        found = open_source(recipe, data, student_file.config, tell, draws=draws)
        _check_clips(recipe, found, teacher_file.config)
        staging = Staging(path, "heal", overwrite=target.overwrite)
        staging.check(sum(spec.nbytes for spec in specs_of(student_file)), kind="model", replaceable=is_model)
        accelerator = make_accelerator(recipe, None if tracker_missing(recipe) else folder / "logs", cpu=cpu)
        stack.callback(_forget)
        main = accelerator.is_main_process
        tell = tell if main else (lambda _: None)
        report = report if main else silent
        for note in assumptions(student_file, teacher_file):
            tell(note)
        if tracker_missing(recipe):
            tell(f"TensorBoard is not installed (pip install tensorboard); the log is {folder / 'log.jsonl'}")
        # Reads all weights, so may refuse them.
        models = load_models(recipe, student_file, teacher_file, accelerator.device)
        if main:
            stack.enter_context(staging.held())
            stack.enter_context(claim(folder, "heal"))  # which another run may have as well, whatever its output
            with disk_errors(folder):
                remove_partial(folder)
            stack.enter_context(_left_only_by_work(folder))
        with accelerator.main_process_first():
            _make_folder(folder, restart=target.restart and main)
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
            whole=stage.whole_clips,
        )
        _check_past(batches, student_file.config)
        clips = batches.validation()
        objective = stage.objective(models, recipe, streaming)
        objective.progress = report
        objective.prepare_validation(clips, found.null)
        identity = {
            "data": found.fingerprint,
            "model": student_file.store.sha256(),
            "teacher": identity_of(teacher_file),
        }
        if recipe.reuse > 1:
            objective.targets = Targets(folder, recipe, identity, accelerator.num_processes, writes=main)
        run = Run(objective, batches, clips, recipe, folder, accelerator, identity)
        if recipe.tracker != "none" and not tracker_missing(recipe):
            accelerator.init_trackers("heal")
        with disk_errors(folder, "what was saved last is kept"):
            run.train(report, tell)
        best = load(folder / BEST, "weights", "step", "validation")
        weights = best["weights"]
        result = HealReport(
            output=path,
            recipe=recipe,
            teacher=name_of(teacher_file),
            curves=run.curves,
            best=(int(best["step"]), float(best["validation"])),
            occupancy={
                "before": occupancy(student_file),
                "after": occupancy(with_tensors(student_file, weights)),
            },
        )
        if main:
            write_model(student_file, result, weights, staging)
        accelerator.wait_for_everyone()
        if objective.targets is not None:
            objective.targets.forget()
        for tracker in accelerator.trackers:
            tracker.finish()
    return result


def plan(
    source: AnySource,
    recipe: HealRecipe,
    *,
    teacher: AnySource | None = None,
    data: str | Path | None = None,
    flops_per_second: float | None = None,
    device: str | None = None,
) -> Estimate:
    """What `heal` would need, without running anything: all checks of its input, and an estimate of one step.

    Its time is told by `flops_per_second`, or by a probe of `device` for a few seconds; without both, not at all.
    """
    recipe, stage = recipe.resolved(), stage_of(recipe.stage)
    with ExitStack() as stack:
        student_file, teacher_file, draws = open_pair(stack, as_source(source), teacher)
        streaming = regime_of(recipe, student_file.config, teacher_file.config)
        found = open_source(
            recipe, None if data is None else Path(data), student_file.config, lambda _: None, draws=draws
        )
        _check_clips(recipe, found, teacher_file.config)
        config = student_file.config
        shape = clips_to_generate(recipe, config).shape(config) if found is None else found.clip_shape
        with torch.device("meta"):
            model = WanModel(config)
        names = set(choose_trained(model, recipe.train))
        trained = [tuple(p.shape) for name, p in model.named_parameters() if name in names]
        batches = Batches(_Shape(shape), recipe, streaming, whole=stage.whole_clips)
        _check_past(batches, config)
        view = max(batches.views, key=lambda v: len(v.frames))
        rates: Rates | float | None = flops_per_second
        if rates is None and device is not None:
            layout = stage.layout(view, streaming)
            tokens = len(layout.positions) * config.tokens_per_frame(shape[2], shape[3])
            masked = not bool(layout.visible.all())
            dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            chosen = resolve_device(device, dtype)
            rates = probe(config, chosen, dtype, queries=tokens, keys=tokens, masked=masked)
        size = (shape[2], shape[3])
        return estimate(recipe, config, teacher_file.config, trained, view, size=size, rates=rates)


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


def _check_past(batches: Batches, student: WanConfig) -> None:
    """Raise ConfigError where a student whose present is exact would read nothing from latents."""
    exact = student.mla is not None and student.mla.present == "exact"
    if exact and all(len(view.chunks) == 1 for view in batches.views):
        raise ConfigError(
            f"clips of {len(batches.views[0].frames)} latent frames are one chunk, and the student's present is exact: "
            "nothing is past that could be healed; give longer clips"
        )


def _check_clips(recipe: HealRecipe, source: ClipSource | None, teacher: WanConfig) -> None:
    """Raise ConfigError where clips (None: the teacher makes them) are not what the recipe learns from."""
    if recipe.data_share and teacher.few_step:
        raise ConfigError(
            f"data_share is {recipe.data_share:g}, but the teacher generates in a few steps: what it predicts is not "
            "the clips' own velocity; give data_share 0"
        )
    if recipe.data_share and source is None:
        raise ConfigError(
            f"data_share is {recipe.data_share:g}, but the teacher would make these clips itself: give a folder of a "
            "data set's with --data DIR, or data_share 0"
        )
    guided = stage_of(recipe.stage).guided and recipe.guidance != 1
    if guided and source is not None and source.null is None:
        raise ConfigError(
            f"guidance {recipe.guidance:g} needs the embedding of an empty prompt: put null_context.safetensors with "
            "`context` [1, T, text_dim] beside the clips, or give --guidance 1"
        )


@contextmanager
def _left_only_by_work(folder: Path) -> Iterator[None]:
    """Remove a new state folder when the input is refused before anything was saved; say what an interruption keeps."""
    is_new = not folder.exists()
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(*(interruption.args or (_kept(folder),))) from None
    except InputError:
        if is_new and not (folder / LAST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _kept(folder: Path) -> str:
    """What an interruption leaves of a run that does not say so itself."""
    if (folder / LAST).is_file():
        return f"what was saved last is kept in {folder}; the same command goes on from there"
    clips = len(list((folder / "clips").glob("*.safetensors")))
    return f"no step is saved yet{f', {clips} files of clips are kept' if clips else ''}; the same command begins again"


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


def _forget() -> None:
    """Let the next run in this process choose its own settings: accelerate keeps the first ones."""
    if PartialState().num_processes == 1:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
