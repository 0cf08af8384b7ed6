"""Strict reading of plain data (JSON, YAML) into frozen dataclasses, and ranges that several of them share.

An unknown field, a wrong type or a value out of range is a `ConfigError` that names it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from mlaconvert.errors import ConfigError

T = TypeVar("T")
STRICT = {"extra": "forbid", "strict": True}
# What no real model or run comes near; above it, sizes would only fill the memory.
MOST = 2**31 - 1
MOST_LAYERS = 1000
MOST_FRAMES = 10_000  # latent
MOST_TEXT = 1 << 14  # tokens
MOST_PIXELS = 1 << 14


Size = Annotated[int, Field(ge=1, le=MOST)]
"""A width or a count of which there is at least one."""
Count = Annotated[int, Field(ge=1)]
"""A count of which there is at least one."""
Frames = Annotated[int, Field(ge=1, le=MOST_FRAMES)]
"""Latent frames."""
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
"""Pixels of a side of a video."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of random numbers."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number, 0 or more."""

# What to give instead of a value that pydantic's error, by its type, is about.
_GIVE = {
    "greater_than_equal": "{ge:.12g} or more",
    "greater_than": "more than {gt:.12g}",
    "less_than_equal": "at most {le:.12g}",
    "less_than": "less than {lt:.12g}",
    "multiple_of": "a multiple of {multiple_of}",
}
# What a value must be, by the beginning of the type of pydantic's error.
_KINDS = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of fields",
    "dataclass_type": "a mapping of fields",
}


def check_fields(config: Any) -> None:
    """Hold the fields of a dataclass to the ranges and choices of their annotations (pydantic's `Field`, `Literal`).

    For `__post_init__`, so that what Python code gives is checked as what files give. Raises ConfigError naming the
    field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):  # checked when it was made
            continue
        try:
            _adapter(type(config), field.name).validate_python(value)  # type: ignore[arg-type]  # classes are hashable
        except ValidationError as error:
            raise ConfigError(_complaint(error.errors()[0], field.name)) from None


@functools.cache
def _adapter(cls: type, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(cls, include_extras=True)[field], config={"arbitrary_types_allowed": True})


@functools.cache
def adapter(cls: type) -> TypeAdapter[Any]:
    """The one `TypeAdapter` of a dataclass: building it takes longer than reading most files."""
    return TypeAdapter(cls)


def _complaint(error: Mapping[str, Any], *within: str) -> str:
    """Which field pydantic complains of, below the fields `within`, and what to give instead."""
    # A part that could be no field's name is pydantic's own, of the members of a union.
    parts = [str(part) for part in (*within, *error["loc"]) if isinstance(part, int) or part.isidentifier()]
    name = ".".join(parts) or "value"
    if error["type"] in _GIVE:
        return f"{name} is {error['input']}: give {_GIVE[error['type']].format(**error['ctx'])}"
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace("'", "")
        return f"{name} is {error['input']!r}: give {choices}"
    if error["type"] == "missing":
        return f"{name} is missing: give it"
    # Such as int_type, int_parsing and int_from_float.
    wanted = next((words for kind, words in _KINDS.items() if error["type"].startswith(kind)), None)
    if wanted is not None:
        return f"{name} is {_shown(error['input'])}: give {wanted}"
    return f"{name}: {error['msg']}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from plain data, strictly.

    Raises ConfigError, which names `where`, the field, and what is expected.
    """
    try:
        # Through JSON: strict JSON mode takes a list for a tuple, and nothing but plain data survives.
        return adapter(cls).validate_json(json.dumps(data))  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
            hint = f"; known fields: {known}" if len(first["loc"]) == 1 else ""
            raise ConfigError(f"{where}: unknown field {name!r}{hint}") from None
        raise ConfigError(f"{where}: {_complaint(first)}") from None
    except ConfigError as error:  # an impossible value, found by the class itself
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not plain data ({error})") from None
