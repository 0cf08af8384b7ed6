"""Conversion of whole checkpoints: small ones of odd sizes in every layout, and the golden model without loss."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from convert_cases import EXACT, NATIVE, SVD, SaveFolder, State, files, listing
from safetensors import safe_open
from safetensors.torch import save_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import ConversionListener, convert, preview
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.output import Output
from mlaconvert.model.load import load_model


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kv_rank": 61}, "kv_rank is 61, larger than the layer, which is 60 wide"),
        ({"q_rank": 61}, "q_rank is 61, larger than the layer"),
        ({"rope_dim": 22}, "rope_dim is 22, larger than the head, which is 20 wide"),
        ({"nope_dim": 21}, "nope_dim is 21, larger than the head"),
        ({"v_dim": 21}, "v_dim is 21, larger than the head"),
        ({"nope_dim": 18}, "nope_dim 18 and rope_dim 4 are 22 wide together, a head is 20"),
        ({"layers": "1-3"}, "layer 3 does not exist, the model has 0 to 2"),
        ({"height": 100}, "height is 100 pixels: give a multiple of 16"),
    ],
)
def test_budgets_larger_than_the_layer(source: Path, tmp_path: Path, recipe: Any, message: str) -> None:
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", **recipe))
    assert listing(tmp_path) == before


def spoil_nan(folder: Path, state: State) -> str:
    state["blocks.2.self_attn.v.weight"] = state["blocks.2.self_attn.v.weight"].clone()
    state["blocks.2.self_attn.v.weight"][4, 7] = float("nan")
    save_file(state, folder / WEIGHTS_NAME)
    return r"blocks\.2\.self_attn\.v\.weight"


def spoil_inf(folder: Path, state: State) -> str:
    state["head.head.bias"] = state["head.head.bias"] + float("inf")
    save_file(state, folder / WEIGHTS_NAME)
    return r"head\.head\.bias"


def spoil_zero(folder: Path, state: State) -> str:
    for name in ("k.weight", "k.bias"):
        state[f"blocks.1.self_attn.{name}"] = torch.zeros_like(state[f"blocks.1.self_attn.{name}"])
    save_file(state, folder / WEIGHTS_NAME)
    return "layer 1 are degenerate"


def spoil_shape(folder: Path, state: State) -> str:
    state["blocks.0.ffn.0.weight"] = torch.ones(44, 59)
    save_file(state, folder / WEIGHTS_NAME)
    return r"blocks\.0\.ffn\.0\.weight.*\[44, 59\]"


def spoil_truncated(folder: Path, state: State) -> str:
    data = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(data[:-100])
    return WEIGHTS_NAME


def spoil_empty(folder: Path, state: State) -> str:
    (folder / WEIGHTS_NAME).unlink()
    return "holds no weights"


def spoil_converted(folder: Path, state: State) -> str:
    convert(folder, folder.parent / "once", SVD)
    shutil.rmtree(folder)
    (folder.parent / "once").rename(folder)
    return "converted already"


@pytest.mark.parametrize(
    "spoil", [spoil_nan, spoil_inf, spoil_zero, spoil_shape, spoil_truncated, spoil_empty, spoil_converted]
)
def test_bad_sources(source: Path, state: State, tmp_path: Path, spoil: Callable[[Path, State], str]) -> None:
    pattern = spoil(source, dict(state))
    before = listing(tmp_path)
    with pytest.raises(InputError, match=pattern) as raised:
        convert(source, tmp_path / "out", SVD)
    assert raised.value.exit_code == 2
    assert str(source) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before


def test_outputs_that_are_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "out", SVD)
    with pytest.raises(OutputError, match="exists"):
        preview(source, tmp_path / "out", SVD)
    with pytest.raises(OutputError, match="holds the source"):
        convert(source, Output(source, overwrite=True), SVD)
    with pytest.raises(OutputError, match="holds the source"):
        convert(source, Output(tmp_path, overwrite=True), SVD)
    convert(source, Output(tmp_path / "out", overwrite=True), SVD)
    convert(source, Output(tmp_path / "out", overwrite=True), EXACT)
    assert load_model(tmp_path / "out").config.cached_scalars() == (9, 9, 9)


def test_disk_space_is_checked_before_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    shown: list[Any] = []
    with pytest.raises(OutputError, match="free on its disk"):
        convert(source, tmp_path / "out", SVD, listener=ConversionListener(on_plan=shown.append))
    assert shown == []


def test_half_precision_overflow_is_an_error(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    large = dict(state)
    large["blocks.2.ffn.0.bias"] = large["blocks.2.ffn.0.bias"] + 1e6
    source = save_folder(large, NATIVE)
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=r"blocks\.2\.ffn\.0\.bias.*does not fit torch\.float16"):
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", dtype="float16"))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("bad", ["quantum", "cuda:99", "meta"])
def test_a_device_that_is_not_there(source: Path, tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match=bad):
        convert(source, tmp_path / "out", SVD, device=bad)


def test_dry_run_plans_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    report = preview(source, tmp_path / "out", SVD)
    assert files(tmp_path) == before
    plan = report.models[0].plan
    assert (plan.dense_scalars, plan.mla_scalars) == (360, 24)
    convert(source, tmp_path / "out", SVD)
    with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as opened:
        written = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert plan.output_bytes == sum(tensor.nbytes for tensor in written.values())
    planned = plan.to_json()["tensors"]
    assert {t["name"]: t["shape"] for t in planned} == {n: list(t.shape) for n, t in written.items()}
    assert sum(t["converted"] for t in planned) == 3 * 11
