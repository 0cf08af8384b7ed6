"""Batches for healing: everything about a batch follows from the recipe's seed and the step's number.

So a run can be killed anywhere and go on as if nothing had happened, and one process draws what several would: a
sample's clip and noise depend on its number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mlaconvert.clips.folder import ClipFolder, Clips, load_null_context, save_shard
from mlaconvert.clips.teacher_made import OwnClips
from mlaconvert.clips.tiny.clips import held_back, null_context, training_clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.files.inputs import is_folder
from mlaconvert.healing.frames import View, views
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.stages import stage_of
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import default_chunks
from mlaconvert.progress import Progress

DRAWN_SEED = 1_200_000_000  # drawn clips take their seeds from here on; held-back ones begin at 2,000,000,000
TINY_FRAMES = 9
GENERATED = 4  # clips of one generated shard
_FINE = 7919  # a prime, so that the remainders by any small count are even


def mix(*parts: int | str) -> int:
    """A seed that depends on all parts, below 2^62."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 2


class Rows:
    """Random numbers of a batch: one generator a sample.

    The batch is samples `first` ... of the `total` that make a step; all parts of a step are given the same `common`.
    """

    def __init__(self, seeds: list[int], *, first: int = 0, total: int | None = None, common: int = 0) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._first, self._total, self._common = first, total or len(seeds), common

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators])

    def strata(self, count: int) -> Tensor:
        """Uniform in [0, 1), [B, count]: in each column, one sample of the step in each of `total` equal parts."""
        common = torch.Generator().manual_seed(self._common)
        parts = torch.stack([torch.randperm(self._total, generator=common) for _ in range(count)], 1)
        parts = parts[self._first : self._first + len(self._generators)]
        return ((parts + self.uniform(count)) / self._total).clamp(max=1 - 2**-24)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below `high`, [B, *shape]."""
        return torch.stack([torch.randint(high, shape, generator=g) for g in self._generators])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips as one view shows them. A dataclass: what casts a module's inputs to bfloat16 leaves it alone.

    `shared` is a number in [0, 1) that all processes draw alike. A batch that comes again has the same `name`.
    """

    latents: Tensor  # [B, C, F, H, W]
    context: Tensor  # [B, T, text_dim]
    null: Tensor | None  # [1, T, text_dim]
    view: View
    rows: Rows
    shared: float
    name: str = ""

    def shared_choice(self, count: int) -> int:
        """One of `count`, alike in all processes; by the finer digits of `shared`, whose size may choose something
        else."""
        return int(self.shared * _FINE) % count


class ClipSource(Protocol):
    """Clips by number, without end. `fingerprint` tells one source from another."""

    fingerprint: str
    clip_shape: tuple[int, ...]  # [C, F, H, W]
    null: Tensor | None

    def clips(self, numbers: list[int]) -> Clips:
        """The clips of these numbers, as one batch."""
        ...

    def validation(self, count: int) -> Clips:
        """Clips that `clips` never gives."""
        ...


class DrawnClips:
    """The built-in model's clips, drawn when they are asked for."""

    fingerprint = "drawn"

    def __init__(self, frames: int | None = None) -> None:
        self.null: Tensor | None = null_context()
        self.clip_shape = tuple(training_clips(1, frames=frames or TINY_FRAMES).latents.shape[1:])

    def clips(self, numbers: list[int]) -> Clips:
        """Drawn from seeds of these numbers."""
        found = [training_clips(1, frames=self.clip_shape[1], seed=DRAWN_SEED + number) for number in numbers]
        return Clips(torch.cat([c.latents for c in found]), torch.cat([c.context for c in found]))

    def validation(self, count: int) -> Clips:
        """Clips that training never drew."""
        return held_back(count, frames=self.clip_shape[1])


