"""What can go wrong, said so that the reader knows what, where, and what to do next.

Every message is one or two lines. `InputError` and its children mean that the user can mend it (exit code 2);
any other `MLAConvertError` is a failure on our side or the machine's (exit code 1).
"""

from __future__ import annotations

import unicodedata

_LONGEST = 1000  # characters of a message


def one_line(text: str) -> str:
    """`text` as one line that a terminal only shows: control characters escaped, the middle of a long one left out."""
    shown = "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in _shortened(text))
    return _shortened(shown)


def is_plain(text: str) -> bool:
    """Whether `text` can be printed and encoded as it is: no control characters, line breaks or undecoded bytes."""
    # str.isprintable() alone refuses every space but one.
    return all(char.isprintable() or unicodedata.category(char) == "Zs" for char in text)


def _shortened(text: str) -> str:
    """The beginning, which says what and where, and the end, which says what to do."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 3 :]}"


class MLAConvertError(Exception):
    """Root of all errors that mlaconvert raises on purpose. Names in a message may come from a hostile file."""

    exit_code = 1
    details: tuple[str, ...] = ()
    """Lines that belong to the message and are shown below it, such as a list to send on."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(MLAConvertError):
    """Wrong usage or wrong input."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be found, read or trusted: missing, truncated, not finite, the wrong shape."""


class UnsupportedModelError(InputError):
    """A checkpoint can be read, but it is not of a family that mlaconvert converts."""


class UnknownLayoutError(UnsupportedModelError):
    """A Wan model has tensors of names that are not known; `details` lists all of its names, shapes and dtypes."""


class ConfigError(InputError):
    """A config, recipe or option has an unknown field or an impossible value."""


class OutputError(InputError):
    """An output path exists already, or there is no room for what would be written."""
