"""Video from a model folder: chunk by chunk through the sliding-window cache, onto the disk as it comes.

The latents go into a file that is laid out beforehand, so a long video never lies in memory. What an interrupted run
finished stays in `.<output>.partial` (`mlaconvert.staging`); the same call takes it up from there. Prompts are embedded
first, by the text encoder of the model's base repository, and the latents are decoded last, by its VAE: of the three
models, only one of the large ones is loaded at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from mlaconvert.attention import AttentionMode
from mlaconvert.base import Base, find_base, open_base, require
from mlaconvert.cache import LatentCache
from mlaconvert.checkpoint import read_tensors
from mlaconvert.config import FEW_STEPS, SHIFT, StreamingConfig, WanConfig, default_video
from mlaconvert.convert import resolve_device
from mlaconvert.data import save_shard
from mlaconvert.errors import ConfigError, InputError, OutputError, is_plain
from mlaconvert.evaluate import TINY_GUIDANCE, TINY_STEPS
from mlaconvert.families import Checkpoint, open_checkpoint
from mlaconvert.families.causal import SETTINGS, assumption_line
from mlaconvert.inputs import is_file, read_json
from mlaconvert.marks import MARK, digests, read_mark
from mlaconvert.model import WanModel, load_model
from mlaconvert.pictures import SCALE, can_write_mp4, contact_sheet, remove_unfinished, save_movie
from mlaconvert.plan import public_name
from mlaconvert.rollout import Images, Sampler, passes, rollout
from mlaconvert.staging import Staging, claim, disk_errors, write_whole
from mlaconvert.text import embed_texts, free_memory
from mlaconvert.tiny.clips import CAPTION, CAPTION_LEN, VOCABULARY, embed_captions, null_context
from mlaconvert.vae import Vae

LATENTS_NAME = "latents.safetensors"
REPORT_NAME = "generation.json"
SHEET_NAME = "frames.png"
FPS = 16  # of Wan2.1 and the tiny model
# Euler steps and guidance that Wan's own code takes by default, for models that were not distilled to few steps.
WAN_STEPS, WAN_GUIDANCE = 50, 5.0
VBENCH_SAMPLES = 5
_LONGEST_NAME = 255  # bytes of a file name
_NOTE = "progress.json"
_SAMPLES = 16  # values of a matrix that stand for it
_OF_ONE = {"seed", "conditioning", "prompt", "prompts_begin"}  # settings in which the videos of a folder may differ
_KEPT = "finished frames are kept: the same command goes on from them"

Movie = Literal["auto", "gif", "mp4", "none"]
MOVIES = (".mp4", ".gif")  # endings that make an output a single file
# progress(stage, done, total, note): "text" counts prompts, "generate" passes through the model, "decode" latent frames
Progress = Callable[[str, int, int, str], None]


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
class Text:
    """Embedded prompts: a context [1, T, text_dim] of each and of the negative one, and the words they come from."""

    contexts: tuple[Tensor, ...]
    negative: Tensor | None
    words: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
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

    def sample(self, number: int) -> Plan:
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
            "inputs": hashlib.sha256(b"".join(_raw(tensor) for tensor in given if tensor is not None)).hexdigest(),
            **({} if self.words is None else {"text": dict(self.words)}),
        }


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


def plan_generation(wanted: Generation, config: WanConfig, *, row: int | None = None, text: Text | None = None) -> Plan:
    """Check a `Generation` against a model and fill its defaults in. Raises ConfigError or InputError.

    With `row`, only that one of the prompts is shown. `text` has the prompts of a model without captions of its own.
    """
    video = default_video(config)
    pixels = config.out_dim == 3
    fps = 24 if config.out_dim == 48 else FPS  # Wan2.2 5B, known by its VAE
    if wanted.seconds is not None:
        frames = max(1, round(wanted.seconds * fps / video.frame_stride))
    else:
        frames = wanted.frames or (60 if pixels else 21)
    size = []
    for name, value, patch in (
        ("height", wanted.height or video.height, config.patch_size[1]),
        ("width", wanted.width or video.width, config.patch_size[2]),
    ):
        if value % (video.vae_stride * patch):
            raise ConfigError(f"{name} is {value} pixels: give a multiple of {video.vae_stride * patch}")
        size.append(value // video.vae_stride)
    streaming = dataclasses.replace(config.streaming or StreamingConfig(), **_given_settings(wanted))
    contexts, empty = _contexts(wanted, config) if text is None else (list(text.contexts), text.negative)
    if row is not None:
        contexts = [contexts[row]]
    steps, scale = (TINY_STEPS, TINY_GUIDANCE) if pixels else (WAN_STEPS, WAN_GUIDANCE)
    few_step = config.few_step if wanted.few_step is None else wanted.few_step
    many = wanted.steps or (None if few_step or wanted.timesteps is not None else steps)
    guidance = wanted.guidance if wanted.guidance is not None else (scale if many and empty is not None else 1.0)
    sampler = (
        Sampler.many_step(many, shift=wanted.shift, guidance=guidance)
        if many
        else Sampler.few_step(wanted.timesteps or FEW_STEPS, shift=wanted.shift, guidance=guidance)
    )
    if guidance != 1 and empty is None:
        raise InputError(
            f"guidance {guidance} needs the embedding of an empty prompt: put null_context [1, T, {config.text_dim}] "
            "into the embeddings file, or take guidance 1"
        )
    prefix, images = _given(wanted, config, frames, size)
    return Plan(
        frames=frames,
        size=(size[0], size[1]),
        stride=video.frame_stride,
        fps=fps,
        streaming=streaming,
        sampler=sampler,
        seeds=tuple(range(wanted.seed, wanted.seed + wanted.samples)),
        schedule=tuple(
            (start, context.expand(wanted.samples, -1, -1))
            for start, context in zip(
                _starts(wanted, len(contexts), frames, fps / video.frame_stride), contexts, strict=True
            )
        ),
        null_context=empty,
        prefix=prefix,
        images=images,
        has_pixels=pixels,
        words=None if text is None else text.words,
    )


def _given_settings(wanted: Generation) -> dict[str, Any]:
    """The settings of `StreamingConfig` that replace the model's own."""
    return {name: getattr(wanted, name) for name in SETTINGS if getattr(wanted, name) is not None}


