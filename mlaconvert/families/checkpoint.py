"""A recognised checkpoint: its tensors by canonical name, whatever the file's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.families.causal import Timing
from mlaconvert.families.classes import skyreels_fields
from mlaconvert.families.passengers import Passengers
from mlaconvert.families.protocol import Family, Layout
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.shipped import TINY
from mlaconvert.files.store import TensorStore, check_finite
from mlaconvert.latent.weights import AttentionWeights


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A recognised checkpoint. Tensors are read by canonical name; use it as a context manager.

    `raw_config` is the source's config.json, or one in native fields made from the shapes. `names` maps canonical
    names to those in the files. `state_key` is the chosen top-level key of a pickle, None for a bare state dict.
    `timing` is what the files say of time, as it is in `config`, and what they leave to be assumed. `passengers` are
    the tensors that no Wan transformer has; `names` has them too, by their unwrapped name in the file.
    `notes` are lines on what was left out and how weights are decoded.
    """

    store: TensorStore
    family: Family
    config: WanConfig
    raw_config: dict[str, Any]
    layout: Layout
    state_key: str | None
    names: Mapping[str, str]
    timing: Timing = field(default_factory=Timing)
    passengers: Passengers = field(default_factory=Passengers)
    notes: tuple[str, ...] = ()

    @property
    def is_tiny(self) -> bool:
        """Whether it is the built-in model."""
        return TINY.resolve() in self.store.path.resolve().parents

    @property
    def dtype(self) -> torch.dtype:
        """That of the first weights, which is the one that activations have."""
        return self.info("patch_embedding.weight").dtype

    def read(self, canonical: str) -> torch.Tensor:
        """One tensor, lazily. Raises CheckpointError for a name that this model has not."""
        return self.store.read(self.names.get(canonical, canonical))

    def is_stored(self, canonical: str) -> bool:
        """Whether `read` gives just what the files hold under the tensor's name."""
        return canonical in self.names and self.store.is_plain(self.names[canonical])

    def info(self, canonical: str) -> TensorInfo:
        """Shape, dtype and size of one tensor; `name` is the one in the file. Raises KeyError for an unknown name."""
        return self.store.tensors[self.names[canonical]]

    def attention(self, layer: int) -> AttentionWeights:
        """Self-attention of a dense layer, checked to be finite, in the file's dtypes.

        Raises UnsupportedModelError when the layer is converted already, CheckpointError for a NaN.
        """
        prefix, camera = f"blocks.{layer}.self_attn.", f"blocks.{layer}.camera_o.weight"
        if prefix + "q.weight" not in self.names:
            raise UnsupportedModelError(
                f"{self.store.path}: layer {layer} has no dense self-attention (it is converted already, or not there)"
            )

        def finite(canonical: str) -> torch.Tensor:
            tensor = self.read(canonical)
            check_finite(tensor, self.names[canonical], self.store.path)
            return tensor

        def read(name: str) -> torch.Tensor:
            return finite(prefix + name)

        return AttentionWeights(
            q_weight=read("q.weight"),
            q_bias=read("q.bias"),
            k_weight=read("k.weight"),
            k_bias=read("k.bias"),
            v_weight=read("v.weight"),
            v_bias=read("v.bias"),
            o_weight=read("o.weight"),
            o_bias=read("o.bias"),
            norm_q=read("norm_q.weight"),
            norm_k=read("norm_k.weight"),
            camera_o=finite(camera) if camera in self.names else None,
        )

    def output_name(self, canonical: str, layout: Layout | None = None) -> str:
        """The unwrapped name in `layout` (None: the source's), for tensors that it has and for converted ones alike.

        Raises UnsupportedModelError for a passenger in another layout than the source's.
        """
        if canonical in self.passengers.names and self.family.canonical(canonical, "native") is None:
            if layout not in (None, self.layout):
                raise UnsupportedModelError(
                    f"{self.store.path}: {canonical!r} is not a Wan model's, so it has no name in the {layout} layout; "
                    f"keep the source's, {self.layout}"
                )
            return canonical
        return self.family.source(canonical, layout or self.layout)

    def check_runs(self) -> None:
        """Raise UnsupportedModelError unless the code here can roll the model out, calibrate it and heal it.

        With passengers only its own code can run it, and a model that is given cameras runs chunk by chunk alone.
        """
        dense = self.config.mla is None
        if isinstance(self.config, CameraConfig):
            raise UnsupportedModelError(
                f"{self.store.path}: it is given a camera for every frame, which no clips and prompts say; "
                "mlaconvert.load_camera_model runs its chunks"
                + (", and mlaconvert convert takes it with --init svd or random" if dense else "")
            )
        if self.passengers:
            raise UnsupportedModelError(
                f"{self.store.path}: the code here that runs models does not know all of this one "
                f"({self.passengers.describe()}); "
                + (
                    "convert it with --init svd or random, or with what mlaconvert.collect saw in its own code "
                    "(--moments DIR), and run it there with swap_attention"
                    if dense
                    else "run it in its own code with swap_attention"
                )
            )

    def output_config(self, layout: Layout | None = None) -> dict[str, Any]:
        """config.json in `layout`: the source's own as it is (None or its own layout), or in the other's fields."""
        if layout is None or layout == self.layout:
            return self.raw_config
        other = self.family.raw_config(self.config, layout) | skyreels_fields(self.raw_config, layout)
        return other | ({} if self.config.fps is None else {"fps": self.config.fps})

    def describe(self) -> str:
        """One line: family, layout, geometry, dtypes, parameters, and what it was wrapped in."""
        infos = [self.info(name) for name in self.names]
        dtypes = "+".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
        parameters = sum(info.nbytes // info.dtype.itemsize for info in infos)
        c = self.config
        parts = [
            f"{self.family.name} {c.model_type}, {self.layout} layout",
            f"{c.num_layers} layers x {c.dim} wide x {c.num_heads} heads",
            f"{dtypes}, {parameters:,} parameters",
        ]
        if self.state_key:
            parts.append(f"state key {self.state_key}")
        if c.streaming is not None:
            parts.append("streaming")
        if c.mla is not None:
            parts.append(f"{sum(layer is not None for layer in c.mla.layers)} MLA layers")
        return ", ".join(parts)

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
