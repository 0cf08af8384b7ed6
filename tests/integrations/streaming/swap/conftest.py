"""Fixtures of the streaming codebases: recorded outputs, conversions of one model, pipelines around it."""

from __future__ import annotations

import streaming_fixtures

vectors, folders, make = (getattr(streaming_fixtures, name) for name in ("vectors", "folders", "make"))
