"""What a healing run shows while it works: its steps with the last loss, and the passes of each validation."""

from __future__ import annotations

from pathlib import Path

import pytest
from heal_run_cases import run, settings


@pytest.mark.parametrize(
    ("stage", "reference"),
    [("distill", 0), ("teacher-forcing", 0), pytest.param("consistency", 12, marks=pytest.mark.slow)],
)
def test_validations_and_the_last_loss_are_shown(home: Path, tmp_path: Path, stage: str, reference: int) -> None:
    """A validation is counted from its first pass to its last; a step shows the loss of the one before it.

    The teacher of a few-step stage generates twice what students are validated by: two steps here and a clean pass,
    for each of two chunks.
    """
    told: list[tuple[str, int, int, str]] = []

    def note(name: str, done: int, total: int, note: str = "") -> None:
        told.append((name, done, total, note))

    report = run(home, tmp_path / "out", settings(stage), progress=note)
    steps = [row for row in told if row[0] == stage]
    losses = {int(step): f"loss {loss:.3g}" for step, loss, *_ in report.curves.losses}
    assert steps == [(stage, done, 4, losses.get(done, "")) for done in range(5)]
    passes = [row[1:3] for row in told if row[0] == "validate"]
    total = passes[0][1]
    assert passes == 3 * [(done, total) for done in range(total + 1)]
    made = [row[1:3] for row in told if row[0] == "what to validate by"]
    assert made == [(done, reference) for done in range(reference + 1 if reference else 0)]
