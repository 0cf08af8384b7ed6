"""The notebook of the first hour runs from its first cell to its last, and shows a video in the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"
SIZES = "CLIPS, FRAMES = 40, 30"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_it_is_whole_and_small() -> None:
    """What is kept of a run is its words and its frames, not the film."""
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 300_000
    assert {output["output_type"] for output in outputs(notebook)} == {"stream", "display_data"}
    kept = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert kept == {"text/plain", "image/png"}
    assert str(Path.home()) not in json.dumps(notebook)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter
def test_it_runs_and_shows_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer clips and frames, for time's sake: as printed it takes less than five minutes."""
    notebook = read()
    sizes = [cell for cell in notebook.cells if SIZES in cell.source]
    assert len(sizes) == 1
    sizes[0].source = sizes[0].source.replace(SIZES, "CLIPS, FRAMES = 5, 9")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{':'.join(path for path in sys.path if path)}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    found = outputs(notebook)
    assert not [output for output in found if output["output_type"] == "error"]
    text = "".join(output.get("text", "") for output in found)
    assert "instead of 2304" in text
    assert re.search(r"tiny-mla: (Close to|Far from) the teacher", text)
    (film,) = tmp_path.rglob("video.*")
    shown = json.dumps([output.get("data", {}) for output in found])
    assert ("<video" if film.suffix == ".mp4" else "image/gif") in shown