def _notes(checkpoint: Checkpoint, wanted: Generation) -> list[str]:
    """What a user should know of how the model is taken to see time and is sampled, a line each."""
    given, config = set(_given_settings(wanted)), checkpoint.config
    streaming = dataclasses.replace(config.streaming or StreamingConfig(), **_given_settings(wanted))
    few_step = config.few_step if wanted.few_step is None else wanted.few_step
    if wanted.few_step is not None or wanted.steps is not None or wanted.timesteps is not None:
        given.add("few_step")
    assumed = assumption_line(checkpoint.timing, streaming=streaming, few_step=few_step, given=given, how="generate")
    notes = [*checkpoint.timing.remarks, *([] if assumed is None else [assumed])]
    if few_step and wanted.steps is None and wanted.timesteps is None:
        schedule = ", ".join(f"{step:g}" for step in FEW_STEPS)
        notes.append(f"a few-step student: timesteps {schedule}, warped by shift {wanted.shift:g}")
    return notes


def generate(
    source: str | Path,
    output: str | Path,
    wanted: Generation | None = None,
    runtime: Runtime | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    movie: Movie = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> GenerationReport:
    """Generate videos by a dense or a converted model, into the new folder or movie file `output`.

    The folder gets `latents.safetensors` (`latents` [samples, C, F, H, W] in float32 and, with one prompt, its
    `context`), `generation.json`, and a movie for each sample: of models that work on RGB pixels always, with a contact
    sheet, of others when prompts, `wanted.base` or `movie` "mp4" ask for it, by the base's VAE. An `output` that ends
    in .mp4 or .gif is the movie alone. An interrupted run leaves its finished chunks in `.<output>.partial`, and the
    same call continues them: one pass a chunk, and the same video. `say` is told what is assumed of the model because
    neither its files nor `wanted` state it, and of a few-step schedule. Raises OutputError for an output that exists,
    and what `plan_generation`, `open_checkpoint`, `find_base` and `rollout` raise.
    """
    wanted, runtime, target = wanted or Generation(), runtime or Runtime(), Path(output)
    staging = Staging(target, "generate", overwrite=overwrite, inside="video")
    movie = _check_target(staging, wanted, movie)
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "state_key": state_key}
    with open_checkpoint(source, **place, config=config) as checkpoint:
        geometry, notes = checkpoint.config, _notes(checkpoint, wanted)
    if say is not None:
        for note in notes:
            say(note)
    if geometry.out_dim == 3 or not wanted.prompts:
        plan_generation(wanted, geometry)  # what is wrong shows before anything large is read
    needs_base = bool(wanted.prompts) or movie in ("mp4", "gif")
    base = _base(source, wanted, geometry, needs_base, revision, subfolder)
    vae = None if base is None or movie == "none" else _vae(base, geometry, movie)
    text = None if base is None or not wanted.prompts else _embed(base, wanted, geometry, runtime, progress)
    model = runtime.load(source, **place, config=config)
    plan = plan_generation(wanted, model.config, text=text)
    settings = {"source": str(source), **place, "weights": _fingerprint(model), "dtype": str(model.dtype)}
    settings |= plan.settings()
    with _ChunkFile.open(staging, plan, model.config, settings) as store:
        resumed, started = store.done, time.monotonic()
        cache_bytes = _run(model, plan, runtime, store, progress)
        elapsed = time.monotonic() - started
        del model
        free_memory()
        files = [LATENTS_NAME]
        if vae is not None:
            files += _decode(store.latents, staging.content, plan, vae.to(runtime.device), progress)
        elif plan.has_pixels and movie != "none":
            files += _pictures(store.latents, staging.content, plan.seeds, _ending(movie))
        report = GenerationReport(
            output=target,
            files=(target.name,) if target.suffix in MOVIES else (*files, REPORT_NAME),
            frames=plan.frames,
            resumed_frames=resumed,
            video_seconds=plan.frames * plan.stride / plan.fps,
            elapsed=elapsed,
            video_fps=len(plan.seeds) * (plan.frames - resumed) * plan.stride / elapsed,
            cache_bytes=cache_bytes,
            settings=settings,
        )
        with disk_errors(target, _KEPT):
            for path in staging.content.iterdir():  # of a run that was killed, or wanted other movies
                if path.name not in files:
                    path.unlink()
            _write_json(staging.content / REPORT_NAME, report.to_json())
            staging.publish(files[1] if target.suffix in MOVIES else None)
    return report


