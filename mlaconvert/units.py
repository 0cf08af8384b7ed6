"""How numbers are written for people: bytes, shares and durations."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """`count` bytes in binary units, three or more significant digits: 180 KiB, 1.87 GiB."""
    value, unit = float(count), 0
    # What would round up to 1024 belongs to the next unit.
    while value >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 or value.is_integer() else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """A duration to two digits or so: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float) -> str:
    """0.0734 -> 7.3%."""
    return f"{100 * share:.1f}%"


def signed_percent(share: float) -> str:
    """0.0734 -> +7.3%."""
    return f"{100 * share:+.1f}%"
