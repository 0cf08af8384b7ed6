"""The README.md that a conversion leaves in its folder until there is a model card: written, and recognised again."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any

from mlaconvert import __version__
from mlaconvert.conversion.plan import ConversionPlan
from mlaconvert.files.names import CONVERSION_NAME


class Prose:
    """A text with fields in braces: it is written with values in them, and recognised whatever the values.

    `fields` are regular expressions of what a field may hold; by default anything that fits on a line.
    """

    def __init__(self, text: str, **fields: str) -> None:
        self.text, self.fields = text, fields

    def write(self, **values: Any) -> str:
        """The text with `values` in its fields."""
        return self.text.format(**values)

    @property
    def pattern(self) -> str:
        """A regular expression of every text that `write` can give."""
        parts = []
        for literal, field, *_ in Formatter().parse(self.text):
            parts += [re.escape(literal), "" if field is None else f"(?:{self.fields.get(field, '.+')})"]
        return "".join(parts)


CONVERTED = Prose(
    "# {source}, with latent attention\n\n"
    "Converted from {origin} ({description}) by mlaconvert {version}.\n\n"
    "Self-attention in layers {layers} is Multi-Head Latent Attention (init {init}). A token caches {mla} "
    "instead of {dense} ({less:.1f}% less). All other tensors are the source's. "
    f"`{CONVERSION_NAME}` records the recipe, the source's hash and each layer's spectrum and errors.",
    version=r"\S+",
    layers=r"[\d,-]+",
    init=r"\w+",
    mla=r"[\d,]+ (?:scalars|bytes)",
    dense=r"[\d,]+(?: in bfloat16)?",
    less=r"-?[\d.]+",
)
UNTRAINED = " The model has not been trained since."


def readme(plan: ConversionPlan) -> str:
    """Says what the folder of a conversion is."""
    cached, dense = plan.config.cache_words
    text = CONVERTED.write(
        source=plan.source,
        origin=f"{plan.source}, {plan.subfolder}" if plan.subfolder else plan.source,
        description=plan.description,
        version=__version__,
        layers=plan.recipe.layers,
        init=plan.recipe.init,
        mla=cached,
        dense=dense,
        less=100 * (1 - plan.config.cache_share),
    )
    return f"{text}{UNTRAINED}\n"
