"""Convert a dense checkpoint to latent attention, layer by layer; every other tensor goes from file to file.

The same input and recipe give the same bytes: nothing that is written tells a time or a path of the machine.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch

from mlaconvert import __version__
from mlaconvert.assembly import Assembly, Clock
from mlaconvert.calibrate import Calibration
from mlaconvert.calibrated import (
    CLIPS_NAME,
    calibration_clips,
    check_clips,
    choose_splits,
    from_clips,
    held_back,
    keep_moments,
    kept_splits,
    splits_json,
)
from mlaconvert.checkpoint import CONFIG_NAME, CONVERSION_NAME, experts
from mlaconvert.config import ConvertRecipe
from mlaconvert.data import Clips
from mlaconvert.errors import CheckpointError, ConfigError, InputError, OutputError
from mlaconvert.factorize import Factors
from mlaconvert.families import Checkpoint, converted_config, open_checkpoint
from mlaconvert.families.causal import SETTINGS, assumption_line
from mlaconvert.inputs import file_states, reason_of
from mlaconvert.journal import COPIED, SPLITS, Journal, difference, identity
from mlaconvert.layers import LayerReport, digits, from_weights
from mlaconvert.lora import LoraFile, lora_files, merge_loras, merged, remarks
from mlaconvert.plan import ConversionPlan, Progress, mla_of, plan_conversion, silent
from mlaconvert.ranks import PATIENCE, RankError, Ranks, meet
from mlaconvert.recipes import with_settings
from mlaconvert.staging import Staging, disk_errors, write_whole
from mlaconvert.verify import Verification, verify_conversion
from mlaconvert.writer import ModelFiles, is_model

README_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One converted model. A dry run leaves `sha256`, that of the source's files, and `layers` empty.

    `losses` are those of a calibration: mean squared velocity errors on clips that it did not see, of the "dense" model
    and with all layers after each step of the conversion. `seconds` tell where the time went; what runs side by side
    adds up to more than the time that passed.
    """

    plan: ConversionPlan
    sha256: str = ""
    layers: tuple[LayerReport, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan, and what came of it; without the singular values, which are in conversion.json."""
        data = self.plan.to_json()
        if self.sha256:
            data["sha256"] = self.sha256
            data["layers"] = [
                {k: v for k, v in layer.to_json().items() if k != "singular_values"} for layer in self.layers
            ]
            data["losses"] = {name: digits(loss) for name, loss in self.losses.items()}
            data["seconds"] = {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}
        if self.verification is not None:
            data["verification"] = dataclasses.asdict(self.verification)
        return data


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` wrote: one model, or the two experts of Wan2.2 A14B, each in its own subfolder of `output`."""

    output: Path | None  # None for a dry run without one
    models: tuple[ModelReport, ...]


@contextmanager
def open_models(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    loras: Sequence[LoraFile] = (),
) -> Iterator[dict[str, Checkpoint]]:
    """The checkpoints of a source: both experts by their subfolder, or the only model under "".

    Arguments and errors are those of `families.open_checkpoint`; a `subfolder` chooses one expert. `loras` are merged
    as weights are read (`lora.merge_loras`). Raises ConfigError for LoRAs and two experts: each has its own.
    """
    folders = (subfolder,) if subfolder else experts(source, revision) or (None,)
    if loras and len(folders) > 1:
        raise ConfigError(f"{source} holds two experts, and a LoRA is made for one; convert each with --subfolder")
    with ExitStack() as stack:
        yield {
            (folder or "") if len(folders) > 1 else "": stack.enter_context(
                merge_loras(
                    stack.enter_context(
                        open_checkpoint(source, revision=revision, subfolder=folder, state_key=state_key, config=config)
                    ),
                    loras,
                )
            )
            for folder in folders
        }


def resolve_device(name: str, dtype: torch.dtype = torch.float64) -> torch.device:
    """The torch device of that name. Raises ConfigError when it is not there, or does not know `dtype`."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=dtype, device=device).item()
    except Exception as error:  # torch raises whatever its backends raise
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError(f"device {name!r} cannot be used for {kind} ({reason_of(error)}); use cpu or cuda") from None
    return device


def convert(
    source: str | Path,
    output: str | Path | None,
    recipe: ConvertRecipe | None = None,
    *,
    streaming: Mapping[str, Any] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    loras: Sequence[LoraFile] = (),
    device: str | torch.device = "cpu",
    data: Path | None = None,
    moments: Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[ConversionPlan], None] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert `source` into the new model folder `output`, which appears whole or not at all.

    `source`, `revision`, `subfolder`, `state_key`, `config` and `loras` are those of `open_models`; two experts become
    two subfolders. `on_plan` sees each model's plan once all checks have passed and before work starts; a `dry_run`
    ends there and writes nothing (`output` may then be None). The maths runs on `device`. `data` is a folder of clips
    (`mlaconvert.data`) for init "calibrated"; what it measures of their inputs is kept in `moments`, by default beside
    the output (`OUTPUT.moments`), and taken from there when it was made of the same model, in the same regime, from as
    many clips of the same source. `verify` reads the output back and compares it.

    What is finished is kept in the hidden folder `.NAME.partial` beside the output until all is: an interrupted call,
    made again, goes on after the last finished layer, with the same bytes in the end; `restart` begins again instead.
    Processes that a launcher started (torchrun, accelerate launch) share the layers if init is not "calibrated", where
    a layer sees what the ones before it do; they need the output's disk in common, and only rank 0 reports models.
    Bytes are those of one process with as many threads. Copying and hashing run in threads, which call `progress` too.
    `streaming` are single settings of `StreamingConfig`, in place of the recipe's or the source's. `say` is told when
    a run goes on, of what was kept and cannot be used, and what is assumed of how the model sees time because neither
    the source nor the recipe states it, nor a LoRA its alpha.

    Raises InputError for bad input, a recipe that does not fit, an output that exists (without `overwrite`) or a disk
    without room, and MLAConvertError when verification or another rank fails; a model that fails verification stays
    for inspection. A KeyboardInterrupt says what was kept.
    """
    folder, recipe = None if output is None else Path(output), recipe or ConvertRecipe()
    for flag, path, use in (("--data", data, "read"), ("--moments", moments, "used")):
        if path is not None and recipe.init != "calibrated":
            raise ConfigError(
                f"{flag} {path} is only {use} by init calibrated; leave it out, or give --init calibrated"
            )
    if folder is None and not dry_run:
        raise ConfigError("no folder to write to; give one with -o DIR (output), or --dry-run to see the plan")
    ranks = Ranks() if dry_run else meet()
    chosen_device = resolve_device(ranks.device(str(device)))
    with (
        ranks.alive(),
        open_models(
            source, revision=revision, subfolder=subfolder, state_key=state_key, config=config, loras=loras
        ) as checkpoints,
    ):
        plans = {
            name: plan_conversion(
                checkpoint,
                with_settings(recipe, checkpoint.config, streaming or {}),
                subfolder=name or subfolder or "",
            )
            for name, checkpoint in checkpoints.items()
        }
        for checkpoint in checkpoints.values() if recipe.init == "calibrated" else ():
            check_clips(checkpoint, data)
        staging = None if folder is None else Staging(folder, "convert", overwrite=overwrite)
        if staging is not None and ranks.speaks:
            _check_output(staging, checkpoints, plans)
        for plan in plans.values():
            if on_plan is not None:
                on_plan(plan)
        if say is not None:
            notes = [_notes(checkpoints[name], plan, recipe, streaming or {}) for name, plan in plans.items()]
            for note in dict.fromkeys(chain.from_iterable(notes)):
                say(note)
        if dry_run or folder is None or staging is None:
            return ConversionReport(output=folder, models=tuple(ModelReport(plan=plan) for plan in plans.values()))
        job = _Job(
            checkpoints=checkpoints,
            plans=plans,
            staging=staging,
            journal=Journal(staging, identity(checkpoints, plans, chosen_device, data)),
            ranks=ranks,
            device=chosen_device,
            data=data,
            moments=moments or folder.with_name(f"{folder.name}.moments"),
            progress=progress or silent,
        )
        models = job.run(restart=restart, say=say) if ranks.speaks else job.help()
        if verify and ranks.speaks:
            models = {
                name: dataclasses.replace(
                    model,
                    verification=verify_conversion(
                        checkpoints[name], folder / name, model.plan, device=chosen_device, progress=job.progress
                    ),
                )
                for name, model in models.items()
            }
    return ConversionReport(output=folder, models=tuple(models.values()))


def _notes(
    checkpoint: Checkpoint, plan: ConversionPlan, recipe: ConvertRecipe, settings: Mapping[str, Any]
) -> list[str]:
    """What LoRAs leave to be assumed, and how the model is taken to see time, a line each."""
    given = set(settings) | ({"few_step"} if recipe.few_step is not None else set())
    if recipe.streaming is not None or recipe.bidirectional:
        given |= {"streaming", *SETTINGS}
    streaming = plan.config.streaming
    assumed = assumption_line(
        checkpoint.timing, streaming=streaming, few_step=plan.config.few_step, given=given, how="convert"
    )
    notes = [*remarks(checkpoint), *(checkpoint.timing.remarks if streaming is not None else ())]
    notes += [] if assumed is None else [assumed]
    moves_away = streaming is not None and streaming.sink_frames and streaming.positions == "absolute"
    if recipe.init == "calibrated" and moves_away:
        notes.append("calibrated on windows whose positions count from the sink; the model counts from the start")
    return notes


def _check_output(staging: Staging, checkpoints: Mapping[str, Checkpoint], plans: Mapping[str, ConversionPlan]) -> None:
    """Raise OutputError when the output cannot be written, or would replace what is read."""
    for checkpoint in checkpoints.values():
        for file in (*checkpoint.store.files, *lora_files(checkpoint)):
            if staging.target in (file.resolve(), *file.resolve().parents):
                raise OutputError(f"{staging.path} holds the source; choose another path")
    needed, pair = sum(plan.output_bytes for plan in plans.values()), "" not in plans
    staging.check(needed, kind="model", replaceable=partial(is_model, pair=pair))


# --- the work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One conversion, by one process or several: `run` is rank 0's part, `help` that of all others."""

    checkpoints: Mapping[str, Checkpoint]
    plans: Mapping[str, ConversionPlan]
    staging: Staging
    journal: Journal
    ranks: Ranks
    device: torch.device
    data: Path | None
    moments: Path
    progress: Progress

    def run(self, *, restart: bool, say: Callable[[str], None] | None) -> dict[str, ModelReport]:
        """Convert all models and put them in place; what is finished is kept when it is worth going on from."""
        staging, journal = self.staging, self.journal
        with disk_errors(staging.path):
            staging.open()
        try:
            if not restart:
                journal.check()
        except BaseException:
            staging.close()
            raise
        try:
            if restart or journal.begun() != journal.identity:
                staging.clear()
                journal.begin()
            elif journal.finished() and say is not None:
                say(f"going on after {journal.finished()} finished layers, kept in {staging.folder}")
            self.ranks.tell("begun", journal.identity)
            models = {name: self._convert(name, say) for name in self.plans}
            self._check_source()
            staging.publish()
        except BaseException as error:
            self._stop(error)
        return models

    def _stop(self, error: BaseException) -> NoReturn:
        """Leave the folder as the next run wants it, and raise an error that says so."""
        finished, path = self.journal.finished(), self.staging.path
        bad_input = isinstance(error, InputError) and not isinstance(error, OutputError) and not self._changed()
        chosen = any(self.journal.recall(name, SPLITS) for name in self.plans)  # by the first half of a calibration
        worth = (finished or chosen) and not bad_input
        if worth:
            self.staging.close()
            kept = f"finished layers ({finished}) are kept: the same command goes on from them"
        else:
            self.staging.remove()
            kept = "nothing was left there"
        if isinstance(error, KeyboardInterrupt) and worth:
            raise KeyboardInterrupt(kept) from None
        if isinstance(error, OSError):
            with disk_errors(path, kept):
                raise error
        raise error

    def _changed(self) -> str | None:
        """The first model whose source files are not as they were when the conversion began."""
        for name, checkpoint in self.checkpoints.items():
            try:
                states = file_states(checkpoint.store.files)
            except OSError:
                return name
            if self.journal.identity[f"source of {name}" if name else "source"] != states:
                return name
        return None

    def _check_source(self) -> None:
        changed = self._changed()
        if changed is not None:
            raise CheckpointError(
                f"{self.checkpoints[changed].store.path} was changed while it was converted; begin again with --restart"
            )

    def _convert(self, name: str, say: Callable[[str], None] | None) -> ModelReport:
        """Convert one model into the staging folder."""
        checkpoint, plan, journal, clock = self.checkpoints[name], self.plans[name], self.journal, Clock()
        losses: dict[str, float] = {}
        calibrated = plan.recipe.init == "calibrated"
        if calibrated:
            with clock("calibrate"):
                clips, calibration = self._calibration(name, say)
            plan = plan_conversion(checkpoint, plan.recipe, subfolder=plan.subfolder, measured=calibration.layers)
        files = self._files(name, plan)
        if not files.there():
            journal.forget(name)
            files.folder.mkdir(parents=True, exist_ok=True)
            files.create()
        reports = journal.layers(name, list(plan.layers))
        if calibrated:
            state, done = journal.folder / f"{name or 'model'}-sweep", tuple(reports)
            made = from_clips(
                checkpoint, plan, clips, calibration, losses, self.device, state=state, finished=done, say=say
            )
        else:
            left = [layer for layer in plan.layers if layer not in reports]
            self.ranks.tell(f"left/{name}", left)
            made = from_weights(checkpoint, plan, self.ranks.share(left), self.device)
        self.progress("convert", len(reports), len(plan.layers))
        # An error here ends the layers' threads before the source that they read is closed.
        with closing(made), Assembly(checkpoint, plan, files, clock, self.progress) as assembly:
            copied = journal.recall(name, COPIED)
            assembly.read(None if copied else lambda: journal.keep(name, COPIED, True))
            self._put_layers(name, made, assembly, clock, reports)
            sha256 = assembly.finish()
        self._check_hash(name, sha256)
        if not calibrated:
            reports = self._gather(name)
        report = ModelReport(
            plan=plan,
            sha256=sha256,
            layers=tuple(reports[layer] for layer in sorted(reports)),
            losses=losses,
            seconds=clock.seconds,
        )
        texts = {
            CONFIG_NAME: json.dumps(_output_config(checkpoint, plan), indent=2) + "\n",
            CONVERSION_NAME: _conversion_json(checkpoint, report),
            README_NAME: _readme(plan),
        }
        for filename, text in texts.items():
            write_whole(files.folder / filename, text.encode())
        return report

    def _gather(self, name: str) -> dict[int, LayerReport]:
        """The reports of all ranks' layers. Raises RankError when a rank fails, or works on another disk."""
        for rank in range(1, self.ranks.size):
            self.ranks.hear(f"done/{name}", rank)
        layers, end = list(self.plans[name].layers), time.monotonic() + PATIENCE
        while len(reports := self.journal.layers(name, layers)) < len(layers):  # a network disk may lag behind
            if time.monotonic() > end:
                missing = next(layer for layer in layers if layer not in reports)
                raise RankError(f"{self.journal.folder}: layer {missing}, made by another rank, does not appear there")
            time.sleep(0.1)
        return reports

    def _put_layers(
        self,
        name: str,
        made: Iterator[tuple[int, Factors, LayerReport]],
        assembly: Assembly,
        clock: Clock,
        reports: dict[int, LayerReport],
    ) -> None:
        """Have the layers written that are not among the finished `reports`, which grow."""
        while True:
            with clock("factorise"):
                item = next(made, None)
            if item is None:
                return
            layer, factors, report = item
            if layer not in reports:
                assembly.put(layer, factors, partial(self.journal.keep_layer, name, report))
                reports[layer] = report
            del item, factors  # before the next layer takes as much
            if self.ranks.speaks:
                self.progress("convert", len(reports), len(self.plans[name].layers))
            else:
                self.ranks.check(0)

    def _calibration(
        self, name: str, say: Callable[[str], None] | None
    ) -> tuple[tuple[Clips, Clips | None], Calibration]:
        """Clips to fit to and to judge by, and each layer's split of its scalars, chosen now or by an earlier run."""
        checkpoint, plan, folder = self.checkpoints[name], self.plans[name], self.moments / name
        if self.data is None:
            keep_moments(folder, checkpoint, plan, None, say)
        found = calibration_clips(
            checkpoint, plan, self.data, device=self.device, progress=self.progress, kept=folder / CLIPS_NAME
        )
        count, asked = len(found.latents), plan.recipe.clips or 1
        if count < asked and say is not None:
            say(f"{self.data} has {count} clips, fewer than the {asked} of the recipe (--clips); all of them are used")
        clips = held_back(found)
        if self.data is not None:  # only now is it known to fit
            keep_moments(folder, checkpoint, plan, self.data, say)
        calibration = kept_splits(self.journal.recall(name, SPLITS), folder)
        if calibration is None:
            calibration = choose_splits(checkpoint, plan, clips[0], folder, self.device, self.progress)
            self.journal.keep(name, SPLITS, splits_json(calibration))
        return clips, calibration

    def _check_hash(self, name: str, sha256: str) -> None:
        """Raise CheckpointError when the source is not the one that an earlier run hashed."""
        before = self.journal.recall(name, "sha256")
        if before not in (None, sha256):
            raise CheckpointError(
                f"{self.checkpoints[name].store.path} has other contents than when the conversion began; run the "
                "command again"
            )
        self.journal.keep(name, "sha256", sha256)

    def help(self) -> dict[str, ModelReport]:
        """Convert this rank's share of the layers, and leave the rest to rank 0."""
        for name, plan in self.plans.items():
            if plan.recipe.init == "calibrated":
                continue
            self._check_begun(self.ranks.hear("begun", 0))
            share = self.ranks.share(self.ranks.hear(f"left/{name}", 0))
            checkpoint, clock = self.checkpoints[name], Clock()
            with (
                disk_errors(self.staging.path, "the finished layers are kept"),
                closing(from_weights(checkpoint, plan, share, self.device)) as made,
                Assembly(checkpoint, plan, self._files(name, plan), clock, self.progress) as assembly,
            ):
                self._put_layers(name, made, assembly, clock, {})
                assembly.finish()
            self.ranks.tell(f"done/{name}", share)
        return {}

    def _check_begun(self, theirs: Mapping[str, Any]) -> None:
        """Raise ConfigError unless this rank has the same task as rank 0, and the same disk."""
        changed = difference(self.journal.identity, theirs, times=False)
        if changed is not None:
            raise ConfigError(
                f"rank {self.ranks.rank} has another {changed} than rank 0; start all with the same command"
            )
        if self.journal.begun() != theirs:
            raise ConfigError(
                f"rank {self.ranks.rank} does not see {self.staging.folder}: all ranks need the output's disk in common"
            )

    def _files(self, name: str, plan: ConversionPlan) -> ModelFiles:
        specs = [operation.spec for operation in plan.operations]
        return ModelFiles(self.staging.content / name, specs, metadata={"format": "pt"}, where=self.staging.path)


def _output_config(checkpoint: Checkpoint, plan: ConversionPlan) -> dict[str, Any]:
    """The source's config.json, or the same in the other layout, with how the model sees time, and its attention."""
    streaming, source = plan.config.streaming, checkpoint.output_config(plan.recipe.layout)
    few_step = {"few_step": plan.config.few_step} if plan.config.few_step or "few_step" in source else {}
    return converted_config(
        source
        | few_step
        | {
            "streaming": dataclasses.asdict(streaming) if streaming is not None else None,
            "mla": mla_of(plan.config).to_json(),
        }
    )


def _conversion_json(checkpoint: Checkpoint, report: ModelReport) -> str:
    """Where the model came from and what its conversion did; one line a layer."""
    plan = report.plan
    data = {
        "mlaconvert": __version__,
        "source": {
            "name": plan.source,
            **({} if checkpoint.store.revision is None else {"revision": checkpoint.store.revision}),
            "subfolder": plan.subfolder,
            "state_key": checkpoint.state_key,
            "description": plan.description,
            "files": [file.name for file in checkpoint.store.files],
            "sha256": report.sha256,
            **({"loras": merged(checkpoint)} if merged(checkpoint) else {}),
        },
        "recipe": dataclasses.asdict(plan.recipe),
        "cache_scalars_per_token": {"dense": plan.dense_scalars, "mla": plan.mla_scalars},
        "losses": {name: digits(loss) for name, loss in report.losses.items()},
    }
    head = json.dumps(data, indent=2, ensure_ascii=False).removesuffix("\n}")
    layers = ",\n".join("    " + json.dumps(layer.to_json()) for layer in report.layers)
    return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'


def _readme(plan: ConversionPlan) -> str:
    """A stub that says what the folder is."""
    source = f"{plan.source}, {plan.subfolder}" if plan.subfolder else plan.source
    less = 100 * (1 - plan.mla_scalars / plan.dense_scalars)
    return (
        f"# {plan.source}, with latent attention\n\n"
        f"Converted from {source} ({plan.description}) by mlaconvert {__version__}.\n\n"
        f"Self-attention in layers {plan.recipe.layers} is Multi-Head Latent Attention (init {plan.recipe.init}). A "
        f"token caches {plan.mla_scalars:,} scalars instead of {plan.dense_scalars:,} ({less:.1f}% less). All other "
        f"tensors are the source's. `{CONVERSION_NAME}` records the recipe, the source's hash and each layer's "
        "spectrum and errors. The model has not been trained since.\n"
    )
