"""Stage dmd: match the distribution of self-generated video (VideoMLA's third stage)."""

from __future__ import annotations

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import FEW_STEPS, StreamingConfig
from mlaconvert.healing.batches import Batch
from mlaconvert.healing.flops import Passes
from mlaconvert.healing.frames import View, noisy_layout, views
from mlaconvert.healing.objective import Objective, Uncast
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages.few_step import FewStep, Steps, stream
from mlaconvert.healing.stages.stage import Models, Stage
from mlaconvert.healing.state import choose_trained
from mlaconvert.model.flops import Work
from mlaconvert.model.schedule import add_noise, warp
from mlaconvert.model.wan import WanModel

LEVELS = (0.02, 0.98)  # of the schedule, before the shift, where the two scores are compared


class Generator(FewStep):
    """Distribution matching distillation (DMD2, arXiv 2405.14867) on Self-Forcing rollouts (2506.08009).

    The student generates a clip chunk by chunk through its latent cache, each chunk with the same drawn number of its
    four steps; only a chunk's last step carries gradients, cached entries do not. The clip is noised again, and the
    gradient of the divergence is the difference of what the fake and the real score take its clean version to be,
    divided by how far the real one moves it: the loss is |x - stop(x - gradient)|^2 / 2. The real score is the guided
    teacher, frozen; the fake one a critic that follows the student. Where the teacher is causal with a window, both
    scores look at one of its views of the clip.
    """

    def __init__(
        self,
        student: WanModel,
        teacher: WanModel,
        critic: Critic,
        recipe: HealRecipe,
        reference: list[Tensor] | None = None,
    ) -> None:
        super().__init__(student, teacher, recipe, reference)
        self._critic = (critic,)

    @property
    def critic(self) -> Critic:
        return self._critic[0]

    def critic_loss(self, batch: Batch, step: int) -> Tensor:
        with torch.no_grad():
            clip = self.call(self.rollout, batch, False)
        return self.critic.call(self.critic.loss, batch, step, Uncast((clip,)))

    def rollout(self, batch: Batch, live: bool) -> Tensor:
        """A self-generated clip [B, C, F, H, W]; `live` lets gradients into each chunk's last step."""
        steps = len(self.timesteps)
        return stream(
            self.student,
            batch.context,
            chunks=batch.view.chunks,
            noise=batch.rows.normal(steps, *batch.latents.shape[1:]).to(batch.latents),
            steps=Steps(self.timesteps, taken=1 + int(batch.shared * steps)),
            live=live,
            checkpointing=self.recipe.gradient_checkpointing,
        )

    def loss(self, batch: Batch, step: int) -> Tensor:
        clip = self.rollout(batch, True)
        gradient, seen = self.gradient(batch, clip.detach())
        x = clip[:, :, list(seen.frames)]
        return 0.5 * (x - (x - gradient).detach()).square().mean()

    @torch.no_grad()
    def gradient(self, batch: Batch, clip: Tensor) -> tuple[Tensor, View]:
        """(fake - real) / mean |x - real| of a view x of the clip, [B, C, f, H, W], and the view."""
        noisy, sigma, seen, x, _ = noised_view(batch, clip, self._teacher[0])
        real = x_zero(noisy, sigma, self.score(self._teacher[0], batch, noisy, sigma, seen))
        fake = x_zero(noisy, sigma, self.critic.call(self.critic.score, batch, Uncast((noisy, sigma)), seen))
        size = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
        return (fake - real) / size.clamp_min(1e-6), seen

    def score(self, model: WanModel, batch: Batch, noisy: Tensor, sigma: Tensor, seen: View) -> Tensor:
        """The real score's guided velocity."""
        return self.run_guided(model, noisy, 1000 * sigma, batch, noisy_layout(seen, model.config.streaming))

    def validate(self, clips: Clips) -> float:
        return self.distance(clips)


class Critic(Objective):
    """The fake score: flow matching (arXiv 2210.02747) on what the student generates now (DMD2's equation 6).

    `student` here is the critic's own model, which begins as the teacher.
    """

    def loss(self, batch: Batch, step: int, clip: Uncast | None = None) -> Tensor:
        assert clip is not None
        noisy, sigma, seen, x, noise = noised_view(batch, clip.tensors[0], self.student)
        return (self.score(batch, Uncast((noisy, sigma)), seen) - (noise - x)).square().mean()

    def score(self, batch: Batch, at: Uncast, seen: View) -> Tensor:
        """Velocity of a noised view at its levels."""
        noisy, sigma = at.tensors
        layout = noisy_layout(seen, self.student.config.streaming)
        return self.run(self.student, noisy, 1000 * sigma, batch.context, layout)


def noised_view(batch: Batch, clip: Tensor, model: WanModel) -> tuple[Tensor, Tensor, View, Tensor, Tensor]:
    """A view of a clip as `model` would see it, all frames at one noise level.

    Noisy view [B, C, f, H, W], level [B, f], the view, the clean view, and the noise.
    """
    found = views(clip.shape[2], model.config.streaming)
    seen = found[batch.shared_choice(len(found))]
    x = clip[:, :, list(seen.frames)]
    low, high = LEVELS
    level = warp(low + (high - low) * batch.rows.uniform(1)).to(x.device)
    sigma = level.expand(-1, len(seen.frames))
    noise = batch.rows.normal(*x.shape[1:]).to(x)
    return add_noise(x, noise, sigma), sigma, seen, x, noise


def x_zero(noisy: Tensor, sigma: Tensor, flow: Tensor) -> Tensor:
    """The clean clip that a velocity points to, x - sigma v."""
    return noisy - sigma[:, None, :, None, None] * flow


def _objective(models: Models, recipe: HealRecipe, streaming: StreamingConfig | None) -> Generator:
    fake = models.copy_teacher()
    choose_trained(fake, "all")
    return Generator(models.student, models.teacher, Critic(fake, recipe), recipe)


def _flops(passes: Passes) -> Work:
    ours, theirs = (
        passes.forward(config, noisy_layout(passes.view, config.streaming))
        for config in (passes.student, passes.teacher)
    )
    # On average half of the steps, then the clean pass; the critic learns from as many more rollouts.
    generate = ((len(FEW_STEPS) + 1) / 2 + 1) * ours
    critic = passes.recipe.critic_steps * (generate + passes.trained * theirs)
    return generate + (passes.trained - 1) * ours + (1 + passes.guided) * theirs + critic


STAGE = Stage(
    objective=_objective,
    flops=_flops,
    lr=2e-6,  # these are the paper's (arXiv 2605.30351)
    betas=(0.0, 0.999),
    whole_clips=True,
    needs_streaming_student=True,
    guided=True,
    few_step=True,
    holds_critic=True,
)
