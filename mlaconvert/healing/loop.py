"""The training loop: batches in, steps of the optimizer out; it validates, saves, and knows when to stop."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, ProjectConfiguration
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.errors import ConfigError, InputError, MLAConvertError
from mlaconvert.healing.batches import Batches
from mlaconvert.healing.interrupt import deferred
from mlaconvert.healing.objective import Objective
from mlaconvert.healing.recipe import CHANGEABLE, HealRecipe, learning_rate
from mlaconvert.healing.state import BEST, LAST, Trained, load, make_optimizer, not_a_state, save
from mlaconvert.progress import Progress

MEMORY = 100  # losses that the running median is taken over
SURE = 10  # how many of them it needs before it is relied on


class DivergedError(MLAConvertError):
    """A loss or gradient that is not finite, or a loss that exploded. The last good state is on disk."""


def make_accelerator(recipe: HealRecipe, logs: Path | None, *, cpu: bool) -> Accelerator:
    """accelerate as its launcher (or torchrun, or nothing) set it up. Raises ConfigError for what cannot work."""
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    on_cpu = cpu or not torch.cuda.is_available()
    plugin = None
    if wants_fsdp:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("FSDP 1 is not supported; launch with --fsdp_version 2")
        if on_cpu:
            raise ConfigError("accelerate does not shard on a CPU and says nothing of it; launch without --use_fsdp")
        if recipe.optimizer != "adamw":
            raise ConfigError(
                f"optimizer {recipe.optimizer} needs whole matrices; launch without --use_fsdp, or take adamw"
            )
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    tracks = logs is not None and recipe.tracker != "none"
    if tracks:
        _check_tracker(recipe.tracker)
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        gradient_accumulation_steps=recipe.accumulate,
        log_with=recipe.tracker if tracks else None,
        project_config=ProjectConfiguration(logging_dir=str(logs)) if logs is not None else None,
        fsdp_plugin=plugin,
        # Matching attention leaves the rest of a model that is trained whole without gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.train == "all")],
    )


def _check_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or would leave out without a word."""
    if name == "all":  # of those that are installed
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"tracker is {name!r}: give {', '.join(LOGGER_TYPE_TO_CLASS)} or none")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(f"tracker {name} is not installed; install it (pip install {name}), or give --tracker none")


def tracker_missing(recipe: HealRecipe) -> bool:
    """Whether TensorBoard is wanted but not installed."""
    return recipe.tracker == "tensorboard" and not any(
        importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")
    )


@dataclass
class Curves:
    """What a run has seen: [step, loss, learning rate, gradient norm] and [step, validation]."""

    losses: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    critic: list[list[float]] = field(default_factory=list)


