"""The families of models that are known here."""

from __future__ import annotations

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.protocol import Family
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.worldplay import WorldPlayFamily

FAMILIES: tuple[Family, ...] = (WanFamily(), WorldPlayFamily())


def family_of(config: WanConfig) -> Family:
    """The family that a model of this geometry is of; a family with a geometry of its own is told by its class."""
    return FAMILIES[1 if isinstance(config, CameraConfig) else 0]
