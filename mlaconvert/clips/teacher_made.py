"""Clips that a teacher generates itself, where there is no data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model import rates
from mlaconvert.model.flops import Work, rollout_work
from mlaconvert.model.rollout import CacheUse, LatentSize, passes, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel
from mlaconvert.progress import Counter, Progress, silent


@dataclass(frozen=True, kw_only=True)
class OwnClips:
    """What clips a model makes of an empty caption: `frames` of `height` x `width`, all latent.

    `streaming` and `sampler` are how it makes them; a bidirectional model is given a window, too.
    """

    frames: int
    height: int
    width: int
    streaming: StreamingConfig
    sampler: Sampler

    @classmethod
    def usual(
        cls, config: WanConfig, frames: int, *, streaming: StreamingConfig | None = None, sampler: Sampler | None = None
    ) -> OwnClips:
        """Of the size that such a model is usually run at, as it sees time and is sampled where nobody says else."""
        video = default_video(config)
        return cls(
            frames=frames,
            height=video.height // video.vae_stride,
            width=video.width // video.vae_stride,
            streaming=streaming or config.streaming or StreamingConfig(),
            sampler=sampler or Sampler.usual(few_step=config.few_step),
        )

    def shape(self, config: WanConfig) -> tuple[int, int, int, int]:
        """Of one clip [C, F, H, W]."""
        return config.out_dim, self.frames, self.height, self.width

    def work(self, config: WanConfig, count: int) -> Work:
        """What a dense model computes for so many clips."""
        tokens = config.tokens_per_frame(self.height, self.width)
        return count * rollout_work(config, self.streaming, self.sampler, frames=self.frames, frame_tokens=tokens)

    def warning(self, model: WanModel, count: int) -> str | None:
        """A line about clips that will take a CPU long."""
        config, device = model.config, model.patch_embedding.weight.device
        tokens = self.streaming.chunk_frames * config.tokens_per_frame(self.height, self.width)
        what = f"{count} clips of {self.frames} latent frames that the model makes itself"
        return rates.warning(what, self.work(config, count), config, device, model.dtype, tokens=tokens)

    def make(
        self,
        model: WanModel,
        count: int,
        *,
        seed: int,
        batch: int,
        progress: Progress = silent,
        stage: str = "clips",
        say: Callable[[str], None] | None = None,
    ) -> Clips:
        """`count` clips, `batch` at a time, in float32 on the CPU; a GPU computes them in bfloat16.

        `seed` is the first clip's, one more each next's. `progress` counts passes of the model, as those of
        `stage`. `say` is told where that will take long.
        """
        line = self.warning(model, count) if say is not None else None
        if say is not None and line is not None:
            say(line)
        context, parts = torch.zeros(count, 1, model.config.text_dim), []
        total = passes(self.frames, self.sampler, self.streaming, slices=-(-count // batch))
        counter = Counter(progress, stage, total)
        counter.show()
        device = model.patch_embedding.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as such models are run there
            for first, some in zip(range(0, count, batch), context.split(batch), strict=True):
                chunks = rollout(
                    model,
                    some,
                    size=LatentSize(frames=self.frames, height=self.height, width=self.width),
                    sampler=self.sampler,
                    seed=seed + first,
                    cache=CacheUse(streaming=self.streaming),
                    on_step=counter.step,
                )
                parts.append(torch.cat([chunk.float().cpu() for chunk in chunks], 2))
        return Clips(torch.cat(parts), context)
