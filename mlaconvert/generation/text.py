"""Prompts as the model reads them: captions of the built-in model, or embedded by the base's text encoder."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mlaconvert.base.repository import Base, find_base, open_base, require
from mlaconvert.base.text import embed_texts
from mlaconvert.base.vae import Vae
from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.families.source import AnySource
from mlaconvert.generation.plan import EmbeddedPrompts, unembedded
from mlaconvert.generation.request import Generation, Movie, Runtime
from mlaconvert.model.device import resolve_device
from mlaconvert.progress import Counter, Progress


def find_text_base(source: AnySource, request: Generation, config: WanConfig, needed: bool) -> Base | None:
    """The repository of the text encoder and the VAE, None when nothing asks for one."""
    if config.works_on_pixels:
        if request.base is not None:
            raise ConfigError("this model works on pixels and has its own captions; leave --base out")
        return None
    if request.base is not None:
        return open_base(request.base)
    return find_base(source) if needed else None


def load_vae(base: Base, config: WanConfig, movie: Movie) -> Vae:
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


def embed_prompts(
    base: Base,
    request: Generation,
    config: WanConfig,
    runtime: Runtime,
    progress: Progress,
    one_each: bool = False,
) -> EmbeddedPrompts:
    """Embed the prompts, and with guidance the negative one; everything else is checked before."""
    device = str(resolve_device(runtime.text_device or runtime.device, torch.float32))
    resolve_device(runtime.device, torch.float32)
    text = unembedded(base, request, config, one_each=one_each)
    guided = text.negative is not None
    texts = [*request.prompts, *([request.negative] if guided else [])]
    embeddings: list[Tensor] = []
    count = Counter(progress, "text", len(texts))
    count.show()
    for embedding in embed_texts(base, texts, device=device, max_tokens=config.text_len):
        if embedding.shape[1] != config.text_dim:
            raise InputError(
                f"{base.source}: its text encoder gives {embedding.shape[1]} channels, the model takes "
                f"{config.text_dim}; give the repository of the model's own base with --base"
            )
        embeddings.append(embedding[None].float())
        count.step()
    contexts, negative = embeddings[: len(request.prompts)], embeddings[-1] if guided else None
    return dataclasses.replace(text, contexts=tuple(contexts), negative=negative)
