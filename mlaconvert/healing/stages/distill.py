"""Stage distill: bring a converted model back to its teacher, layer by layer and then as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import SHIFT, StreamingConfig
from mlaconvert.conversion.calibration.windows import batch_size
from mlaconvert.healing.batches import Batch, Rows, mix
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import FrameLayout, noisy_layout, prepare, views
from mlaconvert.healing.objective import VALIDATION, Objective, draw_noise, per_frame
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.stage import Stage
from mlaconvert.model.blocks import Block
from mlaconvert.model.flops import Work
from mlaconvert.model.schedule import add_noise, warp
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter

# Behind a clean past, levels are drawn as low as a sampler of so many steps goes: what is below is never asked for.
LOWEST = 1 / 20
MOST_RATIO = 100.0  # of what a teacher loses behind noisy pasts to what it loses behind clean ones
# Share of the noise levels that are drawn evenly by their logarithm, and from where on. Few levels of the schedule are
# near zero, but a velocity there is a small error divided by the level, and makes most of a gradient's variance.
SPREAD, FLOOR = 0.3, 1e-3


class Distill(Objective):
    """Knowledge distillation (Hinton et al., arXiv 1503.02531) of features, then of the output.

    For the first `attention_steps`, each layer's self-attention reads what the teacher's reads, and is held to what the
    teacher's makes of it (feature distillation as in FitNets, arXiv 1412.6550; all layers at once, since each has the
    teacher's input). Then the student's velocity is held to the teacher's at the same noisy clip. Both models see time
    as the teacher does. Clips only say where the two are compared, so the teacher's own serve.

    Most clips have a clean past, as a rollout has. A teacher errs far less behind it, and so little of a plain mean
    would be about it that students would lose there what they gain elsewhere. So squared errors behind clean pasts are
    scaled by how many times more the teacher itself loses behind noisy ones: both count as shares of its own losses
    (and the recipe's `clean_weight` says how much those behind clean pasts count beside the others).

    With a `data_share` the velocity that is learned lies between the teacher's and the clips' own: (1 - share) times
    the squared distance to the one plus share times that to the other, but for a constant.
    """

    form = 2  # 1 weighed all noisy chunks alike

    def __init__(
        self, student: WanModel, teacher: WanModel, recipe: HealRecipe, streaming: StreamingConfig | None
    ) -> None:
        super().__init__(student, recipe)
        self._teacher, self._streaming = (teacher,), streaming
        self.clean_weight = 1.0  # of squared errors behind clean pasts

    def phase(self, step: int) -> str:
        return "attention" if step < (self.recipe.attention_steps or 0) else "velocity"

    def loss(self, batch: Batch, step: int) -> Tensor:
        if self.phase(step) == "attention":
            return self._attention_loss(batch)
        errors, count = self._velocity_errors(batch)
        return errors / count

    @torch.no_grad()
    def prepare_validation(self, clips: Clips, null: Tensor | None) -> None:
        """Find what the teacher itself loses behind noisy and clean pasts, and so the weight of the latter."""
        noisy, clean = (self._teacher_loss(clips, clean_past=share) for share in (0.0, 1.0))
        if clean > 0:
            self.clean_weight = self.recipe.clean_weight * min(max(noisy / clean, 1.0), MOST_RATIO)

    def _teacher_loss(self, clips: Clips, *, clean_past: float) -> float:
        """The teacher's flow matching loss behind noisy pasts (0), or clean ones (1); 0 for clips of one chunk then."""
        total, frames = 0.0, 0
        for batch in self._validation_batches(clips, "teacher's losses"):
            noised = Noised.of(batch, clean_past)
            velocity = self.run(
                self._teacher[0], noised.latents, 1000 * noised.sigma, batch.context, self._layout(batch)
            )
            squares = (velocity - noised.velocity(batch.latents)).square().mean((1, 3, 4)) * noised.weight
            counted = noised.behind_clean if clean_past else noised.noisy
            total, frames = total + float(squares[counted].sum()), frames + int(counted.sum())
        return total / max(1, frames)

    def validate(self, clips: Clips) -> float:
        """The loss of the last phase on `clips`, always with the same noise.

        Held against the clips themselves, two states of a student differ less than what a few clips leave to chance.
        """
        errors, frames = 0.0, 0
        for batch in self._validation_batches(clips):
            error, noisy = self._velocity_errors(batch)
            errors, frames = errors + float(error), frames + int(noisy)
        return errors / frames

    def _validation_batches(self, clips: Clips, stage: str = VALIDATION) -> Iterator[Batch]:
        """All of `clips`, each with noise of its own that is always the same; progress says how many are done."""
        view = views(clips.latents.shape[2], self._streaming)[0]
        seeds = [mix("validate", i) for i in range(len(clips.latents))]
        size, first = batch_size(clips, self.student.config), 0
        count = Counter(self.progress, stage, -(-len(seeds) // size))
        count.show()
        for part in clips.batches(size):
            rows = Rows(seeds[first : first + len(part.latents)], first=first, total=len(seeds))
            yield Batch(latents=part.latents, context=part.context, null=None, view=view, rows=rows, shared=0.0)
            first += len(part.latents)
            count.step()

    def _layout(self, batch: Batch) -> FrameLayout:
        return noisy_layout(batch.view, self._streaming)

    def _attention_loss(self, batch: Batch) -> Tensor:
        """Mean over layers of |student - teacher|^2 / |teacher|^2 of the attention output."""
        noised = Noised.of(batch, self.recipe.clean_past)
        teacher, student = self._teacher[0], self.student
        _, _, _, height, width = noised.latents.shape
        patch = teacher.config.patch_size
        plan = self._layout(batch).plan(teacher, height // patch[1], width // patch[2], noised.latents.device)
        errors = []
        with torch.no_grad():
            p = prepare(teacher, noised.latents, 1000 * noised.sigma, batch.context, plan)
            x = p.x
        for block, pupil in zip(teacher.blocks, student.blocks, strict=True):
            assert isinstance(block, Block)
            with torch.no_grad():
                inputs, expected, x = block.trace(x, p.modulation, p.text, p.image, plan)
                expected = expected.float()
            attention = pupil.self_attn
            assert isinstance(attention, torch.nn.Module)
            if not any(parameter.requires_grad for parameter in attention.parameters()):
                continue
            inputs = inputs.to(student.dtype)
            if self.recipe.gradient_checkpointing:
                found = checkpoint(attention, inputs, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                found = attention(inputs, plan)
            errors.append((found.float() - expected).square().sum() / expected.square().sum())
        return torch.stack(errors).mean()

    def _velocity_errors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared differences from the velocity that is learned, weighted and summed over frames, and noisy frames."""
        noised = Noised.of(batch, self.recipe.clean_past)
        seen = (noised.latents, 1000 * noised.sigma, batch.context, self._layout(batch))

        def run_teacher() -> Tensor:
            return self.run(self._teacher[0], *seen)

        with torch.no_grad():
            if self.targets is not None and batch.name:  # validation's have none
                expected = self.targets.get(batch.name, run_teacher, noised.latents.device)
            else:
                expected = run_teacher()
            expected = expected + self.recipe.data_share * (noised.velocity(batch.latents) - expected)
        squares = (self.run(self.student, *seen) - expected).square().mean((1, 3, 4))
        weight = noised.weight * torch.where(noised.behind_clean, self.clean_weight, 1.0)
        return (squares * weight).sum(), noised.noisy.sum()


class Noised(NamedTuple):
    """Clips with a batch's noise, and that noise, [B, C, F, H, W]; and of each frame [B, F]: its noise level, what it
    counts, whether its chunk is the first behind a clean past.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    weight: Tensor
    behind_clean: Tensor

    @classmethod
    def of(cls, batch: Batch, clean_past: float) -> Noised:
        """`clean_past` is the share of clips that have one."""
        sigma, weight, behind_clean = noise_levels(batch, clean_past)
        noise = draw_noise(batch)
        return cls(add_noise(batch.latents, noise, sigma), noise, sigma, weight, behind_clean)

    def velocity(self, clean: Tensor) -> Tensor:
        """What flow matching asks for, of the clips without noise."""
        return self.noise - clean

    @property
    def noisy(self) -> Tensor:
        """Whether a frame has noise."""
        return self.sigma > 0


def noise_levels(batch: Batch, clean_past: float) -> tuple[Tensor, Tensor, Tensor]:
    """[B, F] each: a level a chunk, or a clean past before one of the chunks; what each level counts; and which frames
    are the first behind a clean past.

    Importance sampling: levels are drawn from a mixture, `SPREAD` of it log-uniform and the rest the shift-5 schedule,
    and weigh the schedule's density over the mixture's, so that a weighted mean has the schedule's expectation. Behind
    a clean past they are drawn from the schedule down to `LOWEST`. Clean frames weigh nothing.
    """
    count = len(batch.view.chunks)
    place = batch.rows.strata(count)
    levels = torch.where(place < SPREAD, FLOOR ** (1 - place / SPREAD), warp((place - SPREAD) / (1 - SPREAD)))
    schedule = SHIFT / (SHIFT - (SHIFT - 1) * levels).square()  # the derivative of the inverse of `warp`
    spread = (levels >= FLOOR) / (levels.clamp(min=FLOOR) * -math.log(FLOOR))
    weight = schedule / ((1 - SPREAD) * schedule + SPREAD * spread)
    chunk = torch.arange(count)
    first = 1 + batch.rows.integers(max(1, count - 1), 1)  # the first noisy chunk, where there is a clean past
    has_past = (batch.rows.uniform(1) < clean_past) & (first < count)
    clean, behind_clean = has_past & (chunk < first), has_past & (chunk == first)
    levels = levels.where(~behind_clean, warp(LOWEST + (1 - LOWEST) * place)).masked_fill(clean, 0.0)
    weight = weight.masked_fill(behind_clean, 1.0).masked_fill(clean, 0.0)
    device = batch.latents.device
    levels, weight, behind_clean = (per_frame(x.to(device), batch.view) for x in (levels, weight, behind_clean))
    return levels, weight, behind_clean


def _flops(passes: Passes) -> Work:
    ours, theirs = (
        passes.forward(config, noisy_layout(passes.view, config.streaming))
        for config in (passes.student, passes.teacher)
    )
    recipe = passes.recipe
    computed = (recipe.attention_steps or 0) + recipe.kept_steps if recipe.reuse > 1 else recipe.steps
    return passes.trained * ours + (computed / recipe.steps) * theirs


STAGE = Stage(
    objective=lambda models, recipe, streaming: Distill(models.student, models.teacher, recipe, streaming),
    flops=_flops,
    lr=1e-5,  # which a converted model bears without data of its own
    betas=(0.9, 0.99),
    needs_clips=False,
    own_settings=("clean_past", "clean_weight", "data_share", "reuse"),
    sees_as_teacher=True,
)
