"""Parts that our own forward pass knows, and when they are passengers all the same: of another shape, or denied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from families_cases import SaveFolder, State

from mlaconvert.errors import InputError
from mlaconvert.families.merged import remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.load import load_model

D = 96  # width of the golden model
RATES = {
    "fps_embedding.weight": (2, D), "fps_projection.0.weight": (D, D), "fps_projection.0.bias": (D,),
    "fps_projection.2.weight": (6 * D, D), "fps_projection.2.bias": (6 * D,),
}  # fmt: skip
REFERENCE = {"ref_conv.weight": (D, 7, 2, 2), "ref_conv.bias": (D,)}


def with_parts(state: State, shapes: Mapping[str, tuple[int, ...]]) -> State:
    return state | {name: torch.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("fields", [{}, {"inject_sample_info": True, "add_ref_conv": True, "in_dim_ref_conv": 7}])
def test_parts_are_known_by_their_shapes_or_by_config_json(
    fields: dict[str, Any], golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    folder = save_folder(with_parts(golden_state, RATES | REFERENCE), golden_config | fields)
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.passengers
        assert remarks(checkpoint) == []
        assert (checkpoint.config.fps, checkpoint.config.reference_dim) == (24, 7)
    assert load_model(folder).config.reference_dim == 7


CARRIED: dict[str, tuple[Mapping[str, tuple[int, ...]], dict[str, Any], str]] = {
    "more frame rates": (RATES | {"fps_embedding.weight": (3, D)}, {}, "5 tensors beyond .*frame-rate embedding"),
    "no projection": ({"fps_embedding.weight": (2, D)}, {}, "1 tensor beyond .*frame-rate embedding"),
    "denied frame rates": (RATES, {"inject_sample_info": False}, "5 tensors beyond .*frame-rate embedding"),
    "other patches": ({"ref_conv.weight": (D, 7, 1, 1), "ref_conv.bias": (D,)}, {}, "2 tensors .*a reference image"),
    "a denied reference": (REFERENCE, {"add_ref_conv": False}, "2 tensors beyond .*a reference image"),
    "another kind of it": ({"ref_conv.weight": (4,)}, {}, "1 tensor beyond .*a reference image"),
}


@pytest.mark.parametrize("case", CARRIED)
def test_what_is_not_known_is_carried_along(
    case: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    shapes, fields, says = CARRIED[case]
    folder = save_folder(with_parts(golden_state, shapes), golden_config | fields)
    with open_checkpoint(folder) as checkpoint:
        assert re.search(says, "\n".join(remarks(checkpoint)))
        assert (checkpoint.config.fps, checkpoint.config.reference_dim) == (None, None)
    with pytest.raises(InputError, match="does not know all of this one"):
        load_model(folder)


IMPOSSIBLE: dict[str, tuple[Mapping[str, tuple[int, ...]], dict[str, Any], str]] = {
    "frame rates that are not there": ({}, {"inject_sample_info": True}, "5 tensors .* missing: fps_embedding.weight"),
    "half of them": (
        {name: shape for name, shape in RATES.items() if "bias" not in name}, {}, r"fps_projection\.0\.bias",
    ),
    "a reference that is not there": ({}, {"add_ref_conv": True}, "2 tensors .* missing: ref_conv.weight"),
    "a reference of other channels": (
        REFERENCE, {"add_ref_conv": True, "in_dim_ref_conv": 16},
        r"'ref_conv.weight' has shape \[96, 7, 2, 2\], expected \[96, 16, 2, 2\]",
    ),
    "no rate of theirs": (RATES, {"inject_sample_info": True, "fps": 30}, "fps"),
    "a rate in words": (RATES, {"fps": "fast"}, "fps"),
    "channels in words": (REFERENCE, {"add_ref_conv": True, "in_dim_ref_conv": "all"}, "reference_dim"),
    "channels without end": (REFERENCE, {"add_ref_conv": True, "in_dim_ref_conv": 10**12}, "reference_dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_config_json_promises_must_be_there(
    case: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder
) -> None:
    shapes, fields, says = IMPOSSIBLE[case]
    with pytest.raises(InputError, match=says):
        open_checkpoint(save_folder(with_parts(golden_state, shapes), golden_config | fields))
