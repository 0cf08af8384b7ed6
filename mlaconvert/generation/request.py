"""What `generate` is asked to make, and where it runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from mlaconvert.config.streaming import SHIFT
from mlaconvert.errors import ConfigError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.attention.kernel import AttentionMode
from mlaconvert.model.device import resolve_device
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

LATENTS_NAME = "latents.safetensors"
REPORT_NAME = "generation.json"
FPS = 16  # of Wan2.1 and the tiny model
# Euler steps and guidance that Wan's own code takes by default, for models that were not distilled to few steps.
WAN_STEPS, WAN_GUIDANCE = 50, 5.0
KEPT = "finished frames are kept: the same command goes on from them"

Movie = Literal["auto", "gif", "mp4", "none"]
MOVIES = (".mp4", ".gif")  # endings that make an output a single file


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What to generate. None leaves a choice to the model.

    `frames` are latent frames, `seconds` video; give one of them (81 video frames, 21 latent ones, by default).
    `prompts` play one after the other and change at `switch` (seconds of video, one fewer than prompts; by default they
    share the time evenly). Texts are embedded by the text encoder of `base`, a folder or Hub repo, by default the one
    that the model came with (the tiny model has a caption table of its own); guidance other than 1 compares with the
    text `negative`. Instead, `embeddings` is a safetensors file whose `context` [P, T, text_dim] has a row a prompt,
    and whose `null_context` [1, T, text_dim] guidance needs. `samples` videos differ in their seeds: `seed`,
    `seed` + 1, ...

    `timesteps`, given before the warp by `shift`, make a few-step schedule; `steps` integrates the flow in so many.
    `few_step` says whether the model is a few-step student, if its files do not. `height` and `width` are video pixels.
    `chunk_frames`, `window_frames`, `sink_frames` and `positions` replace the model's own.
    `given` is a safetensors file with any of `latents` [samples or 1, C, F, H, W], whole chunks that are continued,
    `image_latents` [samples or 1, in_dim - C, frames, H, W] and `image_features` [samples or 1, I, image_dim].
    """

    frames: int | None = None
    seconds: float | None = None
    prompts: tuple[str, ...] = ()
    embeddings: Path | None = None
    base: str | None = None
    negative: str = ""
    switch: tuple[float, ...] | None = None
    samples: int = 1
    seed: int = 0
    timesteps: tuple[float, ...] | None = None
    steps: int | None = None
    shift: float = SHIFT
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    chunk_frames: int | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    positions: str | None = None
    few_step: bool | None = None
    given: Path | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.seconds is not None:
            raise ConfigError("frames and seconds both say how long; give one of them")
        if self.steps is not None and self.timesteps is not None:
            raise ConfigError("steps (many-step) and timesteps (few-step) exclude each other; give one of them")
        if self.few_step and self.steps is not None:
            raise ConfigError("few_step and steps (many-step) exclude each other; give one of them")
        if self.few_step is False and self.timesteps is not None:
            raise ConfigError("timesteps (few-step) and many steps exclude each other; give one of them")
        if self.positions not in (None, "window", "absolute"):
            raise ConfigError(f"positions is {self.positions!r}: give window or absolute")
        if self.prompts and self.embeddings is not None:
            raise ConfigError("prompts and embeddings both say what to show; give one of them")
        for name, most in (("frames", 10**6), ("samples", 10**4), ("steps", 1000), ("height", 2**14), ("width", 2**14)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}: give 1 to {most}")
        for name, longest in (("seconds", 10**5), ("shift", 10**3)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= longest:
                raise ConfigError(f"{name} is {value}: give more than 0, at most {longest}")
        if self.switch is not None and not all(0 < second < math.inf for second in self.switch):
            raise ConfigError(f"switch is {list(self.switch)}: give positive seconds")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance is {self.guidance}: give 0 or more; 1 is off")
        if not 0 <= self.seed <= self.seed + self.samples <= 2**32:
            raise ConfigError(f"seed is {self.seed}: give 0 to {2**32 - self.samples}")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How to run a model: nothing here changes what is generated, but for rounding.

    `device` is torch's name, of the text encoder `text_device` (by default the same); `dtype` None keeps the file's on
    a CPU and takes bfloat16 elsewhere. `slice_size` videos go through the model at a time, all by default.
    """

    device: str = "cpu"
    text_device: str | None = None
    dtype: torch.dtype | None = None
    attention: AttentionMode = "auto"
    compile: bool = False
    slice_size: int | None = None

    @classmethod
    def of(
        cls,
        *,
        device: str,
        dtype: str | None,
        attention: str,
        compile: bool,
        slice_size: int | None,
        text_device: str | None = None,
    ) -> Runtime:
        """From names, as a command line has them. Raises ConfigError for one that does not exist."""
        if attention not in ("auto", "expanded", "absorbed"):
            raise ConfigError(f"attention is {attention!r}: give auto, expanded or absorbed")
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {dtype!r}: give float32, bfloat16 or float16")
        if slice_size is not None and slice_size < 1:
            raise ConfigError(f"slice is {slice_size}: give 1 or more videos at a time")
        return cls(
            device=device,
            text_device=text_device,
            dtype=None if dtype is None else getattr(torch, dtype),
            attention=cast(AttentionMode, attention),
            compile=compile,
            slice_size=slice_size,
        )

    def chosen_dtype(self) -> torch.dtype | None:
        """The dtype to run in, None for the file's own. Raises ConfigError for a device that is not there."""
        on_cpu = resolve_device(self.device, torch.float32).type == "cpu"
        return self.dtype or (None if on_cpu else torch.bfloat16)

    def load(
        self,
        source: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        state_key: str | None = None,
        config: Path | None = None,
    ) -> WanModel:
        """The model, ready to run. Raises ConfigError for a device that is not there, and what `load_model` raises."""
        device, dtype = resolve_device(self.device, torch.float32), self.chosen_dtype()
        with open_checkpoint(
            source, revision=revision, subfolder=subfolder, state_key=state_key, config=config
        ) as checkpoint:
            model = load_model(checkpoint, dtype=dtype, device=device)
        model.attention_mode = self.attention
        if self.compile:
            model.compile_blocks()
        return model


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """What came out. `frames` are latent; `video_fps` video frames of all samples a second of computing.

    `resumed_frames` were there from an interrupted run. Bytes are measured: of the cache (all samples and, with
    guidance, both halves), and of the prompt's keys and values beside it.
    """

    output: Path
    files: tuple[str, ...]
    frames: int
    resumed_frames: int
    video_seconds: float
    elapsed: float
    video_fps: float
    cache_bytes: int
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "output": str(self.output), "files": list(self.files)}
