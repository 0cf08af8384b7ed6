"""What pyproject.toml allows, and the versions that the tests are known to pass with."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
UNTESTED = {"tensorboard"}  # of extras that the tests do without


def requirements() -> list[Requirement]:
    """What is needed to build, run and test, in all extras."""
    listed = [PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"], *EXTRAS.values()]
    found = (Requirement(line) for lines in listed for line in lines)
    return [each for each in found if each.name != PROJECT["project"]["name"]]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_nothing_is_capped() -> None:
    """Neither from above nor to one version: who installs this beside other things must be able to."""
    assert {
        str(each) for each in requirements() if any(s.operator not in (">=", "!=") for s in each.specifier)
    } == set()


def test_the_tested_versions_are_pinned_and_allowed() -> None:
    found = pins()
    for each in requirements():
        name = canonicalize_name(each.name)
        if name not in UNTESTED:
            assert name in found
            assert each.specifier.contains(found[name]), (str(each), found[name])
    assert list(found) == sorted(map(canonicalize_name, found))
    assert "+" not in "".join(found.values())  # a local version is not on every index


def test_the_pins_are_used() -> None:
    assert 'export PIP_CONSTRAINT="$PWD/constraints.txt"' in (ROOT / ".ci" / "run").read_text()
    assert "pip install -c constraints.txt" in (ROOT / "CONTRIBUTING.md").read_text()
