"""As much of ComfyUI as its nodes use, written for the tests: what it calls, and what it keeps of what it is told."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_base import make_vae

PACKAGE = Path(__file__).parents[3] / "comfyui"


class Interrupted(BaseException):
    """What ComfyUI raises where it is asked whether a run was cancelled; no `except Exception` may swallow it."""


@dataclass
class Told:
    """What the nodes told ComfyUI; `cancel_after` so many questions it says that the run was cancelled."""

    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[Tensor] = field(default_factory=list)
    loaded: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    cancel_after: int | None = None
    asked: int = 0


@dataclass
class Slot:
    """An input or output of a node."""

    id: str | None = None
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    options: list[str] | None = None
    default: Any = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    control_after_generate: bool = False
    kind: str = ""


def io_type(kind: str) -> Any:
    """ComfyUI's type of that name, with its Input and Output."""
    inner = {name: staticmethod(lambda *args, **given: Slot(*args, **given, kind=kind)) for name in ("Input", "Output")}
    return type(kind, (), inner)


@dataclass
class Schema:
    """What a node says of itself."""

    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Slot]
    outputs: list[Slot]

    def named(self) -> dict[str | None, Slot]:
        """Its inputs by name."""
        return {slot.id: slot for slot in self.inputs}


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class LatentFormat:
    """ComfyUI's base class: latents are as the transformer sees them."""

    scale_factor = 1.0
    latent_rgb_factors: Any = None

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / self.scale_factor


def normalised_format(channels: int, mean: list[float], std: list[float]) -> type[LatentFormat]:
    """A format whose LATENT has the VAE's own values, of this mean and standard deviation for each channel."""

    class Format(LatentFormat):
        latent_rgb_factors = torch.zeros(channels, 3)

        def process_out(self, latent: Tensor) -> Tensor:
            scale, shift = (torch.tensor(values).view(1, channels, 1, 1, 1) for values in (std, mean))
            return latent * scale + shift

    return Format


class ModelPatcher:
    """Holds a model, and the devices that it is moved between."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


def install(patch: pytest.MonkeyPatch, models: Path) -> tuple[Any, Told]:
    """Put the stand-in in place of ComfyUI and load the nodes as it does; `models` is its folder of models."""
    told, cpu = Told(), torch.device("cpu")
    paths: dict[str, list[str]] = {"diffusion_models": [str(models / "unet"), str(models / "diffusion_models")]}

    def throw_exception_if_processing_interrupted() -> None:
        told.asked += 1
        if told.cancel_after is not None and told.asked > told.cancel_after:
            raise Interrupted

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            told.progress.append((value, total))

    class Previewer:
        def decode_latent_to_preview_image(self, kind: str, latent: Tensor) -> tuple[str, Tensor, int]:
            told.previews.append(latent)
            return kind, latent, 512

    def get_previewer(device: torch.device, latent_format: LatentFormat) -> Previewer | None:
        return None if latent_format.latent_rgb_factors is None else Previewer()

    vae = make_vae().config
    kinds = ("Combo", "String", "Int", "Float", "Conditioning", "Latent", "Image")
    io = {name: io_type(name.upper()) for name in kinds}
    io |= {"Custom": io_type, "Schema": Schema, "NodeOutput": NodeOutput, "ComfyNode": object}
    parts: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.latent_formats": {
            "LatentFormat": LatentFormat,
            "Wan21": normalised_format(16, vae.latents_mean, vae.latents_std),
            "Wan22": normalised_format(48, [0.5] * 48, [2.0] * 48),
        },
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "load_models_gpu": lambda models, **given: told.loaded.append((models, given)),
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": module("io", io)},
        "folder_paths": {
            "models_dir": str(models),
            "add_model_folder_path": lambda kind, path: paths.setdefault(kind, []).append(path),
            "get_folder_paths": lambda kind: list(paths[kind]),
        },
        "latent_preview": {"get_previewer": get_previewer},
    }
    made = {name: module(name, content) for name, content in parts.items()}
    for name, content in made.items():
        above, _, own = name.rpartition(".")
        if above:
            setattr(made[above], own, content)
        patch.setitem(sys.modules, name, content)
    return load_nodes(patch), told


def module(name: str, content: dict[str, Any]) -> ModuleType:
    """A module of that name and content."""
    made = ModuleType(name)
    made.__path__ = []
    vars(made).update(content)
    return made


def load_nodes(patch: pytest.MonkeyPatch) -> Any:
    """The package, loaded by its path and under another name, as ComfyUI loads it."""
    name = "custom_nodes_x_mlaconvert"
    spec = importlib.util.spec_from_file_location(
        name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        patch.delitem(sys.modules, loaded)
    patch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made
