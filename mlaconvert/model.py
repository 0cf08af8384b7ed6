"""The Wan video diffusion transformer: bidirectional or chunk-causal, dense or with latent attention.

Parameter names are those of the published Wan checkpoints. Shapes: B batch, C channels, F latent frames, H and W latent
pixels, D model width, T text tokens.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.attention import (
    AttentionMode,
    AttentionPlan,
    DenseAttention,
    LatentAttention,
    RMSNorm,
    attend,
)
from mlaconvert.cache import LatentCache, LayerCache
from mlaconvert.checkpoint import check_finite
from mlaconvert.config import StreamingConfig, WanConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.families import Checkpoint, open_checkpoint
from mlaconvert.rope import rotary


class CrossAttention(nn.Module):
    """Attention to the text and, in Wan2.1 image-to-video, to CLIP image tokens in front of it."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.has_image = config.image_dim is not None
        if self.has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, config.eps)

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values [B, T, H, D] of the text [B, T, D], then those of image tokens [B, I, D] if there are any."""
        heads = (self.num_heads, -1)
        found = (self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads))
        if not self.has_image or image is None:
            return found
        return (
            *found,
            self.norm_k_img(self.k_img(image)).unflatten(-1, heads),
            self.v_img(image).unflatten(-1, heads),
        )

    def forward(self, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """[B, N, D] and the keys and values of `project` -> [B, N, D]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        out = attend(q, memory[0], memory[1], None)
        if len(memory) > 2:
            out = out + attend(q, memory[2], memory[3], None)
        return self.o(out.flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; timesteps modulate the first and the last."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        mla = config.mla.layers[layer] if config.mla else None
        self.self_attn: DenseAttention | LatentAttention = (
            DenseAttention(config) if mla is None or config.mla is None else LatentAttention(config, config.mla, mla)
        )
        self.cross_attn = CrossAttention(config)
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def attention_input(self, x: Tensor, modulation: Tensor) -> Tensor:
        """What self-attention reads of x [B, N, D]: the modulated LayerNorm. `modulation` [B, F or 1, 6, D]."""
        shift, scale, _, _, _, _ = (modulation + self.modulation).unbind(-2)
        return _modulate(self.norm1(x), shift, scale)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        image: Tensor | None,
        plan: AttentionPlan,
        cache: LayerCache | None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. Text and image are read from the cache where it holds them."""
        attended = self.self_attn(self.attention_input(x, modulation), plan, cache)
        remembered = cache.text if cache is not None and not torch.is_grad_enabled() else ()
        return self.complete(x, attended, modulation, remembered or self.cross_attn.project(text, image))

    def trace(
        self, x: Tensor, modulation: Tensor, text: Tensor, image: Tensor | None, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What self-attention reads, what it makes of that, and the block's output without a cache: [B, N, D] each."""
        inputs = self.attention_input(x, modulation)
        attended = self.self_attn(inputs, plan)
        return inputs, attended, self.complete(x, attended, modulation, self.cross_attn.project(text, image))

    def complete(self, x: Tensor, attended: Tensor, modulation: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """The block after self-attention, whose output is `attended` [B, N, D]: each token on its own.

        `memory` is `CrossAttention.project`'s of the text.
        """
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = (modulation + self.modulation).unbind(-2)
        x = x + _gate(attended, gate)
        x = x + self.cross_attn(self.norm3(x), memory)
        return x + _gate(self.ffn(_modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)


class Head(nn.Module):
    """Modulated projection of tokens to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, N, D], [B, F or 1, D] -> [B, N, patch]."""
        shift, scale = (embedding.unsqueeze(-2) + self.modulation).unbind(-2)
        return self.head(_modulate(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """Maps CLIP image features [B, I, image_dim] to the model's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.image_dim or 0
        self.proj = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class Prepared(NamedTuple):
    """Inputs of the blocks and of the head; `grid` is F x H x W tokens."""

    x: Tensor  # [B, N, D]
    grid: tuple[int, int, int]
    embedding: Tensor  # [B, F or 1, D]
    modulation: Tensor  # [B, F or 1, 6, D]
    text: Tensor  # [B, T, D]
    image: Tensor | None  # [B, I, D]
    plan: AttentionPlan


class WanModel(nn.Module):
    """Predicts the flow-matching velocity (noise - data) of video latents.

    A model whose config has `streaming` is causal between chunks; without a cache it sees a whole clip in one masked
    pass. `config.mla` decides layer by layer between dense and latent attention.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.attention_mode: AttentionMode = "auto"
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = Head(config)
        mla = [layer for layer in config.mla.layers if layer is not None] if config.mla else []
        self._pairs = {layer.component_pairs for layer in mla}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        image_latents: Tensor | None = None,
        image_features: Tensor | None = None,
        chunks: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        start_frame: int = 0,
    ) -> Tensor:
        """Velocity [B, out_dim, F, H, W] of `latents` [B, C, F, H, W].

        `timestep` [B] or [B, F] runs from 0 (clean) to 1000 (noise). `context` [B, T, text_dim] is padded with zeros
        to text_len. `image_latents` [B, in_dim - C, F, H, W] are concatenated to the latents (image-to-video),
        `image_features` [B, I, image_dim] come from CLIP.

        With a `cache`, `latents` are one chunk that begins at `start_frame`. Without one, a streaming model masks the
        clip by `chunks`, frames per chunk (the config's chunk size by default), at absolute frame positions, which
        equals streaming as long as the clip fits into the window.

        Raises InputError when shapes do not fit the model.
        """
        p = self.prepare(
            latents,
            timestep,
            context,
            image_latents=image_latents,
            image_features=image_features,
            chunks=chunks,
            cache=cache,
            start_frame=start_frame,
        )
        x = p.x
        for i, block in enumerate(self.blocks):
            x = block(x, p.modulation, p.text, p.image, p.plan, cache.layers[i] if cache is not None else None)
        return self.finish(x, p)

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile; layers of one shape share the code.

        Worth it where a model runs for long: each new window length compiles again, which takes minutes. Raises
        ConfigError when there is no C++ compiler (CPU) or no Triton (GPU).
        """
        if self.patch_embedding.weight.device.type == "cpu":
            if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
                raise ConfigError("compiling for a CPU needs a C++ compiler (g++ or clang++); install one, or do not")
        elif importlib.util.find_spec("triton") is None:
            raise ConfigError("compiling for a GPU needs triton: pip install triton, or do not compile")
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * (len(self._pairs) + 2))
        LayerCache.stay_uncompiled()
        for block in self.blocks:
            block.compile(dynamic=False)

    def finish(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Velocity from the last block's output [B, N, D]."""
        return self._unpatch(self.head(x, prepared.embedding), prepared.grid)

    def prepare(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        image_latents: Tensor | None = None,
        image_features: Tensor | None = None,
        chunks: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        start_frame: int = 0,
    ) -> Prepared:
        """What `forward` computes before the first block; its arguments are `forward`'s."""
        x, grid = self.embed_patches(latents, image_latents)
        embedding, modulation = self.embed_time(timestep, x.shape[0], grid[0])
        text, image = self._condition(context, image_features, cache)
        return Prepared(
            x=x,
            grid=grid,
            embedding=embedding,
            modulation=modulation,
            text=text,
            image=image,
            plan=self.attention_plan(grid, x.device, chunks=chunks, cache=cache, start_frame=start_frame),
        )

    def attention_plan(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        *,
        chunks: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        start_frame: int = 0,
    ) -> AttentionPlan:
        """Rotations, mask and cache slots for F x H x W = `grid` tokens."""
        frames, height, width = grid
        split, dtype = self.config.rope_split, torch.float64 if self.dtype == torch.float64 else torch.float32
        if cache is not None:
            if height * width != cache.tokens_per_frame:
                raise InputError(
                    f"frames have {height * width} tokens, the cache was made for {cache.tokens_per_frame}; "
                    "make a cache for this height and width"
                )
            window = cache.begin(start_frame, frames)
            plan: AttentionPlan | None = cache.plan
            if plan is None or plan.window is not window or plan.mode != self.attention_mode:
                for block in self.blocks:
                    if isinstance(block.self_attn, LatentAttention):
                        block.self_attn.refresh()
                queries, keys = (
                    rotary(positions, height, width, split, dtype)
                    for positions in (window.query_frames, window.key_frames)
                )
                plan = AttentionPlan(
                    query_rotary=queries,
                    key_rotary=keys,
                    window=window,
                    mode=self.attention_mode,
                    turns={pairs: (queries.select(pairs), keys.select(pairs)) for pairs in self._pairs},
                )
                cache.plan = plan
            return plan
        turn = rotary(torch.arange(frames, device=device), height, width, split, dtype)
        mask = None
        if self.config.streaming is not None or chunks is not None:
            visible = chunk_mask(chunks or default_chunks(frames, self.config.streaming), self.config.streaming)
            if visible.shape[0] != frames:
                raise InputError(
                    f"chunks {list(chunks or ())} add up to {visible.shape[0]} frames, the clip has {frames}"
                )
            if not visible.all():
                mask = visible.repeat_interleave(height * width, 0).repeat_interleave(height * width, 1).to(device)
        return AttentionPlan(query_rotary=turn, key_rotary=turn, mask=mask, mode=self.attention_mode)

    def embed_patches(self, latents: Tensor, image_latents: Tensor | None) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens [B, N, D] and the grid F x H x W of `latents` [B, C, F, H, W] with any `image_latents` appended."""
        x = latents if image_latents is None else torch.cat((latents, image_latents.to(latents)), 1)
        patch = self.config.patch_size
        if x.ndim != 5 or x.shape[1] != self.config.in_dim:
            raise InputError(
                f"the model reads [B, {self.config.in_dim}, F, H, W] latents (with any image latents), "
                f"not {list(x.shape)}"
            )
        if any(size % p for size, p in zip(x.shape[2:], patch, strict=True)):
            raise InputError(f"latents of {list(x.shape[2:])} do not divide into patches of {list(patch)}")
        # A convolution whose stride is its kernel is one matrix product over patches.
        x = x.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B, F, H, W, C, patch]
        weight = self.patch_embedding.weight.flatten(1)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        return F.linear(x.flatten(4).flatten(1, 3).to(weight.dtype), weight, self.patch_embedding.bias), grid

    def embed_time(self, timestep: Tensor, batch: int, frames: int) -> tuple[Tensor, Tensor]:
        """The embedding [B, F or 1, D] and the six modulations [B, F or 1, 6, D]."""
        t = timestep[:, None] if timestep.ndim == 1 else timestep
        if t.shape not in ((batch, 1), (batch, frames)):
            raise InputError(f"timestep must be [{batch}] or [{batch}, {frames}], not {list(timestep.shape)}")
        embedding = self.time_embedding(timestep_embedding(t, self.config.freq_dim).to(self.dtype))
        return embedding, self.time_projection(embedding).unflatten(-1, (6, -1))

    def _condition(
        self, context: Tensor, image_features: Tensor | None, cache: LatentCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Text [B, T, D] and image tokens [B, I, D]; a cache remembers what its layers make of them.

        A prompt is known by its tensors: the same objects, unchanged, are the same prompt. Nothing is remembered where
        gradients may be wanted.
        """
        if torch.is_grad_enabled():
            cache = None
        given = tuple(part for part in (context, image_features) if part is not None)
        versions = tuple(0 if part.is_inference() else part._version for part in given)
        if cache is not None and cache.prompt:
            known, were, text, image = cache.prompt
            if len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True)) and were == versions:
                return text, image
        text = self.embed_text(context)
        image = self.img_emb(image_features.to(self.dtype)) if image_features is not None else None
        if cache is not None:
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                layer.text = block.cross_attn.project(text, image) if cache.keeps_text else ()  # type: ignore[operator, union-attr]
            cache.prompt = (given, versions, text, image)
        return text, image

    def embed_text(self, context: Tensor) -> Tensor:
        """[B, T, text_dim] -> [B, text_len, D]."""
        missing = self.config.text_len - context.shape[1]
        if context.ndim != 3 or context.shape[2] != self.config.text_dim or missing < 0:
            raise InputError(
                f"context must be [B, up to {self.config.text_len}, {self.config.text_dim}], not {list(context.shape)}"
            )
        return self.text_embedding(F.pad(context.to(self.dtype), (0, 0, 0, missing)))

    def _unpatch(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        patch = self.config.patch_size
        x = x.unflatten(1, grid).unflatten(-1, (*patch, self.config.out_dim))  # [B, F, H, W, pf, ph, pw, C]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift with [B, N, D] and per-frame [B, F or 1, D]."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), frames, 1 + scale.unsqueeze(2)).flatten(1, 2)


def _gate(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids [..., dim] of a timestep [...], cosines first, computed in float64."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double().unsqueeze(-1) * 10000.0**-exponent
    return torch.cat((angle.cos(), angle.sin()), -1)


def default_chunks(frames: int, streaming: StreamingConfig | None) -> list[int]:
    """Frames of each chunk of a clip; the last one may be shorter."""
    size = (streaming or StreamingConfig()).chunk_frames
    return [min(size, frames - start) for start in range(0, frames, size)]


def chunk_mask(chunks: Sequence[int], streaming: StreamingConfig | None) -> Tensor:
    """Which frame sees which, bool [F, F]: its own chunk, the sink, and the most recent frames of the window."""
    streaming = streaming or StreamingConfig()
    end = torch.repeat_interleave(torch.tensor(chunks).cumsum(0), torch.tensor(chunks))[:, None]
    frame = torch.arange(len(end))
    oldest = end - (streaming.window_frames - streaming.sink_frames)
    return (frame < end) & ((frame < streaming.sink_frames) | (frame >= oldest))


def load_model(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    streaming: StreamingConfig | None = None,
) -> WanModel:
    """The model of a checkpoint, dense or converted: built on the meta device, filled strictly, frozen.

    `source` is anything that `open_checkpoint` reads, or a checkpoint that is open already. `dtype` None keeps the
    file's, or the widest of several. `streaming` replaces the checkpoint's own setting. Raises what `open_checkpoint`
    raises, and CheckpointError for a NaN.
    """
    opened = (
        nullcontext(source)
        if isinstance(source, Checkpoint)
        else open_checkpoint(source, revision=revision, subfolder=subfolder)
    )
    with opened as checkpoint:
        config = replace(checkpoint.config, streaming=streaming) if streaming else checkpoint.config
        with torch.device("meta"):
            model = WanModel(config)
        # A file may mix dtypes; a model computes in one.
        dtype = dtype or reduce(torch.promote_types, {checkpoint.info(name).dtype for name in checkpoint.names})
        state = {}
        for name in checkpoint.names:
            tensor = checkpoint.read(name)
            check_finite(tensor, checkpoint.info(name).name, checkpoint.store.path)
            state[name] = tensor.to(device, dtype)
        model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()