def generate_for_vbench(
    source: str | Path,
    output: str | Path,
    prompts: Sequence[str],
    wanted: Generation | None = None,
    runtime: Runtime | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """One video for every prompt and sample in the folder `output`, named "{prompt}-{index}.mp4".

    That is how VBench and VBench-Long look for a prompt's videos; both score five a prompt, index 0 to 4. Each file
    appears whole and holds a mark of the settings that made it. Files that are there already, made with these settings,
    are left alone, so an interrupted run continues; with `overwrite` others are made again. Files of earlier versions
    have no mark and are left alone, which `say` is told. The prompts are embedded by the base's text encoder, or are
    the rows of `wanted.embeddings`, in order; then, without `wanted.base`, models that do not work on RGB pixels leave
    "{prompt}-{index}.safetensors" with `latents` [1, C, F, H, W].

    Returns all files. Raises InputError for a prompt that cannot be a file name, OutputError for files of another model
    or other settings, and what `generate` raises.
    """
    wanted, runtime, folder = wanted or Generation(samples=VBENCH_SAMPLES), runtime or Runtime(), Path(output)
    if wanted.prompts:
        raise ConfigError("the prompts come from their own list; leave prompts out")
    for number, prompt in enumerate(prompts, 1):
        _check_prompt_name(prompt, number, prompts)
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "state_key": state_key, "config": config}
    with open_checkpoint(source, **place) as checkpoint:
        geometry, notes = checkpoint.config, _notes(checkpoint, wanted)
        dtype = runtime.chosen_dtype() or checkpoint.info("patch_embedding.weight").dtype
        shared: dict[str, Any] = {"model": _fingerprint_of(checkpoint), "dtype": str(dtype)}
    if say is not None:
        for note in notes:
            say(note)
    base = _base(source, wanted, geometry, wanted.embeddings is None, revision, subfolder)
    if geometry.out_dim == 3 and not can_write_mp4():
        raise InputError("VBench's file names end in .mp4, which needs an encoder: pip install 'mlaconvert[video]'")
    vae = None if base is None else _vae(base, geometry, "mp4")
    embedded = base if wanted.embeddings is None else None
    if base is not None:
        shared["base"] = public_name(base.source)
    plans = [_prompt_plan(wanted, geometry, prompts, number, embedded) for number in range(len(prompts))]
    ending = ".safetensors" if geometry.out_dim != 3 and vae is None else ".mp4"
    files = [[folder / f"{prompt}-{i}{ending}" for i in range(wanted.samples)] for prompt in prompts]
    marks = {
        path: digests(shared | _own_settings(plan.sample(i)))
        for plan, paths in zip(plans, files, strict=True)
        for i, path in enumerate(paths)
    }
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with claim(folder, "generate"):
        left = _not_made(folder, ending, marks, overwrite, say or (lambda _: None))
        missing = [number for number, paths in enumerate(files) if not left.isdisjoint(paths)]
        if missing and embedded is not None:
            chosen = dataclasses.replace(wanted, prompts=tuple(prompts[number] for number in missing))
            text = _embed(embedded, chosen, geometry, runtime, progress, one_each=True)
            for row, number in enumerate(missing):
                plans[number] = plan_generation(wanted, geometry, row=row, text=text)
        if missing:
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            model = runtime.load(source, **place)
        count = _Counter(sum(_passes(plans[number], runtime) for number in missing), progress)
        for number in missing:
            plan = plans[number]
            chunks = list(_chunks(model, plan, runtime, plan.prefix, count))
            videos = torch.cat([chunk.cpu() for chunk in chunks], 2)
            for video, path in zip(videos, files[number], strict=True):
                if path in left:
                    with disk_errors(folder, "whole videos are kept: the same command goes on from them"):
                        _write_marked(video, path, plan, vae and vae.to(runtime.device), json.dumps(marks[path]))
    return [path for paths in files for path in paths]


