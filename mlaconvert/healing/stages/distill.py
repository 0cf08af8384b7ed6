"""Stage distill: bring a converted model back to its teacher, layer by layer and then as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import SHIFT, StreamingConfig
from mlaconvert.conversion.calibration.windows import batch_size
from mlaconvert.healing.batches import Batch, Rows, mix
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import noisy_layout, prepare, views
from mlaconvert.healing.objective import VALIDATION, Objective, draw_noise, per_frame
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.stage import Stage
from mlaconvert.model.blocks import Block
from mlaconvert.model.flops import Work
from mlaconvert.model.schedule import add_noise, warp
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter

CLEAN_PAST = 0.5  # share of the clips whose first chunks are clean, as a rollout's are
# Share of the noise levels that are drawn evenly by their logarithm, and from where on. Few levels of the schedule are
# near zero, but a velocity there is a small error divided by the level, and makes most of a gradient's variance.
SPREAD, FLOOR = 0.3, 1e-3


class Distill(Objective):
    """Knowledge distillation (Hinton et al., arXiv 1503.02531) of features, then of the output.

    For the first `attention_steps`, each layer's self-attention reads what the teacher's reads, and is held to what the
    teacher's makes of it (feature distillation as in FitNets, arXiv 1412.6550; all layers at once, since each has the
    teacher's input). Then the student's velocity is held to the teacher's at the same noisy clip. Both models see time
    as the teacher does. Clips only say where the two are compared, so the teacher's own serve.
    """

    def __init__(
        self, student: WanModel, teacher: WanModel, recipe: HealRecipe, streaming: StreamingConfig | None
    ) -> None:
        super().__init__(student, recipe)
        self._teacher, self._streaming = (teacher,), streaming

    def phase(self, step: int) -> str:
        return "attention" if step < (self.recipe.attention_steps or 0) else "velocity"

    def loss(self, batch: Batch, step: int) -> Tensor:
        if self.phase(step) == "attention":
            return self._attention_loss(batch)
        errors, count = self._velocity_errors(batch)
        return errors / count

    def validate(self, clips: Clips) -> float:
        """The loss of the last phase on `clips`, always with the same noise.

        Held against the clips themselves, two states of a student differ less than what a few clips leave to chance.
        """
        view = views(clips.latents.shape[2], self._streaming)[0]
        seeds = [mix("validate", i) for i in range(len(clips.latents))]
        errors, frames, first = 0.0, 0, 0
        size = batch_size(clips, self.student.config)
        count = Counter(self.progress, VALIDATION, -(-len(seeds) // size))
        count.show()
        for part in clips.batches(size):
            rows = Rows(seeds[first : first + len(part.latents)], first=first, total=len(seeds))
            batch = Batch(latents=part.latents, context=part.context, null=None, view=view, rows=rows, shared=0.0)
            error, noisy = self._velocity_errors(batch)
            errors, frames, first = errors + float(error), frames + int(noisy), first + len(part.latents)
            count.step()
        return errors / frames

    def _attention_loss(self, batch: Batch) -> Tensor:
        """Mean over layers of |student - teacher|^2 / |teacher|^2 of the attention output."""
        noisy, sigma, _ = _add_noise(batch)
        teacher, student = self._teacher[0], self.student
        _, _, _, height, width = noisy.shape
        patch, layout = teacher.config.patch_size, noisy_layout(batch.view, self._streaming)
        plan = layout.plan(teacher, height // patch[1], width // patch[2], noisy.device)
        errors = []
        with torch.no_grad():
            p = prepare(teacher, noisy, 1000 * sigma, batch.context, plan)
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
        """Squared differences of the velocities, weighted to the schedule and summed over frames, and noisy frames."""
        noisy, sigma, weight = _add_noise(batch)
        layout = noisy_layout(batch.view, self._streaming)
        with torch.no_grad():
            expected = self.run(self._teacher[0], noisy, 1000 * sigma, batch.context, layout)
        found = self.run(self.student, noisy, 1000 * sigma, batch.context, layout)
        return ((found - expected).square().mean((1, 3, 4)) * weight).sum(), (sigma > 0).sum()


def _add_noise(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The clips with the batch's noise [B, C, F, H, W], and its `noise_levels`."""
    sigma, weight = noise_levels(batch)
    return add_noise(batch.latents, draw_noise(batch), sigma), sigma, weight


def noise_levels(batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, F] each: a level a chunk, or a clean past before one of the chunks, and what each level counts.

    Importance sampling: levels are drawn from a mixture, `SPREAD` of it log-uniform and the rest the shift-5 schedule,
    and weigh the schedule's density over the mixture's, so that a weighted mean has the schedule's expectation. Clean
    frames weigh nothing.
    """
    count = len(batch.view.chunks)
    place = batch.rows.strata(count)
    levels = torch.where(place < SPREAD, FLOOR ** (1 - place / SPREAD), warp((place - SPREAD) / (1 - SPREAD)))
    schedule = SHIFT / (SHIFT - (SHIFT - 1) * levels).square()  # the derivative of the inverse of `warp`
    spread = (levels >= FLOOR) / (levels.clamp(min=FLOOR) * -math.log(FLOOR))
    weight = schedule / ((1 - SPREAD) * schedule + SPREAD * spread)
    before = batch.rows.integers(count, 1) * (batch.rows.uniform(1) < CLEAN_PAST)
    clean = torch.arange(count) < before
    device = batch.latents.device
    levels, weight = (x.masked_fill(clean, 0.0).to(device) for x in (levels, weight))
    return per_frame(levels, batch.view), per_frame(weight, batch.view)


def _flops(passes: Passes) -> Work:
    ours, theirs = (
        passes.forward(config, noisy_layout(passes.view, config.streaming))
        for config in (passes.student, passes.teacher)
    )
    return passes.trained * ours + theirs


STAGE = Stage(
    objective=lambda models, recipe, streaming: Distill(models.student, models.teacher, recipe, streaming),
    flops=_flops,
    lr=1e-5,  # which a converted model bears without data of its own
    betas=(0.9, 0.99),
    needs_clips=False,
    sees_as_teacher=True,
)
