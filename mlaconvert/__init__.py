"""mlaconvert: give a pretrained video diffusion transformer Multi-Head Latent Attention.

    from mlaconvert import ConvertRecipe, HealRecipe, convert, heal

    convert("Wan-AI/Wan2.1-T2V-1.3B", "wan-mla", ConvertRecipe(kv_rank=224), data="clips", device="cuda")
    heal("wan-mla", "wan-healed", HealRecipe(stage="distill", steps=1000), data="clips")

What is named here is imported when it is first used, so that `import mlaconvert` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlaconvert.conversion.analyze import analyze as analyze
    from mlaconvert.conversion.recipe import ConvertRecipe as ConvertRecipe
    from mlaconvert.conversion.run import convert as convert
    from mlaconvert.evaluation.run import evaluate as evaluate
    from mlaconvert.families.open import open_checkpoint as open_checkpoint
    from mlaconvert.families.source import Source as Source
    from mlaconvert.files.output import Output as Output
    from mlaconvert.generation.request import Generation as Generation
    from mlaconvert.generation.run import generate as generate
    from mlaconvert.healing.recipe import HealRecipe as HealRecipe
    from mlaconvert.healing.run import heal as heal
    from mlaconvert.integrations.collect import collect as collect
    from mlaconvert.listener import Listener as Listener
    from mlaconvert.model.cache import LatentCache as LatentCache
    from mlaconvert.model.load import load_camera_model as load_camera_model
    from mlaconvert.model.load import load_model as load_model
    from mlaconvert.model.rollout import LatentSize as LatentSize
    from mlaconvert.model.rollout import rollout as rollout
    from mlaconvert.model.schedule import Sampler as Sampler
    from mlaconvert.publishing.hub import push as push

__version__ = "0.1.0"

_HOMES = {
    "ConvertRecipe": "conversion.recipe",
    "Generation": "generation.request",
    "HealRecipe": "healing.recipe",
    "LatentCache": "model.cache",
    "LatentSize": "model.rollout",
    "Listener": "listener",
    "Output": "files.output",
    "Sampler": "model.schedule",
    "Source": "families.source",
    "analyze": "conversion.analyze",
    "collect": "integrations.collect",
    "convert": "conversion.run",
    "evaluate": "evaluation.run",
    "generate": "generation.run",
    "heal": "healing.run",
    "load_camera_model": "model.load",
    "load_model": "model.load",
    "open_checkpoint": "families.open",
    "push": "publishing.hub",
    "rollout": "model.rollout",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    """What has this name, imported now (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Everything that is offered, imported or not."""
    return sorted({*globals(), *__all__})
