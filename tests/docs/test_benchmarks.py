"""What benchmarks keep of their runs."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from healing import Cells  # noqa: E402


def test_cells_that_are_made_side_by_side_are_all_kept(tmp_path: Path) -> None:
    def make(number: int) -> float:
        return Cells(tmp_path / "results", tmp_path).get(f"starts-random-{number}", float, number)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(40))) == [float(number) for number in range(40)]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["starts.json"]
    kept = json.loads((tmp_path / "results" / "starts.json").read_text())
    assert kept == {f"random-{number}": float(number) for number in range(40)}
    assert make(7) == 7.0


def test_results_that_are_kept_are_found_again(tmp_path: Path) -> None:
    cells = Cells(ROOT / "benchmarks" / "results" / "healing", tmp_path)
    found = {path.stem for path in cells.results.iterdir()}
    assert found == {"caches", "needs", "noise", "optimizers", "recipe", "stages", "starts", "students", "unhealed"}
    assert 0.06 < cells.get("unhealed-teacher-2", None) < 0.0624  # type: ignore[arg-type]
