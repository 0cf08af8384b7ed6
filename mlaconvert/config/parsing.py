"""Strict reading of plain data (JSON, YAML) into frozen dataclasses, and limits that several of them share.

An unknown field or a wrong type is a `ConfigError` that names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from mlaconvert.errors import ConfigError

T = TypeVar("T")
STRICT = {"extra": "forbid", "strict": True}
# What no real model or run comes near; above it, sizes would only fill the memory.
MOST = 2**31 - 1
MOST_LAYERS = 1000
MOST_FRAMES = 10_000  # latent
MOST_TEXT = 1 << 14  # tokens
MOST_PIXELS = 1 << 14


def check_positive(config: Any, *names: str, limit: int = MOST) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be a positive number")
        if value > limit:
            raise ConfigError(f"{name} is {value}: give at most {limit}")


def check_fields(config: Any) -> None:
    """Hold the fields of a dataclass to the ranges and choices of their annotations (pydantic's `Field`, `Literal`).

    For `__post_init__`, so that what Python code gives is checked as what files give. Raises ConfigError naming the
    field.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, annotation = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):  # checked when it was made
            continue
        try:
            TypeAdapter(annotation, config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(_complaint(".".join(map(str, (field.name, *first["loc"]))), first)) from None


def _complaint(name: str, error: Mapping[str, Any]) -> str:
    """What pydantic has against the field `name`, and what to give instead."""
    match error["type"]:
        case "greater_than_equal":
            return f"{name} is {error['input']}: give {error['ctx']['ge']} or more"
        case "less_than_equal":
            return f"{name} is {error['input']}: give at most {error['ctx']['le']}"
    return f"{name}: {error['msg']}"


def parse(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from plain data, strictly.

    Raises ConfigError, which names `where`, the field, and what is expected.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON: strict JSON mode takes a list for a tuple, and nothing but plain data survives.
        return TypeAdapter(cls).validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
            hint = f"; known fields: {known}" if len(first["loc"]) == 1 else ""
            raise ConfigError(f"{where}: unknown field {name!r}{hint}") from None
        raise ConfigError(f"{where}: {_complaint(name or 'value', first)}") from None
    except ConfigError as error:  # an impossible value, found by the class itself
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not plain data ({error})") from None