class StoredClips:
    """A folder's clips in an order that is drawn anew for each pass; the last `held` of them are never trained on."""

    def __init__(self, folder: ClipFolder, null: Tensor | None, *, held: int, seed: int) -> None:
        self.folder, self.null, self.fingerprint = folder, null, folder.fingerprint
        self.clip_shape = folder.clip_shape
        trained, self._held = folder.split(held)
        self.count = len(trained)
        if not trained or not self._held:
            raise InputError(
                f"{folder.folder}: of its {folder.total} clips, {self.count} can be trained on and {len(self._held)} "
                "can be validated on (the last quarter); give more clips, at least 4 that are good"
            )

        @lru_cache(maxsize=2)
        def order(turn: int) -> Tensor:
            return torch.randperm(self.count, generator=torch.Generator().manual_seed(mix(seed, "order", turn)))

        self._order = order

    def clips(self, numbers: list[int]) -> Clips:
        """Read from the folder, in the order of their pass."""
        return self.folder.some([int(self._order(n // self.count)[n % self.count]) for n in numbers])

    def validation(self, count: int) -> Clips:
        """The first of those that are held back."""
        return self.folder.some(self._held[:count])


def open_source(
    recipe: HealRecipe,
    data: str | Path | None,
    config: WanConfig,
    say: Callable[[str], None],
    *,
    draws: bool,
) -> ClipSource | None:
    """Where the clips come from: a folder, drawings if the model `draws`, or None: the teacher has to generate them.

    Raises ConfigError when the stage needs a data set that is not there, InputError for one that does not fit.
    """
    if config.in_dim != config.out_dim:
        raise ConfigError("an image-to-video model cannot be healed yet: clips hold no image latents")
    if data is not None:
        if not is_folder(Path(data)):
            raise InputError(f"{data}: there is no such folder of clips")
        return _stored(recipe, Path(data), config, say)
    if draws:
        return DrawnClips(recipe.frames)
    if stage_of(recipe.stage).needs_clips:
        raise ConfigError(f"stage {recipe.stage} needs clips; give a folder of them with --data DIR")
    return None


def _stored(recipe: HealRecipe, folder: Path, config: WanConfig, say: Callable[[str], None]) -> StoredClips:
    clips = ClipFolder(folder, config, bad=recipe.bad_shards, on_bad=say)
    null = load_null_context(folder, config)
    stored = StoredClips(clips, null, held=min(recipe.validation_clips, clips.total // 4), seed=recipe.seed)
    if clips.unusable or len(clips) < clips.total:
        say(
            f"{folder}: {clips.total - len(clips)} of {clips.total} clips and {clips.unusable} whole shards are left "
            f"out; {stored.count} clips are trained on, {len(clips) - stored.count} validated on"
        )
    return stored


def clips_to_generate(recipe: HealRecipe, config: WanConfig) -> OwnClips:
    """What the teacher generates where there is no data set; by default three chunks a clip."""
    return OwnClips.usual(config, recipe.frames or 3 * (config.streaming or StreamingConfig()).chunk_frames)


def generate_source(
    recipe: HealRecipe,
    teacher: WanModel,
    folder: Path,
    say: Callable[[str], None],
    progress: Progress,
    *,
    write: bool,
) -> ClipSource:
    """Clips that the teacher generates from an empty prompt into shards in `folder`; those that are there stay.

    Only the process told to `write` writes; the others must wait for it.
    """
    config, own = teacher.config, clips_to_generate(recipe, teacher.config)
    total = -(-recipe.clips // GENERATED)
    paths = [folder / f"clips-{number:05d}.safetensors" for number in range(total if write else 0)]
    line = own.warning(teacher, GENERATED * sum(not path.is_file() for path in paths))
    if line is not None:
        say(line)
    for number, path in enumerate(paths):
        progress("generate", number, total)
        if path.is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        seed = mix(recipe.seed, "generate", number) >> 38
        clips = own.make(teacher, GENERATED, seed=seed, batch=GENERATED)
        save_shard(path, clips._asdict())
    progress("generate", total, total)
    return _stored(recipe, folder, config, say)


class Batches:
    """`batch(step, micro)`: what this process works on then."""

    def __init__(
        self,
        source: ClipSource,
        recipe: HealRecipe,
        streaming: StreamingConfig | None,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        whole: bool = False,
    ) -> None:
        self.source, self.recipe, self.rank, self.world, self.device = source, recipe, rank, world, device
        frames = min(recipe.frames or source.clip_shape[1], source.clip_shape[1])
        if streaming is not None:  # whole chunks
            frames = max(frames - frames % streaming.chunk_frames, min(frames, streaming.chunk_frames))
        everything = tuple(range(frames))
        chunks = tuple(default_chunks(frames, streaming)) if streaming else (frames,)
        self.views = [View(everything, chunks, everything)] if whole else views(frames, streaming)

    def batch(self, step: int, micro: int = 0, purpose: str = "student") -> Batch:
        """Clips, noise and view of one micro-batch; `purpose` keeps the critic's apart from the student's."""
        recipe, step = self.recipe, step % self.recipe.own_steps if self.recipe.reuse > 1 else step
        total = recipe.accumulate * self.world * recipe.batch
        first = (micro * self.world + self.rank) * recipe.batch
        numbers = list(range(step * total + first, step * total + first + recipe.batch))
        common = torch.Generator().manual_seed(mix(recipe.seed, purpose, "common", step, micro))
        view = self.views[int(torch.randint(len(self.views), (), generator=common))]
        clips = self.source.clips(numbers)
        null = self.source.null
        return Batch(
            latents=clips.latents[:, :, list(view.frames)].to(self.device),
            context=clips.context.to(self.device),
            null=None if null is None else null.to(self.device),
            view=view,
            rows=Rows(
                [mix(recipe.seed, purpose, number) for number in numbers],
                first=first,
                total=total,
                common=mix(recipe.seed, purpose, "strata", step),
            ),
            shared=float(torch.rand((), generator=common)),
            name=f"{step}-{micro}-{self.rank}",
        )

    def validation(self) -> Clips:
        """Held-back clips, cut to the first view: what a masked pass shows exactly as streaming does."""
        clips = self.source.validation(self.recipe.validation_clips)
        latents = clips.latents[:, :, list(self.views[0].frames)]
        return Clips(latents.to(self.device), clips.context.to(self.device))
