"""What several of these tests are made of."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.listener import Listener

ROOT = Path(__file__).parents[3]
SVD = ConvertRecipe(init="svd")
CONFIG = WanConfig(dim=24, num_heads=2, num_layers=4, ffn_dim=16, freq_dim=6, text_dim=8, in_dim=2, out_dim=2)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
sys.path.insert(0, str(ROOT / "benchmarks"))
kill = importlib.import_module("kill")


def interrupted(
    source: Path, output: Path, after: int, recipe: ConvertRecipe = SVD, *, stage: str = "convert", **options: Any
) -> str:
    """Interrupt a conversion when `after` layers are through a `stage`; what it says then. `say` is a listener's."""

    def stop(name: str, done: int, _total: int, _note: str = "") -> None:
        if name == stage and done == after:
            raise KeyboardInterrupt

    listener = Listener(progress=stop, say=options.pop("say", lambda _: None))
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, output, recipe, listener=listener, **options)
    assert not output.exists()
    return str(caught.value)
