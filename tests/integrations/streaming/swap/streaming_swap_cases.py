"""What several of these tests are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from streaming_codebases import TheirPipeline
from torch import nn


def attentions(pipe: TheirPipeline) -> list[nn.Module]:
    return [block.self_attn for block in pipe.generator.model.blocks]  # type: ignore


@contextmanager
def unchanged(pipe: TheirPipeline) -> Iterator[None]:
    """Every module, weight and method of a pipeline is the same one afterwards."""

    def seen() -> dict[str, Any]:
        return {
            "modules": dict(pipe.named_modules()),
            "tensors": {name: id(tensor) for name, tensor in pipe.state_dict(keep_vars=True).items()},
            "own": {
                name: dict(vars(part)) for name, part in pipe.named_modules() if "_initialize_kv_cache" in vars(part)
            },
        }

    before, weights = seen(), {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    yield
    assert seen() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.state_dict().items())
