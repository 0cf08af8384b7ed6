"""Lines of tables and tiles of the page: numbers read from evaluation.json, written for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from mlaconvert.units import format_bytes, percent, signed_percent

Entry = Mapping[str, Any]  # one model in evaluation.json
Reader = Callable[[Entry], Any]  # a number, numbers by name, or None where there is none
Table = Literal["summary", "errors", "card"]


def number(*path: str) -> Reader:
    """Reads the number that lies at `path` in an entry."""
    return lambda entry: _float(_at(entry, path))


def numbers(*path: str) -> Reader:
    """Reads the numbers that lie at `path` in an entry: those of a mapping by name, those of a list by index."""

    def read(entry: Entry) -> dict[Any, float] | None:
        values = _at(entry, path)
        items = values.items() if isinstance(values, Mapping) else enumerate(values if isinstance(values, list) else ())
        return {name: value for name, item in items if (value := _float(item)) is not None} or None

    return read


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Unit(NamedTuple):
    """How a number is written in tables, and on a model card, which stands alone and has more room."""

    table: Callable[[Any], str]
    card: Callable[[Any], str]


BYTES = Unit(format_bytes, format_bytes)
LOSS = Unit("{:.4f}".format, "{:.4g}".format)  # mean squared error of the velocity
SMALL_LOSS = Unit("{:.3g}".format, "{:.4g}".format)  # one that may be next to nothing
SHARE = Unit(percent, "{:.2%}".format)  # of the teacher's
CHANGE = Unit(signed_percent, signed_percent)  # from the teacher's
RATE = Unit("{:.3g}".format, "{:.3g}".format)
SCORE = Unit("{:.4f}".format, "{:.4f}".format)  # 0 to 1


def relative_change(student: float, teacher: float) -> str:
    """3, 4 -> -25.0%."""
    return signed_percent(student / teacher - 1)


def ratio(student: float, teacher: float) -> str:
    """3, 4 -> 0.75x."""
    return f"{student / teacher:.2f}x"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: a number of each model, and the teacher's where it has one.

    With "{name}" in what it is called, it is a line for each name of what `value` reads.
    """

    summary: str | None = None
    """What it is called in the summary, on the terminal and the page; None leaves it out there."""
    errors: str | None = None
    """The same in the terminal's table of errors by timestep and layer."""
    card: str | None = None
    """The same on a model card, for people who read nothing else."""
    value: Reader
    """The model's number, read from its entry in evaluation.json."""
    teacher: Reader | None = None
    """The teacher's, from the same entry."""
    unit: Unit
    compared: Callable[[float, float], str] | None = None
    """What follows in brackets after the model's number, of that and the teacher's."""
    paired: bool = False
    """The teacher was measured anew beside each model: all its numbers are shown."""
    mark: str = ""
    """Follows the teacher's number, where a note explains it."""
    better: Literal["less", "more"] | None = None
    """Which numbers are good ones; None for those that should be the teacher's."""

    def called(self, table: Table) -> str | None:
        """What it is called in `table`."""
        return {"summary": self.summary, "errors": self.errors, "card": self.card}[table]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number of its first model that the page shows large, and a few words below it."""

    title: str
    value: Reader
    write: Callable[[float], str]
    note: str | Callable[[Entry], str]


def has_clean_past(entry: Entry) -> bool:
    """Whether there are figures behind clean pasts: not of a bidirectional model, nor of an earlier version."""
    return isinstance(entry.get("clean_past"), Mapping)


_Shown = TypeVar("_Shown", Line, Tile)


def by_past(shown: _Shown, **with_past: Any) -> tuple[_Shown, _Shown]:
    """`shown` for models without a past, and changed by `with_past` for those with one."""

    def where(past: bool) -> Reader:
        return lambda entry: shown.value(entry) if has_clean_past(entry) == past else None

    return (
        dataclasses.replace(shown, value=where(True), **with_past),
        dataclasses.replace(shown, value=where(False)),
    )


class Row(NamedTuple):
    """A line as it is printed; "" where there is no number."""

    name: str
    teacher: str
    models: tuple[str, ...]
    better: Literal["less", "more"] | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Name, teacher's number, each model's."""
        return (self.name, self.teacher, *self.models)


def rows_of(line: Line, models: Sequence[Entry], table: Table) -> Iterator[Row]:
    """The line as `table` shows it for `models`, side by side: no row, one, or one for each name."""
    called = line.called(table)
    if called is None:
        return
    values = [line.value(entry) for entry in models]
    teachers = [line.teacher(entry) if line.teacher is not None else None for entry in models]
    if "{name" not in called:
        yield from _row(line, called, values, teachers, table)
        return
    for name in dict.fromkeys(name for value in values if isinstance(value, dict) for name in value):
        yield from _row(line, called.format(name=name), _named(values, name), _named(teachers, name), table)


def _named(numbers: Iterable[Any], name: Hashable) -> list[Any]:
    return [value.get(name) if isinstance(value, dict) else None for value in numbers]


def _row(line: Line, called: str, values: Sequence[Any], teachers: Sequence[Any], table: Table) -> Iterator[Row]:
    """One row, or none when no model has the number."""
    write = line.unit.card if table == "card" else line.unit.table
    pairs = list(zip(values, teachers, strict=True))
    theirs = [write(teacher) for value, teacher in pairs if value is not None and teacher is not None]

    def cell(value: Any, teacher: Any) -> str:
        if value is None:
            return ""
        return write(value) + (f" ({line.compared(value, teacher)})" if line.compared is not None and teacher else "")

    if any(value is not None for value in values):
        teacher = " / ".join(theirs if line.paired else theirs[:1])
        yield Row(called, teacher + line.mark * bool(teacher), tuple(cell(*pair) for pair in pairs), line.better)


def cache_of(who: str) -> Reader:
    """Reads the bytes of one video's cache, by what it is called: with the dtype, on which they depend."""
    size = number("cache_bytes", who)
    return lambda entry: None if size(entry) is None else {f"one video{_dtype(entry)}": size(entry)}


def cache_change(entry: Entry) -> float | None:
    """How much more than the teacher's cache, as a share of it; negative where it is smaller."""
    sizes = numbers("cache_bytes")(entry) or {}
    return sizes["student"] / sizes["teacher"] - 1 if sizes.get("teacher") and "student" in sizes else None


def cache_sizes(entry: Entry) -> str:
    """Both models' bytes in words."""
    sizes = entry["cache_bytes"]
    return f"{format_bytes(sizes['teacher'])} to {format_bytes(sizes['student'])}{_dtype(entry)}"


def _dtype(entry: Entry) -> str:
    """The dtype that models ran in, as it follows a name."""
    dtype = _at(entry, ("conditions", "dtype"))
    return f", {dtype}" if isinstance(dtype, str) else ""
