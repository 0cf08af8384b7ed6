"""The work of a conversion: rank 0's part and that of the others."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from mlaconvert.clips.folder import Clips
from mlaconvert.conversion.assembly import Assembly, Clock
from mlaconvert.conversion.calibration.kept import read_exactly, write_tensors
from mlaconvert.conversion.calibration.run import Calibration, KeptWalk
from mlaconvert.conversion.calibration.store import moments_file
from mlaconvert.conversion.calibration.windows import Losses
from mlaconvert.conversion.collected.record import Collected
from mlaconvert.conversion.from_clips import (
    calibration_clips,
    choose_splits,
    from_clips,
    held_back,
    keep_moments,
    kept_splits,
    refit_converted,
    splits_json,
    with_more,
)
from mlaconvert.conversion.from_weights import LayerReport, from_weights
from mlaconvert.conversion.journal import COPIED, REFIT, SPLITS, Journal, difference
from mlaconvert.conversion.plan import ConversionPlan, mla_of, plan_conversion
from mlaconvert.conversion.ranks import PATIENCE, RankError, Ranks
from mlaconvert.conversion.readme import readme
from mlaconvert.conversion.report import ModelReport, conversion_json
from mlaconvert.errors import CheckpointError, ConfigError, InputError, OutputError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.classes import converted_config
from mlaconvert.files.inputs import file_states
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, README_NAME
from mlaconvert.files.staging import Staging, disk_errors
from mlaconvert.files.whole import write_whole
from mlaconvert.files.writer import ModelFiles
from mlaconvert.latent.factorize import Factors
from mlaconvert.listener import Listener


@dataclass(frozen=True, kw_only=True)
class ConversionJob:
    """One conversion, by one process or several: `run` is rank 0's part, `help` that of all others."""

    checkpoints: Mapping[str, Checkpoint]
    plans: Mapping[str, ConversionPlan]
    staging: Staging
    journal: Journal
    ranks: Ranks
    device: torch.device
    data: Path | None
    moments: Path
    listener: Listener

    def run(self, *, restart: bool) -> dict[str, ModelReport]:
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
            elif journal.finished():
                self.listener.say(f"going on after {journal.finished()} finished layers, kept in {staging.folder}")
            elif self._chosen():
                self.listener.say(f"going on from what was measured of the clips, kept in {staging.folder}")
            self.ranks.tell("begun", journal.identity)
            models = {name: self._convert(name) for name in self.plans}
            self._check_source()
            staging.publish()
        except BaseException as error:
            self._stop(error)
        return models

    def _stop(self, error: BaseException) -> NoReturn:
        """Leave the folder as the next run wants it, and raise an error that says so."""
        finished, path = self.journal.finished(), self.staging.path
        bad_input = isinstance(error, InputError) and not isinstance(error, OutputError) and not self._changed()
        worth = (finished or self._chosen()) and not bad_input
        if worth:
            self.staging.close()
            what = f"finished layers ({finished}) are kept" if finished else "what was measured of the clips is kept"
            kept = f"{what}: the same command goes on from {'them' if finished else 'there'}"
        else:
            self.staging.remove()
            kept = "nothing was left there"
        measured = any(self._measured(name) for name in self.plans)
        if measured and not worth:
            kept = f"what was measured so far is kept in {self.moments}: the same command goes on from there"
        if isinstance(error, KeyboardInterrupt) and (worth or measured):
            raise KeyboardInterrupt(kept) from None
        if isinstance(error, OSError):
            with disk_errors(path, kept):
                raise error
        raise error

    def _chosen(self) -> bool:
        """Whether the first half of a calibration is done, for any model."""
        return any(self.journal.recall(name, SPLITS) for name in self.plans)

    def _measured(self, name: str) -> int:
        """Of how many layers of a model the inputs' statistics are kept."""
        plan, folder = self.plans[name], self.moments / name
        chosen = plan.layers if plan.recipe.init == "calibrated" else ()
        return sum(moments_file(folder, layer).is_file() for layer in chosen)

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

    def _convert(self, name: str) -> ModelReport:
        """Convert one model into the staging folder."""
        checkpoint, plan, journal, clock = self.checkpoints[name], self.plans[name], self.journal, Clock()
        losses = Losses()
        calibrated = plan.recipe.init == "calibrated"
        if calibrated:
            with clock("calibrate"):
                clips, calibration = self._calibration(name)
            plan = plan_conversion(
                checkpoint,
                plan.recipe,
                subfolder=plan.subfolder,
                measured=calibration.layers,
                method=plan.method,
                collected=plan.collected,
            )
        files = self._files(name, plan)
        if not files.there():
            journal.forget(name)
            files.folder.mkdir(parents=True, exist_ok=True)
            files.create()
        reports = journal.layers(name, list(plan.layers))
        if calibrated:
            kept = KeptWalk(
                folder=journal.folder / f"{name or 'model'}-sweep", finished=tuple(reports), say=self.listener.say
            )
            made = from_clips(checkpoint, plan, clips, calibration, losses, self.device, kept=kept)
        else:
            left = [layer for layer in plan.layers if layer not in reports]
            self.ranks.tell(f"left/{name}", left)
            made = from_weights(checkpoint, plan, self.ranks.share(left), self.device)
        self.listener.progress("convert", len(reports), len(plan.layers))
        # An error here ends the layers' threads before the source that they read is closed.
        with closing(made), Assembly(checkpoint, plan, files, clock, self.listener.progress) as assembly:
            copied = journal.recall(name, COPIED)
            assembly.read(None if copied else lambda: journal.keep(name, COPIED, True))
            self._put_layers(name, made, assembly, clock, reports)
            sha256 = assembly.finish()
        self._check_hash(name, sha256)
        config = json.dumps(_output_config(checkpoint, plan), indent=2) + "\n"
        write_whole(files.folder / CONFIG_NAME, config.encode())
        if calibrated and plan.recipe.refit_steps and plan.method.refit and not isinstance(clips[0], Collected):
            fitted, judged = clips[0], clips[1]
            if judged is not None:  # without clips to judge it by there is no refit
                with clock("calibrate"):
                    fitted = with_more(
                        fitted,
                        checkpoint,
                        plan,
                        self.data,
                        device=self.device,
                        progress=self.listener.progress,
                        kept=self.moments / name,
                    )
            with clock("refit the model"):
                self._refit_model(name, plan, files, (fitted, judged), losses)
        if not calibrated:
            reports = self._gather(name)
        report = ModelReport(
            plan=plan,
            sha256=sha256,
            layers=tuple(reports[layer] for layer in sorted(reports)),
            losses=losses.clean_past,
            noisy_losses=losses.noisy_past,
            seconds=clock.seconds,
        )
        texts = {
            CONVERSION_NAME: conversion_json(checkpoint, report),
            README_NAME: readme(plan),
        }
        for filename, text in texts.items():
            write_whole(files.folder / filename, text.encode())
        return report

    def _refit_model(
        self, name: str, plan: ConversionPlan, files: ModelFiles, clips: tuple[Clips, Clips | None], losses: Losses
    ) -> None:
        """Refit all layers at once, when they are on the disk.

        What comes of it is kept before anything is changed there: an interrupted run has all of it, or begins it again.
        """
        kept = self.journal.refit_file(name)
        if self.journal.recall(name, REFIT) is None:
            found = Losses()
            tensors = refit_converted(
                self.checkpoints[name], files.folder, plan, clips, found, self.device, self.listener.progress
            )
            if tensors:
                write_tensors(kept, tensors, "the refit of the model")
            self.journal.keep(name, REFIT, dataclasses.asdict(found))
        for kind, steps in self.journal.recall(name, REFIT).items():
            getattr(losses, kind).update(steps)
        if not kept.exists():  # it was no better
            return
        shapes = {operation.canonical: operation.spec.shape for operation in plan.operations}
        refitted = read_exactly(kept, lambda names: {n: shapes.get(n, ()) for n in names}, torch.float32)
        for operation in plan.operations:
            if operation.canonical in refitted:
                files.write(operation.spec.name, refitted[operation.canonical].to(operation.spec.dtype))
        files.sync(operation.spec.name for operation in plan.operations if operation.canonical in refitted)

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
                self.listener.progress("convert", len(reports), len(self.plans[name].layers))
            else:
                self.ranks.check(0)

    def _calibration(self, name: str) -> tuple[tuple[Clips | Collected, Clips | None], Calibration]:
        """Clips to fit to and to judge by, and each layer's split of its scalars, chosen now or by an earlier run."""
        checkpoint, plan, folder = self.checkpoints[name], self.plans[name], self.moments / name
        clips: tuple[Clips | Collected, Clips | None]
        if plan.collected is None:
            clips = self._clips(name)
        else:
            clips = plan.collected, None
            keep_moments(folder, checkpoint, plan, plan.collected, self.listener.say)
        calibration = kept_splits(self.journal.recall(name, SPLITS), folder)
        if calibration is None:
            if measured := self._measured(name):
                self.listener.say(f"what was measured of {measured} layers is taken from {folder}")
            calibration = choose_splits(checkpoint, plan, clips[0], folder, self.device, self.listener.progress)
            self.journal.keep(name, SPLITS, splits_json(calibration))
        return clips, calibration

    def _clips(self, name: str) -> tuple[Clips, Clips | None]:
        """Clips to fit to and to judge by, with the folder of moments made ready for them."""
        checkpoint, plan, folder = self.checkpoints[name], self.plans[name], self.moments / name
        say = self.listener.say
        if self.data is None:
            keep_moments(folder, checkpoint, plan, None, say)
        found = calibration_clips(
            checkpoint, plan, self.data, device=self.device, progress=self.listener.progress, kept=folder
        )
        count, asked = len(found.latents), plan.recipe.clips or 1
        if count < asked:
            say(f"{self.data} has {count} clips, fewer than the {asked} of the recipe (--clips); all of them are used")
        clips = held_back(found)
        if self.data is not None:  # only now is it known to fit
            keep_moments(folder, checkpoint, plan, self.data, say)
        return clips

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
                Assembly(checkpoint, plan, self._files(name, plan), clock, self.listener.progress) as assembly,
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
