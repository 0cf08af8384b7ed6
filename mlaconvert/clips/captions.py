"""Tables of captions, as spreadsheets and other tools write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlaconvert.errors import InputError
from mlaconvert.files.inputs import parse_json, read_text, reason_of

_LIMIT = 1 << 28  # bytes of a table
# What other tools call the columns, in order of preference: ours, the Hub's, DiffSynth's, musubi's, Open-Sora's.
_COLUMNS = {
    "file": ("file", "file_name", "video", "video_path", "path"),
    "caption": ("caption", "text", "prompt"),
}
_DELIMITERS = ",;\t"
_END = "the end of the table"  # a last line that only an open quotation mark swallows
_ARRAY = re.compile(r"\s*\[\s*[{\]]")


def read_captions(path: Path) -> dict[str, str]:
    """File as it stands there, and with "/" for a backslash -> caption.

    A table is CSV (columns apart by comma, semicolon or tab; .csv or .tsv), JSON lines, or a JSON array. Raises
    InputError naming the file, the line, and what was found where file and caption were expected.
    """
    text = read_text(path, limit=_LIMIT)
    rows: Iterable[tuple[str, Any]]
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = _csv_rows(path, text)
    elif _ARRAY.match(text):
        rows = _array_rows(path, text)
    else:
        rows = _json_rows(path, text)
    found: dict[str, str] = {}
    for place, row in rows:
        names = _named(row, f"{path}, {place}") if isinstance(row, Mapping) else {}
        file, caption = (row.get(names.get(column)) if names else None for column in _COLUMNS)
        if not isinstance(file, str) or not isinstance(caption, str) or not file:
            has = f"; it has {_shown(row)}" if isinstance(row, Mapping) and len(names) < len(_COLUMNS) else ""
            raise InputError(f"{path}, {place}: expected file and caption, both text{has}")
        _refuse_halves(f"{path}, {place}", file + caption)
        if found.setdefault(file, caption) != caption:
            raise InputError(f"{path}, {place}: {file} has two captions; keep one")
    return {file.replace("\\", "/"): caption for file, caption in found.items()} | found


def _named(names: Iterable[Any], where: str) -> dict[str, str]:
    """Ours of the two columns -> what a table calls it; without those that it has not.

    Raises InputError, beginning with `where`, when it has two of one name.
    """
    there: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            there.setdefault(name.strip().casefold(), []).append(name)
    chosen = {}
    for ours, theirs in _COLUMNS.items():
        if called := next((there[name] for name in theirs if name in there), None):
            if len(called) > 1:
                raise InputError(f"{where}: it has the column {called[0].strip()!r} twice; keep one")
            chosen[ours] = called[0]
    return chosen


def _refuse_halves(where: str, text: str) -> None:
    """Raise InputError for half of a character in a text, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {text[error.start]!a} is half of a character; write the whole one") from None


def _shown(names: Iterable[Any]) -> str:
    shown = [str(name)[:40] for name in names if name is not None]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "") if shown else "none"


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    with _long_fields(len(text)):
        try:
            heads = {delimiter: _head(text, delimiter) for delimiter in _DELIMITERS}
        except csv.Error as error:
            raise _unreadable(path, 1, error) from None
        delimiter = next((one for one, head in heads.items() if len(_named(head, str(path))) == len(_COLUMNS)), None)
        if delimiter is None:
            raise InputError(
                f"{path}: its first line must name the columns file and caption; it has {_shown(heads[','])}"
            )
        head, row = heads[delimiter], []
        reader = _reader(f"{text}\n{_END}", delimiter)
        begin, seen = 1, False
        try:
            for row in reader:
                line, begin = begin, reader.line_num + 1
                if row and seen and row != [_END]:
                    if any(row[len(head) :]):
                        raise InputError(
                            f"{path}, line {line}: it has {len(row)} fields, the first line {len(head)}; put a caption "
                            f"with {delimiter!r} in it between quotation marks"
                        )
                    yield f"line {reader.line_num}", dict(zip(head, row, strict=False))
                seen = seen or bool(row)
        except csv.Error as error:
            raise _unreadable(path, reader.line_num, error) from None
    if row != [_END]:
        raise InputError(
            f"{path}, line {line}: a quotation mark that opens here is never closed; close it, or write two for one"
        )


def _head(text: str, delimiter: str) -> list[str]:
    """The first line that is not empty."""
    return next((row for row in _reader(text, delimiter) if row), [])


def _unreadable(path: Path, line: int, error: csv.Error) -> InputError:
    reason = f"{path}, line {line}: not readable as CSV ({reason_of(error)})"
    return InputError(f"{reason}; check the quotation marks before it")


def _reader(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)


@contextmanager
def _long_fields(most: int) -> Iterator[None]:
    """Let a field of a table be `most` characters long: the csv module's limit is one for all of a process."""
    before = csv.field_size_limit(max(most, 1 << 17))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _array_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({reason_of(error)})") from None
    return [(f"entry {number}", row) for number, row in enumerate(rows, 1)]


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # other separators may stand inside a text
        if line.strip():
            try:
                yield f"line {number}", parse_json(line)
            except ValueError as error:
                if _is_object(text):
                    raise InputError(
                        f"{path}: one JSON object over several lines; write each entry on a line of its own, or all "
                        "in an array: [{...}, {...}]"
                    ) from None
                raise InputError(f"{path}, line {number}: not JSON ({reason_of(error)})") from None


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False
