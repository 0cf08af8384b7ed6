"""What a healing run does: one frozen recipe, from a YAML file, options, or both."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlaconvert.clips.folder import BadShards
from mlaconvert.config.parsing import STRICT, NotNegative, Positive, Seed, check_fields, parse
from mlaconvert.conversion.recipes import read_recipe
from mlaconvert.errors import ConfigError
from mlaconvert.files.shipped import recipe_folder, recipe_names
from mlaconvert.healing.stages import STAGES, stage_of

Train = Literal["latent", "attention", "all"]

# Of whatever stage: SOAP's are its paper's (arXiv 2409.11321), Muon's first is its momentum.
_BETAS = {"soap": (0.95, 0.95), "muon": (0.95, 0.99)}
_Count = Annotated[int, Field(ge=1, le=10**6)]
_Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
# A run that goes on from its saved state may change these; anything else would make it another run.
CHANGEABLE = frozenset(("lr", "critic_lr", "clip", "max_loss_ratio", "save_every", "bad_shards", "tracker"))


@dataclass(frozen=True, kw_only=True)
class HealRecipe:
    """Settings of one stage. A field that is None takes the stage's default (`resolved`).

    HealRecipe(stage="distill", steps=1000, batch=2, precision="bf16")
    Raises ConfigError naming the field.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    stage: str
    """What is learned, and from what: a name of `mlaconvert.healing.stages`."""
    steps: _Count = 300
    """Steps of the optimizer."""
    train: Train = "attention"
    """What learns: "latent" (what the conversion brought: latent, rotary key, and the queries that meet them),
    "attention" (all of self-attention) or "all"."""
    batch: _Count = 8
    """Clips that go through each process at once."""
    accumulate: _Count = 1
    """Batches that make a step."""
    optimizer: Literal["adamw", "soap", "muon"] = "adamw"
    """AdamW, SOAP (arXiv 2409.11321), or Muon for the blocks' matrices, with steps of AdamW's size (arXiv 2502.16982),
    and AdamW for the rest."""
    lr: Positive | None = None
    """The highest learning rate."""
    betas: tuple[_Share, _Share] | None = None
    """Decay of the optimizer's averages of gradients (Muon's momentum) and of their squares."""
    weight_decay: NotNegative = 0.0
    """Share of the learning rate by which weights shrink in a step; 0 for none."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does afterwards: fall along a cosine, or stay."""
    clip: Positive = 1.0
    """The norm that gradients are clipped to."""
    ema: _Share | None = None
    """Decay of the averaged weights, which are what is validated and written; 0 for no average."""
    precision: Literal["float32", "bf16"] = "float32"
    """What products are computed in; weights and optimizer are float32."""
    gradient_checkpointing: bool = False
    """Compute a block's activations again in the backward pass: less memory, more time."""
    attention_steps: Annotated[int, Field(ge=0)] | None = None
    """distill: steps that match attention outputs, before the others match velocities; a fifth by default."""
    clean_past: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.8
    """distill: share of the clips whose first chunks are clean, as a rollout's are."""
    clean_weight: Positive = 1.0
    """distill: how much errors behind clean pasts count beside those behind noisy ones, each as a share of what the
    teacher itself loses there."""
    data_share: _Share = 0.0
    """distill: how much of the velocity that is learned is the clips' own (flow matching); the rest is the teacher's.
    For a teacher that its clips can still improve; not for a few-step one, and not for clips that it made itself."""
    reuse: _Count = 1
    """distill: how often each noised clip is learned from. The teacher's velocity for it is computed once and kept in
    the run's state, as large as the clip in float32, until the run ends."""
    solver_steps: Annotated[int, Field(ge=1, le=10**6, multiple_of=4)] = 48
    """consistency: steps in which the teacher's flow is solved; a multiple of the student's 4."""
    guidance: NotNegative = 3.0
    """consistency and dmd: guidance of the teacher; 1 is off."""
    critic_steps: _Count = 5
    """dmd: steps of the fake score before each step."""
    critic_lr: Positive | None = None
    """dmd: learning rate of the fake score; a fifth of `lr` by default."""
    frames: _Count | None = None
    """Latent frames of a clip that are used; by default all of them, and of self-generated video a window's worth, or
    four chunks."""
    clips: _Count = 40
    """Clips that the teacher generates where there is no data; on a GPU in bfloat16."""
    bad_shards: BadShards = "refuse"
    """What becomes of data that cannot be read: stop before training, or skip it and say so."""
    validation_clips: _Count = 16
    """Clips that are never trained on. Averaged weights are validated on them: distill by the velocity's distance to
    what it learns, teacher-forcing by the flow matching loss, consistency and dmd by the distance of what they
    generate."""
    validate_every: _Count = 50
    """Steps between validations."""
    save_every: _Count = 50
    """Steps between saved states, from which an interrupted run goes on."""
    max_loss_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 100.0
    """The run stops when a loss is above so many times the running median; always when it is not finite."""
    tracker: str = "tensorboard"
    """Where curves go besides the log: a tracker that accelerate knows, or none."""
    seed: Seed = 0
    """Of noise, timesteps and the order of clips."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage is {self.stage!r}: give {', '.join(STAGES)}")
        check_fields(self)
        if self.attention_steps is not None and self.attention_steps > self.steps:
            raise ConfigError(f"attention_steps is {self.attention_steps}: give 0 to the {self.steps} steps")
        if self.reuse > self.steps:
            raise ConfigError(f"reuse is {self.reuse}: give 1 to the {self.steps} steps")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        others = [(stage, name) for stage in STAGES if stage != self.stage for name in stage_of(stage).own_settings]
        for stage, name in others:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} is {getattr(self, name)}, but only stage {stage} has it; leave it out")

    @property
    def own_steps(self) -> int:
        """Steps with clips of their own, behind which the same come again."""
        return -(-self.steps // self.reuse)

    @property
    def kept_steps(self) -> int:
        """Of those, the ones for which the teacher's velocity is kept: where attention is matched there is none."""
        return min(self.own_steps, self.steps - (self.attention_steps or 0)) if self.reuse > 1 else 0

    def resolved(self) -> HealRecipe:
        """With every default of the stage filled in."""
        stage = stage_of(self.stage)
        lr, betas = self.lr or stage.lr, _BETAS.get(self.optimizer, stage.betas)
        return dataclasses.replace(
            self,
            lr=lr,
            betas=self.betas or betas,
            ema=stage.ema if self.ema is None else self.ema,
            attention_steps=self.steps // 5 if self.attention_steps is None else self.attention_steps,
            critic_lr=self.critic_lr or lr / 5,
        )


