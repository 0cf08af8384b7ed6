"""What a request becomes for one model: frames, steps, prompts and their places, and what is assumed."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlaconvert.base.repository import Base
from mlaconvert.clips.tiny.clips import CAPTION, CAPTION_LEN, VOCABULARY, embed_captions, null_context
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import FEW_STEPS, StreamingConfig
from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.evaluation.conditions import TINY_GUIDANCE, TINY_STEPS
from mlaconvert.families.causal import SETTINGS, assumption_line
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.store import read_tensors
from mlaconvert.generation.marks import raw_bytes
from mlaconvert.generation.request import MANY_STEP_GUIDANCE, MANY_STEPS, Generation
from mlaconvert.model.rollout import Images
from mlaconvert.model.schedule import Sampler

OF_ONE = {"seed", "conditioning", "prompt", "prompts_begin"}  # settings in which the videos of a folder may differ


@dataclass(frozen=True, kw_only=True)
class EmbeddedPrompts:
    """Embedded prompts: a context [1, T, text_dim] of each and of the negative one, and the words they come from."""

    contexts: tuple[Tensor, ...]
    negative: Tensor | None
    words: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """A `Generation` with every choice made for one model."""

    frames: int  # latent
    size: tuple[int, int]  # latent pixels
    stride: int  # video frames a latent frame
    fps: int
    streaming: StreamingConfig
    sampler: Sampler
    seeds: tuple[int, ...]
    schedule: tuple[tuple[int, Tensor], ...]  # first latent frame, context [samples, T, text_dim]
    null_context: Tensor | None
    prefix: Tensor | None
    images: Images
    has_pixels: bool  # the latents are RGB pixels
    words: Mapping[str, Any] | None  # what the contexts were embedded from

    def sample(self, number: int) -> GenerationPlan:
        """The plan of one of the samples alone."""

        def one(tensor: Tensor) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[number : number + 1]

        latents, features = self.images.latents, self.images.features
        return dataclasses.replace(
            self,
            seeds=self.seeds[number : number + 1],
            schedule=tuple((start, one(context)) for start, context in self.schedule),
            prefix=None if self.prefix is None else one(self.prefix),
            images=Images(
                latents=None if latents is None else one(latents), features=None if features is None else one(features)
            ),
        )

    def settings(self) -> dict[str, Any]:
        """What the video depends on besides the model, as plain data."""
        given = [self.prefix, self.images.latents, self.images.features]
        if self.words is None:  # words are enough, and a GPU need not embed them twice to the same bits
            given = [*(context for _, context in self.schedule), self.null_context, *given]
        return {
            "frames": self.frames,
            "size": list(self.size),
            "streaming": dataclasses.asdict(self.streaming),
            "sampler": dataclasses.asdict(self.sampler) | {"timesteps": list(self.sampler.timesteps)},
            "seeds": list(self.seeds),
            "prompts_begin": [start for start, _ in self.schedule],
            "inputs": hashlib.sha256(b"".join(raw_bytes(tensor) for tensor in given if tensor is not None)).hexdigest(),
            **({} if self.words is None else {"text": dict(self.words)}),
        }


def caption_tokens(caption: str) -> Tensor:
    """Tokens [1, CAPTION_LEN] of a caption for the tiny model, such as "large red disc right, sky".

    An empty one means no caption. Raises InputError naming the word that does not belong.
    """
    words = re.findall(r"[^\s,]+", caption.lower())
    if words in ([], ["nothing"]):
        words = ["nothing"] * CAPTION_LEN
    else:
        for place, allowed in enumerate(CAPTION):
            word = words[place] if place < len(words) else "(missing)"
            if word not in allowed:
                raise InputError(f"caption {caption!r}: word {place + 1} is {word}; give one of {', '.join(allowed)}")
        if len(words) > CAPTION_LEN:
            raise InputError(
                f"caption {caption!r}: {words[CAPTION_LEN]} is one word too many; the form is "
                "SIZE COLOR SHAPE HEADING, BACKGROUND"
            )
    return torch.tensor([[VOCABULARY.index(word) for word in words]])


def plan_generation(
    request: Generation, config: WanConfig, *, row: int | None = None, text: EmbeddedPrompts | None = None
) -> GenerationPlan:
    """Check a `Generation` against a model and fill its defaults in. Raises ConfigError or InputError.

    With `row`, only that one of the prompts is shown. `text` has the prompts of a model without captions of its own.
    """
    video = default_video(config)
    pixels = config.works_on_pixels
    fps = video.fps
    if request.seconds is not None:
        frames = max(1, round(request.seconds * fps / video.frame_stride))
    else:
        frames = request.frames or (60 if pixels else 21)
    size = []
    for name, value, patch in (
        ("height", request.height or video.height, config.patch_size[1]),
        ("width", request.width or video.width, config.patch_size[2]),
    ):
        if value % (video.vae_stride * patch):
            raise ConfigError(f"{name} is {value} pixels: give a multiple of {video.vae_stride * patch}")
        size.append(value // video.vae_stride)
    streaming = dataclasses.replace(config.streaming or StreamingConfig(), **_given_settings(request))
    contexts, empty = make_contexts(request, config) if text is None else (list(text.contexts), text.negative)
    if row is not None:
        contexts = [contexts[row]]
    steps, scale = (TINY_STEPS, TINY_GUIDANCE) if pixels else (MANY_STEPS, MANY_STEP_GUIDANCE)
    few_step = config.few_step if request.few_step is None else request.few_step
    many = request.steps or (None if few_step or request.timesteps is not None else steps)
    guidance = request.guidance if request.guidance is not None else (scale if many and empty is not None else 1.0)
    sampler = (
        Sampler.many_step(many, shift=request.shift, guidance=guidance)
        if many
        else Sampler.few_step(request.timesteps or FEW_STEPS, shift=request.shift, guidance=guidance)
    )
    if guidance != 1 and empty is None:
        raise InputError(
            f"guidance {guidance} needs the embedding of an empty prompt: put null_context [1, T, {config.text_dim}] "
            "into the embeddings file, or take guidance 1"
        )
    prefix, images = read_given(request, config, frames, size)
    return GenerationPlan(
        frames=frames,
        size=(size[0], size[1]),
        stride=video.frame_stride,
        fps=fps,
        streaming=streaming,
        sampler=sampler,
        seeds=tuple(range(request.seed, request.seed + request.samples)),
        schedule=tuple(
            (start, context.expand(request.samples, -1, -1))
            for start, context in zip(
                prompt_starts(request, len(contexts), frames, fps / video.frame_stride), contexts, strict=True
            )
        ),
        null_context=empty,
        prefix=prefix,
        images=images,
        has_pixels=pixels,
        words=None if text is None else text.words,
    )


def _given_settings(request: Generation) -> dict[str, Any]:
    """The settings of `StreamingConfig` that replace the model's own."""
    return {name: getattr(request, name) for name in SETTINGS if getattr(request, name) is not None}


