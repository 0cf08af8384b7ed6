"""What position and camera do to the queries, keys and values of a pass.

PRoPE ("Cameras as Relative Positional Encoding", arXiv 2507.10496): with P the matrix that takes the world to a frame's
image, every four channels of a query are multiplied by P^T, those of keys and values by P^-1, and those of the output
by P. So what a query sees of another video token depends on the way between their cameras alone. Keys and values of
the text are not turned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlaconvert.model.rope import Rotary, rotate


class Cameras(NamedTuple):
    """From where each of F latent frames is seen."""

    viewmats: Tensor
    """[F, 4, 4], from the world to the camera: a rotation and a shift."""
    intrinsics: Tensor
    """[F, 3, 3]; their focal lengths count, on the diagonal and in units of the image's width and height."""


class Turns(NamedTuple):
    """How a pass of F frames of n tokens turns heads [B, F n, H, d]: by position, and by camera.

    Each method gives both.
    """

    rotary: Rotary  # of F n tokens
    image_of_world: Tensor  # [F, 4, 4]
    world_of_image: Tensor  # [F, 4, 4]

    @classmethod
    def of(cls, rotary: Rotary, cameras: Cameras) -> Turns:
        """Turns of tokens with this `rotary` and of the frames of `cameras`."""
        view, lens = (matrix.to(rotary.cos.device, rotary.cos.dtype) for matrix in cameras)
        scale = torch.ones_like(view[:, 0])
        scale[:, 0], scale[:, 1] = lens[:, 0, 0], lens[:, 1, 1]
        back = torch.zeros_like(view)
        back[:, :3, :3] = view[:, :3, :3].mT
        back[:, :3, 3] = -(back[:, :3, :3] @ view[:, :3, 3:]).squeeze(-1)
        back[:, 3, 3] = 1
        return cls(rotary, scale[:, :, None] * view, back / scale[:, None, :])

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries."""
        return rotate(q, self.rotary), _by_frame(q, self.image_of_world.mT)

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys."""
        return rotate(k, self.rotary), _by_frame(k, self.world_of_image)

    def values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of values, which no position turns."""
        return v, _by_frame(v, self.world_of_image)

    def outputs(self, by_position: Tensor, by_camera: Tensor) -> tuple[Tensor, Tensor]:
        """Of what attention made of values."""
        return by_position, _by_frame(by_camera, self.image_of_world)


def _by_frame(x: Tensor, matrices: Tensor) -> Tensor:
    """`x` [B, F n, H, d] with every four channels multiplied by the matrix [4, 4] of their frame, of [F, 4, 4]."""
    parts = x.unflatten(1, (len(matrices), -1)).unflatten(-1, (-1, 4))
    return torch.einsum("fij,bfnhgj->bfnhgi", matrices.to(x.dtype), parts).flatten(-2).flatten(1, 2)
