"""The losses of a conversion, step by step."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from mlaconvert.conversion.plan import plan_conversion
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.report import ModelReport
from mlaconvert.families.open import open_checkpoint
from mlaconvert.reports.tables import loss_table


def shown(model: ModelReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(loss_table(model))
    return stream.getvalue()


def test_a_step_that_made_things_worse_is_explained(golden: Path) -> None:
    """With clean pasts, with noisy ones, or in the only loss; what the first step loses is no step back."""
    with open_checkpoint(str(golden)) as opened:
        plan = plan_conversion(opened, ConvertRecipe(init="svd"))
    clean = {"dense": 0.00251, "low rank": 0.00264, "queries refitted": 0.00265, "o refitted": 0.0026}
    noisy = {"dense": 0.0649, "low rank": 0.07, "queries refitted": 0.069, "o refitted": 0.0688}
    model = ModelReport(plan=plan, losses=clean, noisy_losses=noisy)
    text = shown(model)
    assert "Worse than the step before: queries refitted. " in text
    assert all(cell in text for cell in ("0.00251", "0.00265", "+5.6%", "0.0649", "+6.3%"))  # digits that tell steps
    other = dataclasses.replace(model, losses=noisy, noisy_losses=noisy | {"o refitted": 0.0691})
    assert "Worse than the step before: o refitted. " in shown(other)
    assert "Worse" not in shown(dataclasses.replace(model, losses=noisy, noisy_losses={}))