def _write_marked(video: Tensor, path: Path, plan: Plan, vae: Vae | None, mark: str) -> None:
    """Write one video [C, F, H, W] as a movie, or as latents, with what it was made with. Raises OSError."""
    if vae is None and not plan.has_pixels:
        save_shard(path, {"latents": video[None]}, {MARK: mark})
    else:
        frames = video.unbind(1) if vae is None else vae.decode(video.unbind(1))
        scale = SCALE if vae is None else 1
        save_movie(frames, path, fps=plan.fps, scale=scale, comment=f"{MARK} {mark}")


def _own_settings(plan: Plan) -> dict[str, Any]:
    """What one video depends on besides the model and its base, by a name for the user."""
    settings = plan.settings()
    words = settings.pop("text", {})
    return settings | {
        "seed": settings.pop("seeds"),
        "conditioning": settings.pop("inputs"),
        "prompt": words.get("prompts"),
        "negative prompt": words.get("negative"),
    }


def _not_made(
    folder: Path, ending: str, marks: Mapping[Path, Mapping[str, str]], overwrite: bool, say: Callable[[str], None]
) -> set[Path]:
    """The files of `marks` that are to be made: not there, or with `overwrite` made with other settings.

    Raises OutputError for a file in the folder that was made with other settings, of whatever prompt.
    """
    left = {path for path in marks if not path.is_file()}
    unknown, ours = 0, next(iter(marks.values()), {})
    if folder.is_dir():
        remove_unfinished(folder)
    for path in sorted(folder.glob(f"*{ending}")):
        mark = read_mark(path)
        if path not in marks:  # another prompt's: only what all prompts share is compared
            expected = {name: ours[name] for name in ours if name not in _OF_ONE}
            changed = [] if mark is None else [name for name in expected if mark.get(name) != expected[name]]
            if changed:
                raise OutputError(f"{path} was made with another {changed[0]}; delete it, or choose another folder")
        elif mark is None:
            unknown += 1
            left |= {path} if overwrite else set()
        elif changed := sorted(name for name in mark.keys() | marks[path] if mark.get(name) != marks[path].get(name)):
            if not overwrite:
                raise OutputError(
                    f"{path} was made with another {changed[0]}; choose another folder, or pass --overwrite to make "
                    "such videos again"
                )
            left.add(path)
    if unknown and not overwrite:
        say(
            f"{unknown} videos in {folder} do not say what made them, as earlier versions left them: they are kept; "
            "--overwrite makes them again"
        )
    return left


# --- inputs --------------------------------------------------------------------------------------------------------


def _contexts(wanted: Generation, config: WanConfig) -> tuple[list[Tensor], Tensor | None]:
    """The prompts' contexts [1, T, text_dim], and that of an empty prompt."""
    if wanted.embeddings is not None:
        tensors = read_tensors(wanted.embeddings, ("context", "null_context"))
        if "context" not in tensors:
            raise InputError(f"{wanted.embeddings}: no tensor 'context'; expected [prompts, T, {config.text_dim}]")
        for name, tensor in tensors.items():
            fits = tensor.ndim == 3 and tensor.shape[2] == config.text_dim and len(tensor) > 0
            if not fits or not 0 < tensor.shape[1] <= config.text_len:
                raise InputError(
                    f"{wanted.embeddings}: {name} is {list(tensor.shape)}; expected "
                    f"[prompts, 1 to {config.text_len}, {config.text_dim}]"
                )
        empty = tensors.get("null_context")
        return list(tensors["context"].split(1)), None if empty is None else empty[:1]
    if config.out_dim != 3 or null_context().shape[2] != config.text_dim:
        raise InputError(
            "this model needs text embeddings: give a prompt, or --embeddings FILE, a safetensors file with context "
            f"[prompts, T, {config.text_dim}]"
        )
    captions = wanted.prompts or ("large red disc right, sky",)
    return [embed_captions(caption_tokens(caption)) for caption in captions], null_context()