def learning_rate(recipe: HealRecipe, step: int, peak: float) -> float:
    """The rate of step `step` (from 0): a linear warm-up, then constant or a cosine down to a hundredth."""
    if step < recipe.warmup:
        return peak * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return peak
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return peak * max(0.01, 0.5 + 0.5 * math.cos(math.pi * share))


def heal_recipe_names() -> list[str]:
    """Names of the healing recipes that ship with mlaconvert."""
    return recipe_names(recipe_folder() / "heal")


def load_heal_recipe(recipe: str | Path | None, options: dict[str, Any]) -> HealRecipe:
    """A YAML file or a shipped recipe by its name (or nothing), with `options` on top.

    Raises ConfigError naming the file and the field.
    """
    data: dict[str, Any] = {}
    if recipe is not None:
        path, data = read_recipe(recipe, recipe_folder() / "heal", "healing recipes", f"stage: {next(iter(STAGES))}")
        known = {field.name for field in dataclasses.fields(HealRecipe)}
        for name in data:
            if name not in known:
                raise ConfigError(f"{path}: unknown field {name!r}; known fields: {', '.join(sorted(known))}")
    merged = data | options
    if "stage" not in merged:
        raise ConfigError(f"no stage; give one with --stage {'|'.join(STAGES)} or a recipe that names it")
    return parse(HealRecipe, merged, "options" if recipe is None else f"{recipe} and options")
