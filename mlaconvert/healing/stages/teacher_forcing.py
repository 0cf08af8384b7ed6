"""Stage teacher-forcing: learn to generate chunk by chunk behind a clean past (VideoMLA's first stage)."""

from __future__ import annotations

from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.healing.batches import Batch
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import clean_frames, forcing_layout
from mlaconvert.healing.objective import Objective, draw_levels, draw_noise, per_frame, with_past
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.stage import Stage
from mlaconvert.model.flops import Work
from mlaconvert.model.rollout import same_length
from mlaconvert.model.schedule import add_noise
from mlaconvert.model.wan import WanModel

DROPPED = 0.1  # share of the captions that are emptied, so that guidance keeps working


class TeacherForcing(Objective):
    """Flow matching (Lipman et al., arXiv 2210.02747), chunk by chunk with clean previous chunks.

    x = (1 - sigma) data + sigma noise, target noise - data, sigma from the shift-5 schedule, independently for every
    chunk. One masked pass over [clean past, noisy chunks] trains all chunks of a clip at once, each behind the clean
    past that a rollout would have in its cache (VideoMLA, 2605.30351, stage 1). A bidirectional student has one chunk.
    """

    def __init__(self, student: WanModel, recipe: HealRecipe, streaming: StreamingConfig | None) -> None:
        super().__init__(student, recipe)
        self._streaming = streaming

    def loss(self, batch: Batch, step: int) -> Tensor:
        sigma, noise = per_frame(draw_levels(batch), batch.view), draw_noise(batch)
        context = batch.context
        if batch.null is not None:
            dropped = (batch.rows.uniform(1, 1) < DROPPED).to(context.device)
            context, empty = same_length(context, batch.null.to(context))
            context = context.where(~dropped, empty)
        latents, timestep = with_past(batch, add_noise(batch.latents, noise, sigma), sigma)
        layout = forcing_layout(batch.view, self._streaming)
        found = self.run(self.student, latents, timestep, context, layout)[:, :, clean_frames(batch.view) :]
        return (found - (noise - batch.latents)).square().mean()


def _flops(passes: Passes) -> Work:
    return passes.trained * passes.forward(passes.student, forcing_layout(passes.view, passes.student.streaming))


STAGE = Stage(
    objective=lambda models, recipe, streaming: TeacherForcing(models.student, recipe, streaming),
    flops=_flops,
    lr=5e-6,  # these are the paper's (arXiv 2605.30351)
    betas=(0.0, 0.999),
    layout=forcing_layout,
    holds_teacher=False,
)