def assumptions(checkpoint: Checkpoint, request: Generation) -> list[str]:
    """What a user should know of how the model is taken to see time and is sampled, a line each."""
    given, config = set(_given_settings(request)), checkpoint.config
    streaming = dataclasses.replace(config.streaming or StreamingConfig(), **_given_settings(request))
    few_step = config.few_step if request.few_step is None else request.few_step
    if request.few_step is not None or request.steps is not None or request.timesteps is not None:
        given.add("few_step")
    assumed = assumption_line(checkpoint.timing, streaming=streaming, few_step=few_step, given=given, how="generate")
    notes = [*checkpoint.timing.remarks, *([] if assumed is None else [assumed])]
    if config.streaming is None and "streaming" not in checkpoint.timing.assumed and given.isdisjoint(SETTINGS):
        notes.append(
            f"a bidirectional model, which was not made to stream; it is run in chunks of {streaming.chunk_frames} in "
            f"a window of {streaming.window_frames} latent frames all the same"
        )
    if config.fps is not None:
        notes.append(f"the model is told {config.fps} frames a second; to set it: fps (16 or 24) in its config.json")
    if few_step and request.steps is None and request.timesteps is None:
        schedule = ", ".join(f"{step:g}" for step in FEW_STEPS)
        notes.append(f"a few-step student: timesteps {schedule}, warped by shift {request.shift:g}")
    return notes


def make_contexts(request: Generation, config: WanConfig) -> tuple[list[Tensor], Tensor | None]:
    """The prompts' contexts [1, T, text_dim], and that of an empty prompt."""
    if request.embeddings is not None:
        tensors = read_tensors(request.embeddings, ("context", "null_context"))
        if "context" not in tensors:
            raise InputError(f"{request.embeddings}: no tensor 'context'; expected [prompts, T, {config.text_dim}]")
        for name, tensor in tensors.items():
            fits = tensor.ndim == 3 and tensor.shape[2] == config.text_dim and len(tensor) > 0
            if not fits or not 0 < tensor.shape[1] <= config.text_len:
                raise InputError(
                    f"{request.embeddings}: {name} is {list(tensor.shape)}; expected "
                    f"[prompts, 1 to {config.text_len}, {config.text_dim}]"
                )
        empty = tensors.get("null_context")
        return list(tensors["context"].split(1)), None if empty is None else empty[:1]
    if not config.works_on_pixels or null_context().shape[2] != config.text_dim:
        raise InputError(
            "this model needs text embeddings: give a prompt, or --embeddings FILE, a safetensors file with context "
            f"[prompts, T, {config.text_dim}]"
        )
    captions = request.prompts or ("large red disc right, sky",)
    return [embed_captions(caption_tokens(caption)) for caption in captions], null_context()


