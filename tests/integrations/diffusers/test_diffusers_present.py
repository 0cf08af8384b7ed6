"""Converted models with an exact present in diffusers: the same outputs, files, masks and chunks as in our runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_cases import STREAMING, TOLERANCE, diffusers
from safetensors.torch import load_file
from support import count_bits, relative
from torch import Tensor
from wan_diffusers import inputs

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel
from mlaconvert.integrations.diffusers_attention import _segments
from mlaconvert.model.attention.kernel import AttentionPlan, Segment
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.rope import rotary

FRAME = 3 * 5  # tokens
NAMES = ["heads", "shared key", "partly, native", "heads in bits", "partly in bits"]


@pytest.fixture(scope="module")
def presents(folders: dict[str, Path]) -> dict[str, Path]:
    """Conversions of the teacher, with values narrower than its heads."""
    common: dict[str, Any] = {"init": "svd", "present": "exact", "v_dim": 7, "streaming": STREAMING}
    recipes = {
        "heads": ConvertRecipe(rope="head", key_norm="token", **common),
        "shared key": ConvertRecipe(rope="latent", **common),
        "partly, native": ConvertRecipe(rope="head", layers="0,2", layout="native", **common),
    }
    root = folders["source"].parent
    for name, recipe in recipes.items():
        convert(folders["source"], root / name, recipe)
    for name in ("heads", "partly, native"):
        made = root / f"{name.partition(',')[0]} in bits"
        shutil.copytree(root / name, made)
        count_bits(made)
    return {name: root / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_clip_is_the_same_as_in_our_runtime(presents: dict[str, Path], name: str) -> None:
    ours, theirs = load_model(presents[name]), WanMLATransformer3DModel.from_pretrained(presents[name])
    x, t, context = inputs()
    expected = ours(x, t, context)
    assert relative(theirs(x, t, context).sample, expected) < TOLERANCE
    assert relative(ours(x, t, context, chunks=(5,)), expected) > 1e-3  # all of it present


@torch.no_grad()
def test_one_chunk_is_the_teachers(presents: dict[str, Path], teacher: Any) -> None:
    x, t, context = inputs(frames=2)
    for name in NAMES:
        theirs = WanMLATransformer3DModel.from_pretrained(presents[name])
        assert relative(theirs(x, t, context).sample, teacher(x, t, context).sample) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_clip_is_what_streaming_makes_of_its_chunks(presents: dict[str, Path], name: str) -> None:
    ours, theirs = load_model(presents[name]), WanMLATransformer3DModel.from_pretrained(presents[name])
    x, t, context = inputs()
    cache = LatentCache(ours.config, batch=2, height=6, width=10)
    parts = [ours(x[:, :, start : start + 2], t, context, cache=cache, start_frame=start) for start in (0, 2, 4)]
    assert relative(theirs(x, t, context).sample, torch.cat(parts, 2)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_again_it_is_the_same(presents: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = WanMLATransformer3DModel.from_pretrained(presents[name])
    model.save_pretrained(tmp_path / "saved")
    again = WanMLATransformer3DModel.from_pretrained(tmp_path / "saved")
    ours = load_model(tmp_path / "saved")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert ours.config.mla == load_model(presents[name]).config.mla
    before, after = (
        {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
        for folder in (presents[name], tmp_path / "saved")
    )
    assert len(before) == len(after)
    x, t, context = inputs()
    assert torch.equal(again(x, t, context).sample, model(x, t, context).sample)
    assert relative(ours(x, t, context), model(x, t, context).sample) < TOLERANCE


def rope(model: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What the blocks are given, without the mask."""
    made: tuple[Tensor, ...] = model.rope(x)
    return made[:2]


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_a_mask_by_hand_says_what_is_present(presents: dict[str, Path], name: str) -> None:
    """Chunks of three and of two frames, which are not the model's own; and one that tells videos apart is refused."""
    ours, model = load_model(presents[name]), WanMLATransformer3DModel.from_pretrained(presents[name])
    x = torch.randn(2, 5 * FRAME, 36, generator=torch.Generator().manual_seed(2))
    cut, size = 3 * FRAME, 5 * FRAME
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[:cut, cut:] = False
    turn = rotary(torch.arange(5), 3, 5, ours.config.rope_split)
    segments = (
        Segment(slice(0, cut), slice(0, cut), slice(0, 0)),
        Segment(slice(cut, size), slice(cut, size), slice(0, cut)),
    )
    plan = AttentionPlan(query_rotary=turn, key_rotary=turn, mask=mask, segments=segments)
    expected = ours.blocks[1].self_attn(x, plan)  # type: ignore[operator]
    attention, turns = model.blocks[1].attn1, rope(model, inputs()[0])
    for given in (mask[None, None], mask[None], mask):
        assert relative(attention(x, attention_mask=given, rotary_emb=turns), expected) < TOLERANCE
    whole = attention(x, rotary_emb=turns)
    assert relative(whole, expected) > 1e-3
    mask[:cut, :cut].tril_()  # changed in place, it is another mask
    assert relative(attention(x, attention_mask=mask, rotary_emb=turns)[:, :FRAME], expected[:, :FRAME]) > 1e-3
    with pytest.raises(UnsupportedModelError, match=r"attention_mask is \[2, 1, 75, 75\].*one mask serves all videos"):
        attention(x, attention_mask=mask.expand(2, 1, -1, -1), rotary_emb=turns)


@torch.no_grad()
def test_a_pass_of_another_size_has_its_own_mask(presents: dict[str, Path]) -> None:
    """Long and short clips in turn, as a pipeline of several videos makes them; no mask outlives its pass."""
    _segments.cache_clear()
    ours = load_model(presents["heads"])
    model = WanMLATransformer3DModel.from_pretrained(presents["heads"])
    for frames in (5, 3, 4, 5, 2, 3):
        x, t, context = inputs(frames=frames)
        assert relative(model(x, t, context).sample, ours(x, t, context)) < TOLERANCE
    assert _segments.cache_info().currsize == 0


def test_gradients_with_checkpointing_are_those_of_our_runtime(presents: dict[str, Path]) -> None:
    ours, model = load_model(presents["shared key"]), WanMLATransformer3DModel.from_pretrained(presents["shared key"])
    model.train().enable_gradient_checkpointing()
    x, t, context = inputs()
    model(x, t, context).sample.square().mean().backward()
    ours.requires_grad_(True)(x, t, context).square().mean().backward()
    for name in ("kv_b_proj.weight", "past_out_proj.weight", "kv_a_proj_with_mqa.weight", "v_proj.weight"):
        found = model.blocks[1].attn1.get_parameter(name).grad
        assert relative(found, ours.blocks[1].self_attn.get_parameter(name).grad) < 1e-4, name  # type: ignore[union-attr, arg-type]


def test_a_dense_class_refuses_it(presents: dict[str, Path]) -> None:
    with pytest.raises(Exception, match="mla") as caught:
        diffusers.WanTransformer3DModel.from_pretrained(presents["heads"])
    assert "WanMLATransformer3DModel" in str(caught.value)
