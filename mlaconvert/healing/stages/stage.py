"""What a stage of healing says of itself, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import FrameLayout, View, noisy_layout
from mlaconvert.healing.objective import Objective
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.model.flops import Work
from mlaconvert.model.wan import WanModel


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a run, on its device."""

    student: WanModel
    """In float32; what it learns is chosen."""
    teacher: WanModel
    """Frozen, in the precision of the passes."""
    copy_teacher: Callable[[], WanModel]
    """Reads the teacher's weights once more, in float32, for a model that is trained and begins as the teacher."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its defaults, what it needs, its losses and their cost. Each is `STAGE` of a file of its own."""

    objective: Callable[[Models, HealRecipe, StreamingConfig | None], Objective]
    """What is trained: given the models, a resolved recipe, and how the student sees time."""
    flops: Callable[[Passes], Work]
    """Of one step for one clip."""
    lr: float
    """Default of the recipe's peak learning rate."""
    betas: tuple[float, float]
    """Default betas of AdamW."""
    ema: float = 0.99
    """Default decay of the averaged weights."""
    layout: Callable[[View, StreamingConfig | None], FrameLayout] = noisy_layout
    """How the frames of a view meet in the pass that carries gradients."""
    needs_clips: bool = True
    """Whether there must be a data set; else the teacher can generate clips."""
    whole_clips: bool = False
    """Whether clips go in whole, rather than as views of the window."""
    needs_streaming_student: bool = False
    needs_streaming_teacher: bool = False
    sees_as_teacher: bool = False
    """Whether the student sees whole clips beside a bidirectional teacher, to which it is compared pass by pass."""
    guided: bool = False
    """Whether the recipe's guidance of the teacher is used, which needs the embedding of an empty prompt."""
    few_step: bool = False
    """Whether the result generates in a few steps."""
    own_settings: tuple[str, ...] = ()
    """Fields of the recipe that would change nothing in another stage, and are refused there."""
    holds_teacher: bool = True
    """Whether the losses run the teacher, for the estimate of memory."""
    holds_average: bool = False
    """Whether the losses run the averaged weights, which takes one more copy of what is trained."""
    holds_critic: bool = False
    """Whether a copy of the teacher is trained beside the student (`Objective.critic`)."""
