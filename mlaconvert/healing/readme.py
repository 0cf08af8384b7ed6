"""What healing adds to the README.md of a model folder."""

from __future__ import annotations

from mlaconvert.conversion.readme import Prose
from mlaconvert.files.names import HEALING_NAME

CURVES_NAME = "healing.png"
HEALED = Prose(
    "\n\nHealed by mlaconvert {version}: stage {stage}, {steps} steps of batch {batch} a process, teacher {teacher}; "
    f"`{HEALING_NAME}` has the recipe and the curves, `{CURVES_NAME}` draws them. "
    "The weights are those of step {step}.",
    version=r"\S+",
    stage=r"[\w-]+",
    steps=r"\d+",
    batch=r"\d+",
    step=r"\d+",
)
