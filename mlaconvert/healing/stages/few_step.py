"""Students of four steps: generating through the latent cache, and how far they are from a teacher of many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.healing.batches import Rows, mix
from mlaconvert.healing.frames import chunk_velocity
from mlaconvert.healing.objective import VALIDATION, Objective
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.rollout import Given, LatentSize, passes, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import default_chunks
from mlaconvert.progress import Counter, Progress, silent

DRAWS = 2  # rollouts of each clip on either side of the distance
TEACHER_STEPS = 20


@dataclass(frozen=True)
class Steps:
    """A few-step schedule of which the first `taken` steps are made; the last one's prediction is the chunk."""

    timesteps: Sequence[float]
    taken: int


def stream(
    model: WanModel,
    context: Tensor,
    *,
    chunks: Sequence[int],
    noise: Tensor,
    steps: Steps,
    live: bool = False,
    checkpointing: bool = False,
    on_pass: Callable[[], None] | None = None,
) -> Tensor:
    """A clip [B, C, F, H, W] generated chunk by chunk through the latent cache, as Self-Forcing does (2506.08009).

    `noise` [B, timesteps, C, F, H, W] is used in turn: first to begin with, then to noise each prediction again. With
    `live`, each chunk's last step carries gradients; all else is constant. `on_pass` is called after every pass.
    """
    batch, _, _, _, height, width = noise.shape
    streaming = model.config.streaming or StreamingConfig()
    cache = LatentCache(
        model.config,
        batch=batch,
        height=height,
        width=width,
        streaming=streaming,
        dtype=torch.float32,
        device=noise.device,
    )
    levels = [t / 1000 for t in steps.timesteps[: steps.taken]]
    made: list[Tensor] = []
    start = 0
    for count in chunks:
        frames = slice(start, start + count)
        x = noise[:, 0, :, frames]
        for i, level in enumerate(levels):
            last = i == len(levels) - 1
            with torch.set_grad_enabled(live and last):
                flow = chunk_velocity(
                    model, x, 1000 * level, context, cache, start, live=live and last, checkpointing=checkpointing
                )
                clean = x - level * flow
            if on_pass is not None:
                on_pass()
            if not last:
                x = torch.lerp(clean, noise[:, i + 1, :, frames], levels[i + 1])
        with torch.no_grad():
            chunk_velocity(model, clean.detach(), 0.0, context, cache, start)
        if on_pass is not None:
            on_pass()
        made.append(clean)
        start += count
    return torch.cat(made, 2)


class FewStep(Objective):
    """A student of four steps, validated by what it generates."""

    def __init__(
        self, student: WanModel, teacher: WanModel, recipe: HealRecipe, reference: list[Tensor] | None = None
    ) -> None:
        super().__init__(student, recipe)
        self._teacher = (teacher,)
        self._reference = reference or []
        self.timesteps = Sampler.few_step().timesteps

    def prepare_validation(self, clips: Clips, null: Tensor | None) -> None:
        self._reference = reference_features(
            self._teacher[0], clips, null, self.recipe.guidance, progress=self.progress
        )

    def distance(self, clips: Clips) -> float:
        """`energy_distance` of what the student makes of held-back prompts to what the many-step teacher does."""
        streaming = self.student.config.streaming
        total = DRAWS * passes(clips.latents.shape[2], Sampler.few_step(), streaming)
        count = Counter(self.progress, VALIDATION, total)
        count.show()
        found = [self._generate(clips, draw, count.step) for draw in range(DRAWS)]
        return energy_distance([video_features(self._teacher[0], v, clips.context) for v in found], self._reference)

    def _generate(self, clips: Clips, draw: int, on_pass: Callable[[], None] | None = None) -> Tensor:
        rows = Rows([mix("validate", draw, i) for i in range(len(clips.latents))])
        return stream(
            self.student,
            clips.context,
            chunks=default_chunks(clips.latents.shape[2], self.student.config.streaming),
            noise=rows.normal(len(self.timesteps), *clips.latents.shape[1:]).to(clips.latents),
            steps=Steps(self.timesteps, len(self.timesteps)),
            on_pass=on_pass,
        )


def reference_features(
    teacher: WanModel,
    clips: Clips,
    null: Tensor | None,
    guidance: float,
    first: int = 0,
    *,
    progress: Progress = silent,
) -> list[Tensor]:
    """Features of what the teacher makes of the clips' prompts by many steps, `DRAWS` tensors [N, K].

    A bidirectional teacher does not generate chunk by chunk; the clips themselves then stand for it. `progress` counts
    the teacher's passes.
    """
    streaming = teacher.config.streaming
    if streaming is None:
        return [video_features(teacher, clips.latents, clips.context)] * DRAWS
    sampler = Sampler.many_step(TEACHER_STEPS, guidance=guidance if null is not None else 1.0)
    count, _, frames, height, width = clips.latents.shape
    counted = Counter(progress, "what to validate by", DRAWS * passes(frames, sampler, streaming))
    counted.show()
    videos = [
        rollout(
            teacher,
            clips.context,
            size=LatentSize(frames=frames, height=height, width=width),
            given=Given(null_context=null),
            sampler=sampler,
            seed=[mix("reference", draw + first, i) >> 38 for i in range(count)],
            on_step=counted.step,
        )
        for draw in range(DRAWS)
    ]
    return [video_features(teacher, torch.cat(list(video), 2), clips.context) for video in videos]


@torch.no_grad()
def video_features(teacher: WanModel, video: Tensor, context: Tensor) -> Tensor:
    """How the teacher sees a clean clip: [N, K] float64, of [N, C, F, H, W].

    The tokens after its middle block, averaged over each frame, and their spread there: what is in a frame and how
    detailed it is, frame by frame.
    """
    timestep = torch.zeros(len(video), device=video.device)
    p = teacher.prepare(video, timestep, context)
    x = p.x
    for block in list(teacher.blocks)[: (len(teacher.blocks) + 1) // 2]:
        x = block(x, p.modulation, p.text, p.image, p.plan, None)
    frames = x.double().unflatten(1, (p.grid[0], -1))  # [N, F, tokens, D]
    mean = frames.mean(2)
    spread = frames.std(2) if frames.shape[2] > 1 else torch.zeros_like(mean)
    return torch.cat((mean, spread), -1).flatten(1)


def energy_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The energy distance (Szekely and Rizzo) of two conditional distributions, as a share of their spread.

    Row i of every [N, K] is a sample for condition i. For each condition 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased
    and never negative in expectation, zero only where the distributions agree; the mean over conditions is divided by
    the mean of E|Y - Y'| (or of |Y|, when theirs are all alike).
    """

    def mean_distance(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(a - b).norm(dim=1) for a, b in pairs]).mean()

    def within(side: Sequence[Tensor]) -> Tensor:
        return mean_distance([(a, b) for i, a in enumerate(side) for b in side[:i]])

    spread = within(theirs)
    between = mean_distance([(a, b) for a in ours for b in theirs])
    size = spread if spread > 0 else theirs[0].norm(dim=1).mean()
    return float((2 * between - within(ours) - spread) / size)
