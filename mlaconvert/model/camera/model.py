"""The transformer: a prompt is read once, a past is remembered once a chunk, and a chunk runs at every timestep.

Shapes: C channels, F latent frames, H and W latent pixels, T tokens of text, D model width. One video at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.config.camera import CameraConfig
from mlaconvert.errors import InputError
from mlaconvert.model.blocks import ImageEmbedding
from mlaconvert.model.camera.attention import Cached
from mlaconvert.model.camera.blocks import CameraBlock, CameraHead
from mlaconvert.model.camera.text import GlyphEmbedding, TextEmbedding, TimeEmbedding
from mlaconvert.model.camera.turns import Cameras, Turns
from mlaconvert.model.rope import rotary

Text = tuple[tuple[Tensor, Tensor], ...]
"""What a prompt is to each layer: keys and values [1, T, H, d]."""


class Frames(NamedTuple):
    """Latent frames that a pass is made of, and what is known of each."""

    latents: Tensor
    """[1, in_dim, F, H, W]: noisy or clean latents, then those of the first image and their mask."""
    timesteps: Tensor
    """[F]"""
    actions: Tensor
    """[F], the number of the action that led there; 0 for none."""
    cameras: Cameras
    """F of them."""


@dataclass(frozen=True)
class Past:
    """Frames that were run once and are seen by the chunks after them, each layer's as it caches them."""

    layers: tuple[Cached, ...]
    turns: Turns

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.turns.image_of_world)

    @property
    def nbytes(self) -> int:
        """Measured bytes of what is cached."""
        return sum(part.nbytes for layer in self.layers for part in layer)


class CameraModel(nn.Module):
    """A transformer of two streams, dense or converted; see `mlaconvert.config.camera.CameraConfig`."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, config.patch_size)
        self.time_embedding, self.action_embedding = TimeEmbedding(config), TimeEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        self.glyph_embedding = None if config.glyph_dims is None else GlyphEmbedding(config)
        self.img_emb = None if config.image_dim is None else ImageEmbedding(config)
        self.type_embedding = nn.Embedding(3, config.dim) if config.token_types else None
        self.blocks = nn.ModuleList(CameraBlock(config, layer) for layer in range(config.num_layers))
        self.head = CameraHead(config)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.patch_embedding.weight.dtype

    def read(self, states: Tensor, *, letters: Tensor | None = None, image: Tensor | None = None) -> Text:
        """A prompt, which a video has one of: its text encoder's `states` [1, T, text_dim], without padding.

        `letters` [1, G, glyph_dims[0]] are the byte encoder's of what is to be written, `image` [1, I, image_dim] the
        vision encoder's of the first image; None, or of no tokens, for none. Raises InputError for another shape, and
        for what the model does not read.
        """
        config = self.config
        given: tuple[tuple[str, Tensor | None, nn.Module | None, int], ...] = (
            ("states", states, self.text_embedding, config.text_dim),
            ("letters", letters, self.glyph_embedding, (config.glyph_dims or (0,))[0]),
            ("image", image, self.img_emb, config.image_dim or 0),
        )
        parts = []
        for kind, (name, tokens, embedding, width) in enumerate(given):
            if tokens is None or (tokens.ndim == 3 and not tokens.shape[1] and kind):
                continue
            if embedding is None:
                raise InputError(f"{name} are given, and the model reads none; leave them out")
            if tokens.ndim != 3 or len(tokens) != 1 or not tokens.shape[1] or tokens.shape[2] != width:
                raise InputError(f"{name} must be [1, tokens, {width}], not {list(tokens.shape)}")
            made = embedding(tokens.to(self.dtype))
            parts.append(made if self.type_embedding is None else made + self.type_embedding.weight[kind])
        x = torch.cat(parts[::-1], 1)  # image, letters, text
        time = F.silu(self.time_embedding(torch.zeros(1))).unsqueeze(0)
        text = []
        for block in self.blocks:
            assert isinstance(block, CameraBlock)
            x, seen = block.read(x, time)
            text.append(seen)
        return tuple(text)

    def remember(self, frames: Frames, text: Text) -> Past:
        """Run `frames`, which see each other and the text, and cache what later frames are to see of them.

        Raises InputError for another shape.
        """
        tokens, time, turns = self._embed(frames, 0)
        layers = []
        for block, seen in zip(self.blocks, text, strict=True):
            tokens, cached = block(tokens, time, turns, seen, None, keep=True)
            layers.append(cached)
        return Past(tuple(layers), turns)

    def forward(self, frames: Frames, text: Text, past: Past | None = None) -> Tensor:
        """The velocity [1, out_dim, F, H, W] of `frames`, which see each other, the text and the past before them.

        Raises InputError for another shape.
        """
        tokens, time, turns = self._embed(frames, 0 if past is None else past.frames)
        for i, (block, seen) in enumerate(zip(self.blocks, text, strict=True)):
            tokens, _ = block(tokens, time, turns, seen, None if past is None else (past.layers[i], past.turns))
        _, rows, columns = self.config.patch_size
        _, _, count, height, width = frames.latents.shape
        made = self.head(tokens, time).unflatten(-1, (-1, rows, columns))
        made = made.unflatten(1, (count, height // rows, width // columns))  # [1, F, h, w, C, rows, columns]
        return made.permute(0, 4, 1, 2, 5, 3, 6).flatten(-2).flatten(-3, -2)

    def _embed(self, frames: Frames, start: int) -> tuple[Tensor, Tensor, Turns]:
        """Tokens [1, N, D], each frame's time [1, F, D] after its SiLU, and turns of frames from `start` on."""
        self._check(frames)
        grid = self.patch_embedding(frames.latents.to(self.dtype))
        time = F.silu(self.time_embedding(frames.timesteps) + self.action_embedding(frames.actions))
        count, height, width = grid.shape[2:]
        positions = torch.arange(start, start + count, device=grid.device)
        turn = rotary(positions, height, width, self.config.rope_split, theta=self.config.rope_theta)
        return grid.flatten(2).mT, time.unsqueeze(0), Turns.of(turn, frames.cameras)

    def _check(self, frames: Frames) -> None:
        """Raise InputError for shapes that do not fit the model, or each other, and for cameras without a lens."""
        config, shape = self.config, frames.latents.shape
        _, rows, columns = config.patch_size
        if (
            len(shape) != 5
            or shape[:2] != (1, config.in_dim)
            or not all(shape[2:])
            or shape[3] % rows
            or shape[4] % columns
        ):
            raise InputError(
                f"latents must be [1, {config.in_dim}, F, H, W] with H and W in multiples of {rows} and {columns}, "
                f"not {list(shape)}"
            )
        count = shape[2]
        for name, given, expected in (
            ("timesteps", frames.timesteps, (count,)),
            ("actions", frames.actions, (count,)),
            ("viewmats", frames.cameras.viewmats, (count, 4, 4)),
            ("intrinsics", frames.cameras.intrinsics, (count, 3, 3)),
        ):
            if tuple(given.shape) != expected:
                raise InputError(f"{name} must be {list(expected)} for {count} latent frames, not {list(given.shape)}")
        lengths = frames.cameras.intrinsics.diagonal(dim1=-2, dim2=-1)[:, :2]
        if not (lengths.isfinite() & (lengths != 0)).all():
            raise InputError(f"intrinsics have focal lengths {lengths.tolist()}; give finite numbers other than 0")
