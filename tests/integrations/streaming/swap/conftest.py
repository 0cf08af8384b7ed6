"""Fixtures of these tests."""

from __future__ import annotations

import streaming_fixtures

vectors, folders, make = (getattr(streaming_fixtures, name) for name in ("vectors", "folders", "make"))