def _base(
    source: str | Path,
    wanted: Generation,
    config: WanConfig,
    needed: bool,
    revision: str | None,
    subfolder: str | None,
) -> Base | None:
    """The repository of the text encoder and the VAE, None when nothing asks for one."""
    if config.out_dim == 3:
        if wanted.base is not None:
            raise ConfigError("this model works on pixels and has its own captions; leave --base out")
        return None
    if wanted.base is not None:
        return open_base(wanted.base)
    return find_base(source, revision, subfolder) if needed else None


def _vae(base: Base, config: WanConfig, movie: Movie) -> Vae:
    """The VAE, on the CPU: what is wrong with it shows before hours of generating."""
    require("diffusers", "imageio_ffmpeg")
    if movie == "gif":
        raise ConfigError("a GIF would lie in memory as a whole; take --format mp4 for this model")
    vae = Vae.load(base)
    if vae.channels != config.out_dim:
        raise InputError(
            f"{base.source}: its VAE has {vae.channels} latent channels, the model {config.out_dim}; "
            "give the repository of the model's own base with --base"
        )
    return vae


def _embed(
    base: Base,
    wanted: Generation,
    config: WanConfig,
    runtime: Runtime,
    progress: Progress | None,
    one_each: bool = False,
) -> Text:
    """Embed the prompts, and with guidance the negative one; everything else is checked before."""
    device = str(resolve_device(runtime.text_device or runtime.device, torch.float32))
    resolve_device(runtime.device, torch.float32)
    text = _unembedded(base, wanted, config, one_each=one_each)
    guided = text.negative is not None
    texts = [*wanted.prompts, *([wanted.negative] if guided else [])]
    found: list[Tensor] = []
    for embedding in embed_texts(base, texts, device=device, max_tokens=config.text_len):
        if embedding.shape[1] != config.text_dim:
            raise InputError(
                f"{base.source}: its text encoder gives {embedding.shape[1]} channels, the model takes "
                f"{config.text_dim}; give the repository of the model's own base with --base"
            )
        found.append(embedding[None].float())
        if progress is not None:
            progress("text", len(found), len(texts), "")
    contexts, negative = found[: len(wanted.prompts)], found[-1] if guided else None
    return dataclasses.replace(text, contexts=tuple(contexts), negative=negative)


def _unembedded(base: Base, wanted: Generation, config: WanConfig, *, one_each: bool = False) -> Text:
    """The words, with zeros for their embeddings: enough to plan, and to check everything else."""
    blank = torch.zeros(1, 1, config.text_dim)
    words = {"base": base.source, "prompts": list(wanted.prompts)}
    text = Text(contexts=(blank,) * len(wanted.prompts), negative=blank, words=words)
    if plan_generation(wanted, config, row=0 if one_each else None, text=text).sampler.guidance == 1:
        return dataclasses.replace(text, negative=None)
    return dataclasses.replace(text, words=words | {"negative": wanted.negative})


