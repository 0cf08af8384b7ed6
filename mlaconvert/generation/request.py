"""What `generate` is asked to make, and where it runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field

from mlaconvert.config.cache_dtype import CacheDtype
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.parsing import Count, NotNegative, Pixels, Positive, check_fields
from mlaconvert.config.streaming import SHIFT, Positions
from mlaconvert.errors import ConfigError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.source import AnySource
from mlaconvert.model.attention.kernel import AttentionMode
from mlaconvert.model.device import resolve_device
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

DEFAULT_OUTPUT = "video"  # where no output is given
LATENTS_NAME = "latents.safetensors"
REPORT_NAME = "generation.json"
# Euler steps and guidance of models that were not distilled to few steps, as Wan's own code has them.
MANY_STEPS, MANY_STEP_GUIDANCE = 50, 5.0
KEPT = "finished frames are kept: the same command goes on from them"

Movie = Literal["auto", "gif", "mp4", "none"]
MOVIES = (".mp4", ".gif")  # endings that make an output a single file


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What to generate. None leaves a choice to the model.

    Generation(prompts=("a red fox runs through fresh snow",), seconds=30, seed=7)

    Raises ConfigError naming the field.
    """

    frames: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Latent frames; this or `seconds`. By default 21, which are 81 video frames."""
    seconds: Annotated[float, Field(gt=0, le=10**5, allow_inf_nan=False)] | None = None
    """Seconds of video."""
    prompts: tuple[str, ...] = ()
    """Texts that play one after the other."""
    embeddings: Path | None = None
    """Instead of prompts, a safetensors file whose `context` [P, T, text_dim] has a row a prompt, and whose
    `null_context` [1, T, text_dim] guidance needs."""
    base: str | None = None
    """The folder or Hub repo whose text encoder embeds texts; by default what the model came with (the tiny model has a
    caption table of its own)."""
    negative: str = ""
    """The text that guidance compares with."""
    switch: tuple[Positive, ...] | None = None
    """When prompts change, in seconds of video, one fewer than prompts; by default they share the time evenly."""
    samples: Annotated[int, Field(ge=1, le=10**4)] = 1
    """Videos, which differ in their seeds: `seed`, `seed` + 1, ..."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first video's noise; all seeds are below 2^32."""
    timesteps: tuple[float, ...] | None = None
    """A few-step schedule, descending from 1000, before the warp by `shift`."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Euler steps that integrate the flow, instead of a few-step schedule."""
    shift: Annotated[float, Field(gt=0, le=10**3, allow_inf_nan=False)] = SHIFT
    """How far timesteps are warped towards noise."""
    guidance: NotNegative | None = None
    """Of the prompt over `negative`; 1 is off, and takes one pass where others take two."""
    height: Pixels | None = None
    """Video pixels; by default what such a model is usually run at."""
    width: Pixels | None = None
    """Video pixels; by default what such a model is usually run at."""
    chunk_frames: int | None = None
    """Replaces the model's own, as do the next three (`StreamingConfig`, which checks them)."""
    window_frames: int | None = None
    """Latent frames that a query sees."""
    sink_frames: int | None = None
    """First latent frames, which stay in the window."""
    positions: Positions | None = None
    """Where positions are counted from."""
    few_step: bool | None = None
    """Whether the model is a few-step student, if its files do not say so."""
    given: Path | None = None
    """A safetensors file with any of `latents` [samples or 1, C, F, H, W], whole chunks that are continued,
    `image_latents` [samples or 1, in_dim - C, frames, H, W] and `image_features` [samples or 1, I, image_dim]."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.frames is not None and self.seconds is not None:
            raise ConfigError("frames and seconds both say how long; give one of them")
        if self.steps is not None and self.timesteps is not None:
            raise ConfigError("steps (many-step) and timesteps (few-step) exclude each other; give one of them")
        if self.few_step and self.steps is not None:
            raise ConfigError("few_step and steps (many-step) exclude each other; give one of them")
        if self.few_step is False and self.timesteps is not None:
            raise ConfigError("timesteps (few-step) and many steps exclude each other; give one of them")
        if self.prompts and self.embeddings is not None:
            raise ConfigError("prompts and embeddings both say what to show; give one of them")
        if self.seed + self.samples > 2**32:
            raise ConfigError(f"seed is {self.seed}: give 0 to {2**32 - self.samples}")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How to run a model: nothing but `cache_dtype` changes what is generated, but for rounding. Raises ConfigError."""

    device: str = "cpu"
    """Torch's name of the model's device."""
    text_device: str | None = None
    """Torch's name of the text encoder's device; None is the model's."""
    dtype: torch.dtype | None = None
    """None keeps the file's own on a CPU and takes bfloat16 elsewhere."""
    attention: AttentionMode = "auto"
    """How latent attention computes: absorbed, expanded, or whatever is cheaper."""
    compile: bool = False
    """Compile every block: slower to begin with, faster afterwards."""
    slice_size: Count | None = None
    """Videos that go through the model at a time; None is all of them."""
    cache_dtype: CacheDtype | None = None
    """What the cache of the past is narrowed to; None keeps the model's own."""

    def __post_init__(self) -> None:
        check_fields(self)

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
        cache_dtype: str | None = None,
    ) -> Runtime:
        """From names, as a command line has them. Raises ConfigError for one that does not exist."""
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {dtype!r}: give float32, bfloat16 or float16")
        return cls(
            device=device,
            text_device=text_device,
            dtype=None if dtype is None else getattr(torch, dtype),
            attention=cast(AttentionMode, attention),
            compile=compile,
            slice_size=slice_size,
            cache_dtype=cast(Any, cache_dtype),  # which is checked
        )

    def geometry(self, checkpoint: Checkpoint) -> WanConfig:
        """The model's, with the cache that it runs with. Raises ConfigError where the two do not fit."""
        return dataclasses.replace(checkpoint.config, cache_dtype=self.cache_dtype)

    def chosen_dtype(self) -> torch.dtype | None:
        """The dtype to run in, None for the file's own. Raises ConfigError for a device that is not there."""
        on_cpu = resolve_device(self.device, torch.float32).type == "cpu"
        return self.dtype or (None if on_cpu else torch.bfloat16)

    def load(self, source: AnySource) -> WanModel:
        """The model, ready to run. Raises ConfigError for a device that is not there, and what `load_model` raises."""
        device, dtype = resolve_device(self.device, torch.float32), self.chosen_dtype()
        model = load_model(source, dtype=dtype, device=device, cache_dtype=self.cache_dtype)
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
