"""What every stage's loss shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from mlaconvert.clips.folder import Clips
from mlaconvert.evaluation.losses import validation_loss
from mlaconvert.healing.batches import Batch
from mlaconvert.healing.frames import FrameLayout, View, clean_frames, guided, velocity
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.state import Trained
from mlaconvert.healing.targets import Targets
from mlaconvert.model.schedule import warp
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Progress, silent

VALIDATION = "validate"  # the stage of its progress
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Uncast:
    """Tensors for an objective. FSDP casts a module's bare tensor inputs to bfloat16, noise levels and targets too."""

    tensors: tuple[Tensor, ...]


class Objective(nn.Module):
    """A loss around the model that it trains.

    Everything that touches the weights goes through `forward`, because that is where DDP and FSDP hook in: in a run
    say objective.call(objective.loss, ...), never objective.loss(...). Models that it does not train, and what wraps
    it, are kept out of the module tree, in tuples.
    """

    # A unit of FSDP each: blocks, and attention, which distillation calls by itself.
    _no_split_modules: tuple[str, ...] = ("Block", "LatentAttention", "DenseAttention")

    # Goes up when the loss becomes another one: losses of two forms cannot be compared.
    form = 1

    def __init__(self, student: WanModel, recipe: HealRecipe) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = tuple(name for name in self._no_split_modules if name in present)
        self._prepared: tuple[nn.Module] = (self,)
        self.progress: Progress = silent  # is told of the passes of a validation
        self.targets: Targets | None = None  # where a stage keeps what a teacher makes of batches that come again

    def go_through(self, prepared: nn.Module) -> None:
        """From here on `call` goes through `prepared`, which DDP or FSDP made of this objective."""
        self._prepared = (prepared,)

    def call(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What one of this objective's own methods gives, called where DDP and FSDP see it."""
        result: T = self._prepared[0](method, *args, **kwargs)
        return result

    def forward(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    @property
    def critic(self) -> Objective | None:
        """A second model's objective, which takes `critic_steps` steps of its own before each of this one's."""
        return None

    def train_loss(self, batch: Batch, step: int, trained: Trained) -> Tensor:
        """`loss` for a step of training, and whatever has to come before it. `trained` holds this one's weights."""
        return self.call(self.loss, batch, step)

    def critic_loss(self, batch: Batch, step: int) -> Tensor:
        """The critic's loss at its own `step`."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The scalar to minimise at `step`."""
        raise NotImplementedError

    def phase(self, step: int) -> str:
        """Losses of one phase can be compared with each other."""
        return self.recipe.stage

    def prepare_validation(self, clips: Clips, null: Tensor | None) -> None:
        """Make once what `validate` compares with; `null` is the embedding of an empty prompt."""

    def validate(self, clips: Clips) -> float:
        """The smaller the better; averaged weights are in place when this is called, and gradients are off."""
        return validation_loss(self.student, clips, progress=self.progress, stage=VALIDATION)

    def run(self, model: WanModel, latents: Tensor, timestep: Tensor, context: Tensor, layout: FrameLayout) -> Tensor:
        """`layout.velocity`, checkpointed when the recipe says so."""
        checkpointing = self.recipe.gradient_checkpointing
        return velocity(model, latents, timestep, context, layout, checkpointing=checkpointing)

    def run_guided(
        self, model: WanModel, latents: Tensor, timestep: Tensor, batch: Batch, layout: FrameLayout
    ) -> Tensor:
        """The same with the recipe's guidance."""
        return guided(
            lambda text: self.run(model, latents, timestep, text, layout),
            batch.context,
            batch.null,
            self.recipe.guidance,
        )


def per_frame(levels: Tensor, view: View) -> Tensor:
    """[B, chunks] -> [B, F]."""
    return levels.repeat_interleave(torch.tensor(view.chunks, device=levels.device), 1)


def draw_levels(batch: Batch) -> Tensor:
    """Noise levels of the shift-5 schedule, one a chunk, on the clips' device [B, chunks].

    A step's samples cover the schedule evenly (stratified sampling); chunks are independent of each other.
    """
    return warp(batch.rows.strata(len(batch.view.chunks))).to(batch.latents.device)


def draw_noise(batch: Batch) -> Tensor:
    """Standard normal noise shaped like the clips."""
    return batch.rows.normal(*batch.latents.shape[1:]).to(batch.latents)


def with_past(batch: Batch, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """[clean past, noisy frames] and their timesteps, as `forcing_layout` takes them. `sigma` [B, F]."""
    past = clean_frames(batch.view)
    levels = torch.cat((torch.zeros_like(sigma[:, :past]), sigma), 1)
    return torch.cat((batch.latents[:, :, :past], noisy), 2), 1000 * levels
