"""Where a model came from: the record of conversion.json, whatever it holds, and the places that it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlaconvert.files.origin import Origin, folders_around, origin_of


def test_a_record_is_read_field_by_field() -> None:
    record = {"name": "a/b/file.pt", "revision": "c0", "subfolder": "low", "state_key": "ema", "sha256": "5a"}
    loras = [{"name": "l"}]
    origin = origin_of({"source": {**record, "loras": loras, "files": ["file.pt"]}})
    assert origin == Origin(**record, loras=loras)
    assert origin.hub_id == "a/b"
    assert origin.places == [("a/b/file.pt", "c0"), ("a/b/file.pt", None)]


@pytest.mark.parametrize("conversion", [None, {}, {"source": None}, {"source": "a/b"}, {"source": {"name": 3}}])
def test_what_is_not_recorded_is_unknown(conversion: Any, tmp_path: Path) -> None:
    origin = origin_of(conversion)
    assert origin == Origin()
    assert (origin.hub_id, origin.places, origin.beside(tmp_path)) == (None, [], None)


def test_a_local_source_is_looked_for_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "mla"
    folder.mkdir(parents=True)
    (folder / "w.safetensors").touch()
    origin = Origin(name="dense.pt")
    assert (origin.hub_id, origin.places) == (None, [("dense.pt", None)])
    for model in (folder, folder / "w.safetensors"):
        assert origin.beside(model) == tmp_path / "made" / "dense.pt"
        assert folders_around(model) == [tmp_path / "made", folder]
    assert Origin(name="a/b").beside(folder) is None  # on the Hub, never a folder of the disk
    assert origin.beside("some/model") is None
    assert folders_around("some/model") == []
