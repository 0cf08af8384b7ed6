"""Wan's VAE, frame by frame: video never lies in memory as a whole.

Its convolutions are causal and remember the last frames they saw, so a video is decoded one latent frame at a time and
encoded four frames at a time, with the same result as in one piece. Latents are normalised, as the transformer sees
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.base.repository import Base, damaged, require
from mlaconvert.errors import CheckpointError, MLAConvertError
from mlaconvert.files.find import open_store


class Vae:
    """diffusers' `AutoencoderKLWan` in float32, with `channels` latent channels and the strides of one latent pixel.

    `frame_stride` video frames become one latent frame, but for the first, which stands alone.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.channels: int = model.config.z_dim
        self.stride: int = model.config.scale_factor_spatial
        self.frame_stride: int = model.config.scale_factor_temporal
        self._mean, self._std = (
            torch.tensor(values).view(-1, 1, 1, 1) for values in (model.config.latents_mean, model.config.latents_std)
        )

    @classmethod
    def load(cls, base: Base) -> Vae:
        """From a base repository. Raises InputError without diffusers, CheckpointError for damaged files."""
        require("diffusers")
        from diffusers import AutoencoderKLWan

        path = base.vae()
        try:
            if path.is_file():
                model = _from_native(path)
            else:
                model = AutoencoderKLWan.from_pretrained(
                    path, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
                )
        except MLAConvertError:
            raise
        except Exception as error:  # each kind of damage raises its own
            raise damaged(path, "a Wan VAE", error) from None
        return cls(model.eval().requires_grad_(False))

    def to(self, device: str) -> Vae:
        """This VAE, moved to a device."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Video frames [3, H, W] in [-1, 1] on the CPU, of normalised latent frames [C, h, w].

        The first latent frame gives one video frame, each further one `frame_stride`. What is held does not depend on
        the length.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        self.model.clear_cache()
        memory = self.model._feat_map  # of each convolution, the last frames that it saw
        for i, latent in enumerate(latents):
            with torch.inference_mode():
                z = latent[:, None].to(self._mean) * self._std + self._mean
                x = self.model.decoder(
                    self.model.post_quant_conv(z[None]), feat_cache=memory, feat_idx=[0], first_chunk=i == 0
                )
                if self.model.config.patch_size is not None:
                    x = unpatchify(x, patch_size=self.model.config.patch_size)
                frames = x[0].clamp(-1, 1).cpu()
            yield from frames.unbind(1)

    def encode(self, frames: Iterable[Tensor]) -> Tensor:
        """Normalised latents [C, F, h, w], float32 on the CPU, of video frames [3, H, W] in [-1, 1].

        They are the posterior's mean. 1 + (F - 1) * `frame_stride` frames are read, and further ones that do not
        fill a latent frame are left out; only `frame_stride` of them are held at a time.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        self.model.clear_cache()
        memory, latents = self.model._enc_feat_map, []
        for piece in _pieces(frames, self.frame_stride):
            with torch.inference_mode():
                x = piece[None].to(self._mean)
                if self.model.config.patch_size is not None:
                    x = patchify(x, patch_size=self.model.config.patch_size)
                posterior = self.model.quant_conv(self.model.encoder(x, feat_cache=memory, feat_idx=[0]))
                latents.append(((posterior[0, : self.channels] - self._mean) / self._std).cpu())
        return torch.cat(latents, 1).clone()


def _pieces(frames: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The first frame alone [3, 1, H, W], then `size` at a time."""
    held: list[Tensor] = []
    needed = 1
    for frame in frames:
        held.append(frame)
        if len(held) == needed:
            yield torch.stack(held, 1)
            held, needed = [], size


def _from_native(path: Path) -> Any:
    """diffusers' VAE with the weights of Wan2.1's own file; its width is that of the first convolution."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with open_store(path) as store:
        first = store.tensors.get("encoder.conv1.weight")
        if first is None:
            raise CheckpointError(f"{path}: no tensor 'encoder.conv1.weight', so it is no VAE of Wan2.1")
        model = AutoencoderKLWan(base_dim=first.shape[0])
        state = {name: store.read(name).float() for name in store.tensors}
        model.load_state_dict(convert_wan_vae_to_diffusers(state))
    return model
