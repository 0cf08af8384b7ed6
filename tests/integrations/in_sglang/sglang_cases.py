"""What tests of the SGLang package run, with the stand-in and with SGLang itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from wan_base import save_base
from wan_diffusers import reference

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model

TEXT = 40
STREAMING = StreamingConfig(chunk_frames=3, window_frames=7, sink_frames=1, positions="window")
FRAMES, HEIGHT, WIDTH = 12, 6, 10  # latent; four chunks, so that the window evicts
TOKENS = 15  # of a frame
# Two latent layers of 10 scalars and a dense one of 128, in float32 and in bfloat16.
CACHE_BYTES = {4: 7 * TOKENS * (10 + 128 + 10) * 4, 2: 7 * TOKENS * (10 + 128 + 10) * 2}
SHIPPED: dict[str, Any] = {"latent": (3, 24), "width": 32, "text": (8, 32)}  # a request to the built-in model
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def make_dense(folder: Path, **changes: Any) -> Path:
    """A dense transformer of random weights, bidirectional."""
    sizes: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 16}
    reference(**sizes | {"text_dim": TEXT} | changes).save_pretrained(folder)
    return folder


def make_converted(folder: Path, source: Path, **changes: Any) -> Path:
    """Its conversion to stream, of the transformer alone or of a whole repository; the second layer is left dense."""
    recipe: dict[str, Any] = {"layers": "0,2", "key_norm": "token", "rope": "latent", "streaming": STREAMING}
    convert(source, folder, ConvertRecipe(init="svd", **recipe | changes))
    return folder


def make_base(folder: Path) -> Path:
    """A repository of diffusers' around a dense transformer."""
    save_base(folder, text_dim=TEXT)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UniPCMultistepScheduler"}')
    make_dense(folder / "transformer")
    return folder


def request(
    seed: int, *, width: int = WIDTH, latent: tuple[int, int] = (16, HEIGHT), text: tuple[int, int] = (512, TEXT),
    **changes: Any,
) -> Any:  # fmt: skip
    """A request as it reaches the denoising stage; `latent` are channels and height, `text` tokens and channels."""
    generator, (channels, height) = torch.Generator().manual_seed(seed), latent
    given: dict[str, Any] = {
        "latents": torch.randn(1, channels, FRAMES, height, width, generator=generator),
        "prompt_embeds": [torch.randn(1, *text, generator=generator)],
        "generator": generator,
        **dict.fromkeys(("image_latent", "session", "scheduler", "prompt_attention_mask")),
        **dict.fromkeys(("do_classifier_free_guidance", "is_warmup", "report_progress"), False),
        "extra": {},
    }
    return SimpleNamespace(**given | changes)


@torch.no_grad()
def expected(folder: Path, asked: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a four-step student makes of `request(...)`, which is used up: our model and cache, the sampler longhand."""
    model, noise = load_model(folder, dtype=dtype), asked.latents
    _, channels, _, height, width = noise.shape
    cache = LatentCache(model.config, batch=1, height=height, width=width, dtype=dtype)
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    made = []
    for start in range(0, FRAMES, 3):
        x = noise[:, :, start : start + 3]
        for i, sigma in enumerate(sigmas):
            times = torch.tensor([1000 * sigma])
            flow = model(x.to(dtype), times, asked.prompt_embeds[0], cache=cache, start_frame=start)
            clean = x - sigma * flow
            if i < 3:
                fresh = torch.randn((1, 3, channels, height, width), generator=asked.generator).transpose(1, 2)
                x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * fresh
        model(clean.to(dtype), torch.zeros(1), asked.prompt_embeds[0], cache=cache, start_frame=start)
        made.append(clean)
    return torch.cat(made, 2)
