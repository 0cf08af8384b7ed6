"""Models with their weights, from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlaconvert.config.cache_dtype import CacheDtype
from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import opened
from mlaconvert.families.source import AnySource
from mlaconvert.files.store import check_finite
from mlaconvert.model.camera.model import CameraModel
from mlaconvert.model.wan import WanModel


class _Widened(nn.Linear):
    """A linear layer that keeps its weights in the file's dtype, mapped, and widens them while it runs."""

    @classmethod
    def like(cls, linear: nn.Linear) -> nn.Linear:
        """One to take the place of `linear`, without its weights."""
        if isinstance(linear, cls):
            return linear
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return made.requires_grad_(linear.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def load_tensors(
    module: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module its tensors, by the names that they have in it. Linear layers keep the file's dtype.

    Raises CheckpointError for a NaN.
    """
    state = {}
    for inside, name in names.items():
        tensor, owner = checkpoint.read(name), module.get_submodule(inside.rpartition(".")[0])
        check_finite(tensor, checkpoint.info(name).name, checkpoint.store.path)
        if isinstance(owner, nn.Linear) and tensor.dtype != dtype:
            module.set_submodule(inside.rpartition(".")[0], _Widened.like(owner))
            state[inside] = tensor.to(device)
        else:
            state[inside] = tensor.to(device, dtype)
    module.load_state_dict(state, strict=False, assign=True)


def load_widened(
    checkpoint: Checkpoint, streaming: StreamingConfig | None, device: torch.device | str = "cpu"
) -> WanModel:
    """A dense model that computes in float32 while its linear layers keep the file's dtype, on a CPU mapped from it."""
    checkpoint.check_runs()
    with torch.device("meta"):
        model = WanModel(dataclasses.replace(checkpoint.config, streaming=streaming))
    load_tensors(model, checkpoint, {name: name for name in checkpoint.names}, torch.device(device), torch.float32)
    return model.requires_grad_(False).eval()


def load_model(
    source: AnySource | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    streaming: StreamingConfig | None = None,
    cache_dtype: CacheDtype | None = None,
) -> WanModel:
    """The model of a checkpoint, dense or converted: built on the meta device, filled strictly, frozen.

    model = load_model("wan-mla", device="cuda", dtype=torch.bfloat16)
    velocity = model(latents, timesteps, context)  # [B, C, F, H, W] and [B] and [B, T, text_dim] to [B, C, F, H, W]

    `source` is anything that `open_checkpoint` reads, or a checkpoint that is open already. `dtype` None keeps the
    file's, or the widest of several. `streaming` replaces the checkpoint's own setting. `cache_dtype` narrows the cache
    of the past while the model runs. Raises what `open_checkpoint` raises, UnsupportedModelError for a model with
    passengers or with cameras (`load_camera_model`), CheckpointError for a NaN, and ConfigError for a `cache_dtype`
    beside a cache with bits of its own.
    """
    with opened(source) as checkpoint:
        checkpoint.check_runs()
        config = replace(checkpoint.config, streaming=streaming or checkpoint.config.streaming, cache_dtype=cache_dtype)
        with torch.device("meta"):
            model = WanModel(config)
        _fill(model, checkpoint, dtype, device)
    return model.requires_grad_(False).eval()


def load_camera_model(
    source: AnySource | Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> CameraModel:
    """The model of a checkpoint that is given a camera for every frame, dense or converted; else as `load_model`.

    model = load_camera_model("worldplay-mla", device="cuda", dtype=torch.bfloat16)
    text = model.read(states)  # a prompt's, which every pass sees; `mlaconvert.model.camera` says the rest

    Raises what `open_checkpoint` raises, UnsupportedModelError for a model of another kind, and CheckpointError for a
    NaN.
    """
    with opened(source) as checkpoint:
        if not isinstance(checkpoint.config, CameraConfig):
            raise UnsupportedModelError(f"{checkpoint.store.path}: it is given no cameras; load it with load_model")
        with torch.device("meta"):
            model = CameraModel(checkpoint.config)
        _fill(model, checkpoint, dtype, device)
    return model.requires_grad_(False).eval()


def _fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Give a model on the meta device its weights, strictly. Raises CheckpointError for a NaN."""
    # A file may mix dtypes; a model computes in one.
    dtype = dtype or reduce(torch.promote_types, {checkpoint.info(name).dtype for name in checkpoint.names})
    state = {}
    for name in checkpoint.names:
        if name in checkpoint.passengers.names:
            continue  # of a model that runs here, nothing reads them
        tensor = checkpoint.read(name)
        check_finite(tensor, checkpoint.info(name).name, checkpoint.store.path)
        state[name] = tensor.to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
