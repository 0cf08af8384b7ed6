"""Factors of a LoRA."""

from __future__ import annotations

import pytest
import torch
from lora_cases import MODULES, RANK
from torch import Tensor


@pytest.fixture
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A [r, in], B [out, r])."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (
            torch.randn(RANK, inputs, generator=generator) * 0.1,
            torch.randn(outputs, RANK, generator=generator) * 0.1,
        )
        for name, (outputs, inputs) in MODULES.items()
    }