def unembedded(base: Base, request: Generation, config: WanConfig, *, one_each: bool = False) -> EmbeddedPrompts:
    """The words, with zeros for their embeddings: enough to plan, and to check everything else."""
    blank = torch.zeros(1, 1, config.text_dim)
    words = {"base": base.source, "prompts": list(request.prompts)}
    text = EmbeddedPrompts(contexts=(blank,) * len(request.prompts), negative=blank, words=words)
    if plan_generation(request, config, row=0 if one_each else None, text=text).sampler.guidance == 1:
        return dataclasses.replace(text, negative=None)
    return dataclasses.replace(text, words=words | {"negative": request.negative})


def prompt_starts(request: Generation, prompts: int, frames: int, rate: float) -> list[int]:
    """The latent frame at which each prompt begins; `rate` is latent frames a second."""
    if request.switch is None:
        starts = [frames * i // prompts for i in range(prompts)]
    elif len(request.switch) != prompts - 1:
        raise ConfigError(f"{prompts} prompts switch {prompts - 1} times, not {len(request.switch)}")
    else:
        starts = [0, *(round(second * rate) for second in request.switch)]
    if any(a >= b for a, b in zip(starts, [*starts[1:], frames], strict=True)):
        raise ConfigError(
            f"the prompts would begin at latent frames {starts} of {frames}; let the switches ascend within the video"
        )
    return starts


def read_given(
    request: Generation, config: WanConfig, frames: int, size: Sequence[int]
) -> tuple[Tensor | None, Images]:
    """The prefix [samples, C, F, H, W] and the image conditioning of the file `request.given`."""
    if config.reference_dim is not None:
        raise UnsupportedModelError(
            "this model is given a control video and a reference image with every clip, for which `generate` has no "
            "place; in Python, the model of load_model takes them in every pass (image_latents, reference)"
        )
    extra = config.in_dim - config.out_dim
    tensors = (
        {} if request.given is None else read_tensors(request.given, ("latents", "image_latents", "image_features"))
    )
    where = request.given
    expected: dict[str, tuple[str, Callable[[torch.Size], bool]]] = {
        "latents": ("C, F, H, W", lambda s: (s[1], *s[3:]) == (config.out_dim, *size) and 0 < s[2] <= frames),
        "image_latents": ("channels, frames, H, W", lambda s: tuple(s[1:]) == (extra, frames, *size)),
        "image_features": ("I, image_dim", lambda s: s[2:] == (config.image_dim,)),
    }
    shapes = {
        "latents": f"[1, {config.out_dim}, up to {frames}, {size[0]}, {size[1]}]",
        "image_latents": f"[1, {extra}, {frames}, {size[0]}, {size[1]}]",
        "image_features": f"[1, I, {config.image_dim}]",
    }
    for name, tensor in tensors.items():
        dims, fits = expected[name]
        if tensor.ndim != dims.count(",") + 2 or tensor.shape[0] not in (1, request.samples) or not fits(tensor.shape):
            raise InputError(f"{where}: {name} is {list(tensor.shape)}; expected {shapes[name]} (or one a sample)")
    if extra and "image_latents" not in tensors:
        raise InputError(
            f"an image-to-video model needs image_latents {shapes['image_latents']} in a safetensors file: "
            "give it with --given FILE"
        )
    prefix = tensors.get("latents")
    if prefix is not None:
        prefix = prefix.expand(request.samples, -1, -1, -1, -1)
    return prefix, Images(latents=tensors.get("image_latents"), features=tensors.get("image_features"))


def prompt_plan(
    request: Generation, config: WanConfig, prompts: Sequence[str], number: int, embedded: Base | None
) -> GenerationPlan:
    """The plan of one prompt of a list; with `embedded`, the base of the text encoder, before it is embedded."""
    if request.embeddings is None:
        alone = dataclasses.replace(request, prompts=(prompts[number],))
        text = None if embedded is None else unembedded(embedded, alone, config)
        return plan_generation(alone, config, text=text)
    rows = len(make_contexts(request, config)[0])
    if rows != len(prompts):
        raise InputError(f"{request.embeddings}: context has {rows} rows for {len(prompts)} prompts; give one a prompt")
    return plan_generation(request, config, row=number)