def _starts(wanted: Generation, prompts: int, frames: int, rate: float) -> list[int]:
    """The latent frame at which each prompt begins; `rate` is latent frames a second."""
    if wanted.switch is None:
        starts = [frames * i // prompts for i in range(prompts)]
    elif len(wanted.switch) != prompts - 1:
        raise ConfigError(f"{prompts} prompts switch {prompts - 1} times, not {len(wanted.switch)}")
    else:
        starts = [0, *(round(second * rate) for second in wanted.switch)]
    if any(a >= b for a, b in zip(starts, [*starts[1:], frames], strict=True)):
        raise ConfigError(
            f"the prompts would begin at latent frames {starts} of {frames}; let the switches ascend within the video"
        )
    return starts


def _given(wanted: Generation, config: WanConfig, frames: int, size: Sequence[int]) -> tuple[Tensor | None, Images]:
    """The prefix [samples, C, F, H, W] and the image conditioning of the file `wanted.given`."""
    extra = config.in_dim - config.out_dim
    tensors = {} if wanted.given is None else read_tensors(wanted.given, ("latents", "image_latents", "image_features"))
    where = wanted.given
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
        if tensor.ndim != dims.count(",") + 2 or tensor.shape[0] not in (1, wanted.samples) or not fits(tensor.shape):
            raise InputError(f"{where}: {name} is {list(tensor.shape)}; expected {shapes[name]} (or one a sample)")
    if extra and "image_latents" not in tensors:
        raise InputError(
            f"an image-to-video model needs image_latents {shapes['image_latents']} in a safetensors file: "
            "give it with --given FILE"
        )
    prefix = tensors.get("latents")
    if prefix is not None:
        prefix = prefix.expand(wanted.samples, -1, -1, -1, -1)
    return prefix, Images(latents=tensors.get("image_latents"), features=tensors.get("image_features"))


def _check_prompt_name(prompt: str, number: int, prompts: Sequence[str]) -> None:
    longest = len(f"{prompt}-00.safetensors".encode())
    if "/" in prompt or not is_plain(prompt) or not prompt.strip() or longest > _LONGEST_NAME:
        raise InputError(
            f"prompt {number} cannot be a file name: {prompt[:60]!r}; leave out slashes and control codes, shorten it"
        )
    if prompts.index(prompt) != number - 1:
        raise InputError(f"prompt {number} is there twice: {prompt[:60]!r}")


def _prompt_plan(
    wanted: Generation, config: WanConfig, prompts: Sequence[str], number: int, embedded: Base | None
) -> Plan:
    """The plan of one prompt of a list; with `embedded`, the base of the text encoder, before it is embedded."""
    if wanted.embeddings is None:
        alone = dataclasses.replace(wanted, prompts=(prompts[number],))
        text = None if embedded is None else _unembedded(embedded, alone, config)
        return plan_generation(alone, config, text=text)
    rows = len(_contexts(wanted, config)[0])
    if rows != len(prompts):
        raise InputError(f"{wanted.embeddings}: context has {rows} rows for {len(prompts)} prompts; give one a prompt")
    return plan_generation(wanted, config, row=number)


# --- running -------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts passes through the model for a progress bar, and the video frames that came out of them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.frames, self.started = 0, time.monotonic()

    def step(self) -> None:
        self.done += 1
        self.show()

    def show(self) -> None:
        if self.progress is not None:
            rate = self.frames / (time.monotonic() - self.started)
            self.progress("generate", self.done, self.total, f"{rate:.3g} frames/s" if self.frames else "")


def _passes(plan: Plan, runtime: Runtime, given: int | None = None) -> int:
    """How often the model runs for a plan of which `given` frames are only read."""
    if given is None:
        given = 0 if plan.prefix is None else plan.prefix.shape[2]
    slices = -(-len(plan.seeds) // (runtime.slice_size or len(plan.seeds)))
    return passes(plan.frames, plan.sampler, plan.streaming, given=given, slices=slices)


def _chunks(model: WanModel, plan: Plan, runtime: Runtime, prefix: Tensor | None, count: _Counter) -> Iterator[Tensor]:
    given, start = 0 if prefix is None else prefix.shape[2], 0
    for chunk in rollout(
        model,
        plan.schedule,
        frames=plan.frames,
        height=plan.size[0],
        width=plan.size[1],
        sampler=plan.sampler,
        seed=plan.seeds,
        null_context=plan.null_context,
        prefix=prefix,
        images=plan.images,
        streaming=plan.streaming,
        slice_size=runtime.slice_size,
        on_step=count.step,
    ):
        start += chunk.shape[2]
        if start > given:
            count.frames += len(chunk) * chunk.shape[2] * plan.stride
            count.show()
        yield chunk


def _run(model: WanModel, plan: Plan, runtime: Runtime, store: _ChunkFile, progress: Progress | None) -> int:
    """Generate what the file lacks; the bytes of the cache that it takes."""
    if store.done < plan.frames:
        prefix = store.latents[:, :, : store.done] if store.done else plan.prefix
        count = _Counter(_passes(plan, runtime, 0 if prefix is None else prefix.shape[2]), progress)
        start = 0
        for chunk in _chunks(model, plan, runtime, prefix, count):
            if start >= store.done:
                store.write(start, chunk)
            start += chunk.shape[2]
    copies = 1 if plan.sampler.guidance == 1 else 2
    return LatentCache(
        model.config,
        batch=copies * len(plan.seeds),
        height=plan.size[0],
        width=plan.size[1],
        streaming=plan.streaming,
        dtype=model.dtype,
        device="meta",
    ).nbytes


# --- the output folder ---------------------------------------------------------------------------------------------


class _ChunkFile:
    """A safetensors file that is laid out at once and filled chunk by chunk, with a note of how far it is.

    Both lie in a staging folder that outlives an interrupted run. As a context manager, it leaves that folder as the
    next run wants it.
    """

    def __init__(self, staging: Staging, shape: tuple[int, ...], offset: int, settings: dict[str, Any], done: int):
        self._staging, self._settings, self.done = staging, settings, done
        self._map = np.memmap(staging.content / LATENTS_NAME, dtype="<f4", mode="r+", offset=offset, shape=shape)
        self.latents = torch.from_numpy(self._map)

    @classmethod
    def open(cls, staging: Staging, plan: Plan, config: WanConfig, settings: dict[str, Any]) -> _ChunkFile:
        """Take up what an interrupted run with the same settings left, or begin.

        Raises OutputError for one with other settings, unless the staging may overwrite; then it goes.
        """
        shape = (len(plan.seeds), config.out_dim, plan.frames, *plan.size)
        context = plan.schedule[0][1] if len(plan.schedule) == 1 else None
        header = _header(shape, None if context is None else tuple(context.shape))
        settings, needed = json.loads(json.dumps(settings)), 4 * math.prod(shape)
        try:
            done = _frames_left(staging, header, shape, settings)
        except OutputError:
            if not staging.overwrite:
                raise
            done = None
        _check_staging(staging, needed if done is None else 0)
        with disk_errors(staging.path):
            staging.open()
            try:
                if done is not None:
                    _move_earlier(staging, {"frames": done, "settings": settings})
                    return cls(staging, shape, len(header), settings, done)
                staging.clear()
                staging.content.mkdir()
                with (staging.content / LATENTS_NAME).open("wb") as file:
                    file.write(header)
                    file.seek(needed, os.SEEK_CUR)
                    file.write(b"" if context is None else _raw(context))
                    file.truncate(max(file.tell(), len(header) + needed))
                made = cls(staging, shape, len(header), settings, 0)
                made._write_note()
                return made
            except BaseException:
                staging.close() if done else staging.remove()
                raise

    def write(self, start: int, chunk: Tensor) -> None:
        """Put a chunk [N, C, f, H, W] at frame `start` and note it once it is on the disk."""
        with disk_errors(self._staging.path, _KEPT):
            self.latents[:, :, start : start + chunk.shape[2]] = chunk.float().cpu()
            self._map.flush()
            self.done = start + chunk.shape[2]
            self._write_note()

    def _write_note(self) -> None:
        _write_json(self._staging.folder / _NOTE, {"frames": self.done, "settings": self._settings})

    def __enter__(self) -> _ChunkFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.done:
            self._staging.close()
        else:  # nothing to take up
            self._staging.remove()


def _frames_left(staging: Staging, header: bytes, shape: Sequence[int], settings: dict[str, Any]) -> int | None:
    """How many frames of this video an interrupted run left, None when there is nothing to go on from.

    Raises OutputError for frames of another video, or damaged ones.
    """
    left = staging.left()
    note = _read_note(staging.folder / _NOTE) if _NOTE in left else None
    if not left - {_NOTE} or (_NOTE not in left and staging.content.is_dir()):
        return None  # killed before it began, or when all was in place
    if _NOTE not in left:  # earlier versions took the note away before they put a finished video in place
        report = _read_note(staging.folder / REPORT_NAME)
        note = None if report is None else {"frames": shape[2], "settings": report["settings"]}
    if note is None or note["settings"] != settings:
        raise OutputError(
            f"{staging.folder} is an unfinished video with other settings; delete it, repeat its settings, "
            "or pass --overwrite"
        )
    places = [folder / LATENTS_NAME for folder in (staging.folder, staging.content)]
    path, frames = next((path for path in places if is_file(path)), None), note["frames"]
    if path is None or path.stat().st_size < len(header) + 4 * math.prod(shape):
        frames = None
    elif path is not None:
        with path.open("rb") as file:
            frames = frames if file.read(len(header)) == header else None
    if type(frames) is not int or not 0 <= frames <= shape[2]:
        raise OutputError(f"{staging.folder} is a damaged unfinished video; delete it, or pass --overwrite")
    return frames


def _move_earlier(staging: Staging, note: Mapping[str, Any]) -> None:
    """Move what earlier versions kept beside the note to where it belongs now, the latents last. Raises OSError."""
    left = sorted(staging.left() - {_NOTE, staging.content.name}, key=lambda name: name == LATENTS_NAME)
    if left:
        _write_json(staging.folder / _NOTE, note)
        staging.content.mkdir(exist_ok=True)
        for name in left:
            (staging.folder / name).replace(staging.content / name)


def _header(latents: tuple[int, ...], context: tuple[int, ...] | None) -> bytes:
    """Header of a safetensors file with `latents` and perhaps `context`, both float32."""
    entries, end = {}, 0
    for name, shape in (("latents", latents), ("context", context)):
        if shape is not None:
            begin, end = end, end + 4 * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def _fingerprint_of(checkpoint: Checkpoint) -> str:
    """Tells weights apart without reading all: whole biases and norms, and a few values of every larger tensor."""
    found = hashlib.sha256()
    for name in sorted(checkpoint.names):
        tensor = checkpoint.read(name).reshape(-1)
        step = 1 if len(checkpoint.info(name).shape) < 2 else max(1, len(tensor) // _SAMPLES)
        found.update(f"{name} {list(checkpoint.info(name).shape)} ".encode() + _raw(tensor[::step]))
    return found.hexdigest()


def _fingerprint(model: WanModel) -> str:
    """Tells weights apart by their biases and norms, which every training and conversion changes."""
    return hashlib.sha256(b"".join(_raw(p) for p in model.parameters() if p.ndim == 1)).hexdigest()


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = read_json(path)
    except InputError:
        return None
    return note if {"frames", "settings"} <= note.keys() else None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


def _pictures(latents: Tensor, folder: Path, seeds: Sequence[int], ending: str) -> list[str]:
    """A movie of each sample and a contact sheet of all."""
    names = [f"video-{seed}{ending}" for seed in seeds]
    for video, name in zip(latents, names, strict=True):
        save_movie(video.unbind(1), folder / name, fps=FPS)
    contact_sheet([latents]).save(folder / SHEET_NAME)
    return [*names, SHEET_NAME]


def _decode(latents: Tensor, folder: Path, plan: Plan, vae: Vae, progress: Progress | None) -> list[str]:
    """A movie of each sample by the VAE, frame by frame; those of an interrupted run are kept."""
    names = [f"video-{seed}.mp4" for seed in plan.seeds]
    total = len(names) * plan.frames

    def counted(number: int) -> Iterator[Tensor]:
        for i, frame in enumerate(latents[number].unbind(1)):
            if progress is not None:
                progress("decode", number * plan.frames + i, total, "")
            yield frame

    for number, name in enumerate(names):
        if not (folder / name).exists():
            with disk_errors(folder, _KEPT):
                save_movie(vae.decode(counted(number)), folder / name, fps=plan.fps, scale=1)
        if progress is not None:
            progress("decode", (number + 1) * plan.frames, total, "")
    return names


def _ending(movie: Movie) -> str:
    return ".mp4" if movie == "mp4" or (movie == "auto" and can_write_mp4()) else ".gif"


def _check_target(staging: Staging, wanted: Generation, movie: Movie) -> Movie:
    """Refuse an output that cannot be written; the kind of movie, which a file's ending decides."""
    target = staging.path
    if target.suffix in MOVIES:
        ending = cast(Movie, target.suffix[1:])
        if movie not in ("auto", ending):
            raise ConfigError(f"{target} says {ending}, and --format {movie}; leave one of them out")
        if wanted.samples > 1:
            raise ConfigError(f"{target} is one movie, and {wanted.samples} samples are several; give a folder")
        movie = ending
    _check_staging(staging, 0)
    if movie == "mp4" and not can_write_mp4():
        raise InputError("MP4 needs an encoder: pip install 'mlaconvert[video]', or take --format gif")
    return movie


def _check_staging(staging: Staging, needed: int) -> None:
    """Raise OutputError when the output cannot be written, or has no room for `needed` bytes."""
    if staging.path.suffix in MOVIES:
        if staging.target.is_dir():
            raise OutputError(f"{staging.path} exists and is a folder; choose another path for a movie")
        staging.check(needed, kind="video", replaceable=Path.is_file)
    else:
        staging.check(needed, kind="video", replaceable=_is_video)


def _is_video(folder: Path) -> bool:
    """Whether a folder may be overwritten as a generated video."""
    return (folder / REPORT_NAME).is_file()
