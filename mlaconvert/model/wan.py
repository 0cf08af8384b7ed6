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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlaconvert.config.geometry import FPS_CHOICES, WanConfig
from mlaconvert.errors import ConfigError, InputError
from mlaconvert.model.attention.kernel import AttentionMode, AttentionPlan, Segment, by_token
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.blocks import Block, Head, ImageEmbedding
from mlaconvert.model.cache import LatentCache, Write, write_slots
from mlaconvert.model.conditions import (
    Conditions,
    Grid,
    check_conditions,
    check_timestep,
    reference_times,
    reference_tokens,
    timestep_embedding,
)
from mlaconvert.model.rope import rotary
from mlaconvert.model.window import chunk_mask, default_chunks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Prepared(NamedTuple):
    """Inputs of the blocks and of the head; `grid` is F x H x W tokens, those of a reference among them."""

    x: Tensor  # [B, N, D]
    grid: Grid
    embedding: Tensor  # [B, F or 1, D]
    modulation: Tensor  # [B, F or 1, 6, D]
    text: Tensor  # [B, T, D]
    image: Tensor | None  # [B, I, D]
    plan: AttentionPlan
    references: int = 0  # the first frames of the grid, which are no part of the video


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
        self._write: Write = write_slots
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.fps is not None:
            self.fps_embedding = nn.Embedding(FPS_CHOICES, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.ref_conv: nn.Conv2d | None = None
        if config.reference_dim is not None:
            self.ref_conv = nn.Conv2d(config.reference_dim, dim, config.patch_size[1:], config.patch_size[1:])
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
        chunks: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        start_frame: int = 0,
        **conditions: Unpack[Conditions],
    ) -> Tensor:
        """Velocity [B, out_dim, F, H, W] of `latents` [B, C, F, H, W].

        `timestep` [B], [B, F] or [B, tokens of the latents] runs from 0 (clean) to 1000 (noise). `context`
        [B, T, text_dim] is padded with zeros to text_len. `conditions` are those of `Conditions`: `image_latents`
        [B, in_dim - C, F, H, W] are concatenated to the latents (image-to-video), `image_features` [B, I, image_dim]
        come from CLIP, and a `reference` [B, reference_dim, H, W] is read with a whole clip, without a cache or chunks.

        With a `cache`, `latents` are one chunk that begins at `start_frame`. Without one, a streaming model masks the
        clip by `chunks`, frames per chunk (the config's chunk size by default), at absolute frame positions, which
        equals streaming as long as the clip fits into the window.

        Raises InputError when shapes do not fit the model.
        """
        p = self.prepare(
            latents,
            timestep,
            context,
            chunks=chunks,
            cache=cache,
            start_frame=start_frame,
            **conditions,
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
        # Compilers may turn writing in place into a copy of the whole buffer.
        self._write = torch.compiler.disable(write_slots)
        for block in self.blocks:
            block.compile(dynamic=False)

    def finish(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Velocity from the last block's output [B, N, D]."""
        frames, height, width = prepared.grid
        patches = self.head(x, prepared.embedding)[:, prepared.references * height * width :]
        return self._unpatch(patches, (frames - prepared.references, height, width))

    def prepare(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        chunks: Sequence[int] | None = None,
        cache: LatentCache | None = None,
        start_frame: int = 0,
        **conditions: Unpack[Conditions],
    ) -> Prepared:
        """What `forward` computes before the first block; its arguments are `forward`'s."""
        check_conditions(conditions)
        x, grid = self.embed_patches(latents, conditions.get("image_latents"))
        times, reference = check_timestep(timestep, x.shape[0], grid[0], math.prod(grid)), conditions.get("reference")
        if reference is not None:
            if cache is not None or chunks is not None or self.config.streaming is not None:
                raise InputError("a reference is read with a whole clip, not by a model that streams; leave it out")
            x = torch.cat((reference_tokens(self.config, self.ref_conv, reference, x.shape[0], grid), x), 1)
            times, grid = reference_times(times, grid), (grid[0] + 1, *grid[1:])
        embedding, modulation = self.embed_time(times, x.shape[0], times.shape[1])
        text, image = self._condition(context, conditions.get("image_features"), cache)
        return Prepared(
            references=int(reference is not None),
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
        grid: Grid,
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
                for layer in cache.layers:
                    layer.write = self._write
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
                    segments=(Segment(past=window.past),),
                    frame_tokens=height * width,
                )
                cache.plan = plan
            return plan
        turn = rotary(torch.arange(frames, device=device), height, width, split, dtype)
        mask: Tensor | None = None
        segments: tuple[Segment, ...] = ()
        if self.config.streaming is not None or chunks is not None:
            visible = chunk_mask(chunks or default_chunks(frames, self.config.streaming), self.config.streaming)
            if visible.shape[0] != frames:
                raise InputError(
                    f"chunks {list(chunks or ())} add up to {visible.shape[0]} frames, the clip has {frames}"
                )
            if not visible.all():
                mask, segments = by_token(visible.to(device), height * width)
        return AttentionPlan(
            query_rotary=turn,
            key_rotary=turn,
            mask=mask,
            mode=self.attention_mode,
            segments=segments,
            frame_tokens=height * width,
        )

    def embed_patches(self, latents: Tensor, image_latents: Tensor | None) -> tuple[Tensor, Grid]:
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
        """The embedding [B, F or 1, D] and the six modulations [B, F or 1, 6, D], the frame rate's among them."""
        t = check_timestep(timestep, batch, frames)
        embedding = self.time_embedding(timestep_embedding(t, self.config.freq_dim).to(self.dtype))
        modulation = self.time_projection(embedding)
        if self.config.fps is not None:
            modulation = modulation + self.fps_projection(self.fps_embedding.weight[self.config.fps_row])
        return embedding, modulation.unflatten(-1, (6, -1))

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

    def _unpatch(self, x: Tensor, grid: Grid) -> Tensor:
        patch = self.config.patch_size
        x = x.unflatten(1, grid).unflatten(-1, (*patch, self.config.out_dim))  # [B, F, H, W, pf, ph, pw, C]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def run_blocks(
    model: WanModel, prepared: Prepared, plans: Sequence[AttentionPlan] | None = None, *, checkpointing: bool = False
) -> Tensor:
    """Velocity, float32 [B, out_dim, F, H, W]; `plans` are each layer's own, else all layers share the prepared one.

    With `checkpointing`, activations inside a block are computed again on the way back.
    """
    p, x = prepared, prepared.x
    for i, block in enumerate(model.blocks):
        inputs = (x, p.modulation, p.text, p.image, p.plan if plans is None else plans[i], None)
        if checkpointing and torch.is_grad_enabled():
            # Nothing in a block draws random numbers.
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(*inputs)
    return model.finish(x, p).float()
