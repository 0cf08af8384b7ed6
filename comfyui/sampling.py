"""A rollout as ComfyUI wants it: its conditioning in, its latents out, with progress, previews and cancelling.

What is made, and how, is mlaconvert's: `plan_generation` plans it and `chunk_passes` runs it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import comfy.utils
import latent_preview
import torch
from comfy import model_management
from torch import Tensor

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.errors import InputError
from mlaconvert.generation.cost import cache_bytes, generation_bytes
from mlaconvert.generation.passes import PassCounter, chunk_passes, count_passes
from mlaconvert.generation.plan import EmbeddedPrompts, GenerationPlan, assumptions, plan_generation
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.model.memory import parameter_count
from mlaconvert.model.window import default_chunks
from mlaconvert.units import format_bytes

from .models import LoadedModel

Switch = tuple[int, Any]  # the chunk at which a prompt begins, and its CONDITIONING


def context_of(conditioning: Any, config: WanConfig) -> Tensor:
    """The embedding [1, T, text_dim] of a CONDITIONING. Raises InputError for one that is not a single prompt's."""
    if len(conditioning) != 1 or conditioning[0][0].shape[0] != 1:
        raise InputError("the conditioning combines several prompts; connect one, and others by MLA Prompt Switch")
    context: Tensor = conditioning[0][0]
    if context.ndim != 3 or context.shape[2] != config.text_dim:
        raise InputError(
            f"the conditioning has {context.shape[-1]} channels, the model takes {config.text_dim}; "
            + ("use MLA Caption" if config.works_on_pixels else "load its text encoder with CLIPLoader, type wan")
        )
    if context.shape[1] > config.text_len:
        raise InputError(f"the prompt has {context.shape[1]} tokens, the model reads {config.text_len}; shorten it")
    return context.float().cpu()


def plan_video(
    loaded: LoadedModel,
    request: Generation,
    *,
    positive: Any,
    negative: Any | None = None,
    later: Sequence[Switch] = (),
    length: int = 0,
) -> GenerationPlan:
    """Plan a video of at most `length` video frames (0: the model's usual length).

    Raises InputError for what does not fit the model, ConfigError for an impossible setting.
    """
    config = loaded.model.config
    if config.in_dim != config.out_dim:
        raise InputError("this is an image-to-video model, which this node does not run; take a text-to-video model")
    if length:
        request = dataclasses.replace(request, frames=(length - 1) // default_video(config).frame_stride + 1)
    empty = None if negative is None else context_of(negative, config)
    if empty is None and request.guidance not in (None, 1):
        raise InputError(f"cfg {request.guidance:g} needs a negative prompt; connect one, or set cfg to 1")
    text = EmbeddedPrompts(contexts=(context_of(positive, config),), negative=empty, words={})
    plan = plan_generation(request, config, text=text)
    if later:
        later = sorted(later, key=lambda switch: switch[0])
        chunks = default_chunks(plan.frames, plan.streaming)
        if len({chunk for chunk, _ in later}) < len(later) or not 0 < later[0][0] <= later[-1][0] < len(chunks):
            raise InputError(
                f"prompts are switched at chunks {[chunk for chunk, _ in later]}; this video has chunks 0 to "
                f"{len(chunks) - 1}, and one prompt begins at each from 1 on at most"
            )
        seconds = tuple(sum(chunks[:chunk]) * plan.stride / plan.fps for chunk, _ in later)
        contexts = (*text.contexts, *(context_of(conditioning, config) for _, conditioning in later))
        text = dataclasses.replace(text, contexts=contexts)
        plan = plan_generation(dataclasses.replace(request, switch=seconds), config, text=text)
    for line in assumptions(loaded.checkpoint, request):
        logging.info("mlaconvert: %s", line)
    return plan


def sample(loaded: LoadedModel, plan: GenerationPlan) -> Tensor:
    """Run a plan; the video's latents [samples, C, F, H, W] as ComfyUI's VAE takes them, float32.

    Progress counts passes through the model; the newest chunk is previewed, and between passes a cancel is heard.
    """
    model, device = loaded.model, loaded.patcher.load_device
    config, dtype, runtime = model.config, model.dtype, Runtime(device=str(device))
    weights = parameter_count(config) * dtype.itemsize
    needed = generation_bytes(config, plan, runtime, dtype) - weights
    model_management.load_models_gpu([loaded.patcher], memory_required=needed, force_full_load=True)
    total = count_passes(plan, runtime)
    logging.info(
        "mlaconvert: %d latent frames in %d passes, %d noise levels, guidance %g, cache %s",
        *(plan.frames, total, len(plan.sampler.timesteps), plan.sampler.guidance),
        format_bytes(cache_bytes(config, plan, dtype)),
    )
    bar = comfy.utils.ProgressBar(total)
    previewer = latent_preview.get_previewer(device, loaded.latent_format)

    def report(_stage: str, done: int, total: int, _note: str = "") -> None:
        model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    count, chunks = PassCounter(report, total), []
    for chunk in chunk_passes(model, plan, runtime, plan.prefix, count):
        chunks.append(chunk.to(model_management.intermediate_device(), torch.float32))
        if previewer is not None:
            newest = previewer.decode_latent_to_preview_image("JPEG", chunk[:, :, -1:])
            bar.update_absolute(count.done, total, newest)
    latents: Tensor = loaded.latent_format.process_out(torch.cat(chunks, 2))
    return latents