class Run:
    """One stage on one process: the objective (and a critic's), their optimizers, and the folder of the run's state."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        validation: Clips,
        recipe: HealRecipe,
        folder: Path,
        accelerator: Accelerator,
        identity: dict[str, str],
    ) -> None:
        self.recipe, self.folder, self.accelerator, self.identity = recipe, folder, accelerator, identity
        self.batches, self.validation = batches, validation
        self.objective = objective
        critic = objective.critic
        self.critic = None if critic is None else self._trained(critic, recipe.critic_lr or 0, 0.0)
        self.student = self._trained(objective, recipe.lr or 0, recipe.ema or 0)
        self.curves, self.step = Curves(), 0
        self.best: tuple[int, float] = (0, math.inf)
        self._began, self._first = 0.0, 0

    def _trained(self, objective: Objective, lr: float, ema: float) -> Trained:
        prepared, optimizer = self.accelerator.prepare(objective, make_optimizer(objective, self.recipe, lr))
        objective.go_through(prepared)
        return Trained(prepared, optimizer, ema)

    # --- steps ---------------------------------------------------------------------------------------------------

    def train(self, progress: Progress, say: Callable[[str], None]) -> None:
        """From the saved state, or the start, to the last step. Raises DivergedError."""
        self._resume(say)
        self._began, self._first = time.monotonic(), self.step
        if not self.curves.validation:
            self._validate(say)
        with deferred(say) as interruption:
            while self.step < self.recipe.steps:
                progress(self.recipe.stage, self.step, self.recipe.steps, self._last())
                self._step()
                self.step += 1
                last = self.step == self.recipe.steps
                if last or self.step % self.recipe.validate_every == 0:
                    self._validate(say)
                stops = not last and self._any(interruption.signal is not None)
                if last or stops or self.step % self.recipe.save_every == 0:
                    self._save()
                if stops:
                    kept = f"step {self.step} of {self.recipe.steps} is saved in {self.folder}"
                    interruption.stop(f"{kept}; the same command goes on from there")
        progress(self.recipe.stage, self.step, self.recipe.steps, self._last())

    def _any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: all of them stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        found = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(found, "sum") > 0)

    def _step(self) -> None:
        step, recipe = self.step, self.recipe
        if self.critic is not None:
            for k in range(step * recipe.critic_steps, (step + 1) * recipe.critic_steps):
                loss, _ = self._update(self.critic, self._critic_loss(k), recipe.critic_lr or 0)
            self.curves.critic.append([step + 1, loss])
        loss, norm = self._update(self.student, self._student_loss(step), recipe.lr or 0)
        self._check(loss)
        self.student.follow(step)
        rate = learning_rate(recipe, step, recipe.lr or 0)
        self.curves.losses.append([step + 1, loss, rate, norm])
        self._log({"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm})

    def _student_loss(self, step: int) -> Callable[[int], Tensor]:
        def loss(micro: int) -> Tensor:
            return self.objective.train_loss(self.batches.batch(step, micro), step, self.student)

        return loss

    def _critic_loss(self, step: int) -> Callable[[int], Tensor]:
        def loss(micro: int) -> Tensor:
            return self.objective.critic_loss(self.batches.batch(step, micro, "critic"), step)

        return loss

    def _update(self, trained: Trained, loss: Callable[[int], Tensor], lr: float) -> tuple[float, float]:
        """One step of one optimizer over `accumulate` micro-batches: mean loss and gradient norm of all processes."""
        accelerator, total = self.accelerator, torch.zeros((), device=self.accelerator.device)
        for group in trained.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, lr)
        norm = torch.zeros(())
        for micro in range(self.recipe.accumulate):
            with accelerator.accumulate(trained.objective):
                value = loss(micro)
                accelerator.backward(value)
                total += value.detach().float() / self.recipe.accumulate
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(list(trained.parameters.values()), self.recipe.clip)
                    self._check_finite(total, norm)
                trained.optimizer.step()
                trained.optimizer.zero_grad(set_to_none=True)
        return float(accelerator.reduce(total, "mean")), _number(norm)

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        """All processes see the same: gradients are averaged by now, losses are here."""
        mean = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean) or not math.isfinite(_number(norm)):
            self._diverged(f"loss {mean:.3g}, gradient norm {_number(norm):.3g}")

    def _check(self, loss: float) -> None:
        """Raise DivergedError when `loss` is far above what this phase had."""
        phase = self.objective.phase(self.step)
        known = [row[1] for row in self.curves.losses[-MEMORY:] if self.objective.phase(int(row[0]) - 1) == phase]
        if len(known) >= SURE and loss > self.recipe.max_loss_ratio * statistics.median(known):
            self._diverged(f"loss {loss:.3g}, the running median is {statistics.median(known):.3g}")

    def _diverged(self, what: str) -> None:
        saved = self.folder / LAST
        kept = f"the last good state is in {self.folder}" if saved.is_file() else "nothing had been saved yet"
        raise DivergedError(
            f"the run diverged at step {self.step + 1} ({what}); {kept}. Run the command again with a lower --lr"
        )

    # --- validation and state ------------------------------------------------------------------------------------

    def _validate(self, say: Callable[[str], None]) -> None:
        with torch.no_grad(), self.student.averaged():
            value = self.objective.call(self.objective.validate, self.validation)
        if not math.isfinite(value) and not self.step:
            raise InputError(
                f"before any step the validation is {value:.3g}: student or teacher overflows on these clips; check "
                "the models, and that the clips are latents of their VAE"
            )
        if not math.isfinite(value):
            self._diverged(f"validation {value:.3g}")
        self.curves.validation.append([self.step, value])
        self._log({"step": self.step, "validation": value})
        say(f"step {self.step}/{self.recipe.steps}: {self._recent()}validation {value:.5g}{self._left()}")
        if value < self.best[1]:
            self.best = (self.step, value)
            weights = self.student.weights()
            if self.accelerator.is_main_process:
                save(self.folder / BEST, {"step": self.step, "validation": value, "weights": weights})

    def _last(self) -> str:
        return f"loss {self.curves.losses[-1][1]:.3g}" if self.curves.losses else ""

    def _recent(self) -> str:
        recent = [row[1] for row in self.curves.losses[-self.recipe.validate_every :]]
        return f"loss {statistics.mean(recent):.5g}, " if recent else ""

    def _left(self) -> str:
        """The time that the remaining steps will take at the pace of this process's own."""
        done, left = self.step - self._first, self.recipe.steps - self.step
        return f", {left * (time.monotonic() - self._began) / done / 60:.1f} min left" if done and left else ""

    def _save(self) -> None:
        parts = {"student": self.student.state()} | ({} if self.critic is None else {"critic": self.critic.state()})
        if self.accelerator.is_main_process:
            save(
                self.folder / LAST,
                {
                    "recipe": json.dumps(dataclasses.asdict(self.recipe)),
                    "identity": self.identity,
                    "processes": self.accelerator.num_processes,
                    "form": self.objective.form,
                    "step": self.step,
                    "best": list(self.best),
                    "curves": dataclasses.asdict(self.curves),
                    "parts": parts,
                },
            )
        self.accelerator.wait_for_everyone()

    def _resume(self, say: Callable[[str], None]) -> None:
        path = self.folder / LAST
        if path.is_file():
            state = load(path, "recipe", "identity", "processes", "step", "best", "curves", "parts")
            try:
                self._take_up(state)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                raise not_a_state(path) from None
            say(f"going on from step {self.step}, saved in {self.folder}")
            if state.get("form", 1) != self.objective.form:
                self.best = (0, math.inf)
                say("this run began under an earlier form of the loss: from here on losses and validations are others")
        if self.accelerator.is_main_process:  # what was logged after that state will be logged again
            (self.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(self.curves)))
        self.accelerator.wait_for_everyone()

    def _take_up(self, state: dict[str, Any]) -> None:
        """Go back to a saved state. Raises ConfigError for another run's, anything at all for one that was changed."""
        self._check_same(state)
        step, best, curves = state["step"], state["best"], state["curves"]
        known = {field.name for field in dataclasses.fields(Curves)}
        if type(step) is not int or not 0 <= step <= self.recipe.steps or curves.keys() != known:
            raise ValueError("not what _save writes")
        self.step, self.best, self.curves = step, (int(best[0]), float(best[1])), Curves(**curves)
        _rows(self.curves)
        self.student.restore(state["parts"]["student"])
        if self.critic is not None:
            self.critic.restore(state["parts"]["critic"])

    def _check_same(self, state: dict[str, Any]) -> None:
        """Raise ConfigError when the saved state is another run's."""
        # What an earlier version did not know was as it is by default.
        saved = {field.name: field.default for field in dataclasses.fields(HealRecipe)} | json.loads(state["recipe"])
        ours = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        changed = [name for name in ours if name not in CHANGEABLE and saved.get(name) != ours[name]]
        before, now = state["identity"], dict(self.identity)
        if saved.get("bad_shards") == "refuse":  # it met no bad clip, so to leave some out from here on is no other run
            now["data"] = now["data"].partition("-")[0]
        changed += [name for name in now if before.get(name) != now[name]]
        if state["processes"] != self.accelerator.num_processes:
            changed.append("the number of processes")
        if changed:
            first = changed[0]
            values = f" ({saved[first]} instead of {ours[first]})" if first in ours else ""
            raise ConfigError(
                f"{self.folder} holds a run with another {first}{values}; give the same, or begin again with --restart"
            )

    def _log(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))


def _rows(curves: Curves) -> list[dict[str, float]]:
    """The lines of the log, by step."""
    rows: list[dict[str, float]] = [
        {"step": int(s), "loss": loss, "lr": lr, "grad_norm": norm} for s, loss, lr, norm in curves.losses
    ]
    rows += [{"step": int(s), "validation": value} for s, value in curves.validation]
    return sorted(rows, key=lambda row: row["step"])


def _number(norm: Tensor) -> float:
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
