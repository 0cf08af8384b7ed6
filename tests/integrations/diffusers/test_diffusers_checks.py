"""The checks of `examples/diffusers_checks.py` on conversions of every kind, and that they fail where they should."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_cases import STREAMING
from documents import ROOT
from support import count_bits
from wan_diffusers import IMAGE, reference

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel
from mlaconvert.integrations.diffusers_attention import LatentSelfAttention

EXAMPLE = runpy.run_path(str(ROOT / "examples/diffusers_checks.py"))
CHECKS: dict[str, Callable[[Path, Path], None]] = EXAMPLE["CHECKS"]
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all layers": ("WanTransformer3DModel", {}, {}),
    "partly, native, streaming": (
        "WanTransformer3DModel", {}, {"layers": "0,2", "layout": "native", "key_norm": "token", "rope": "latent",
                                      "streaming": STREAMING},
    ),
    "exact present": (
        "WanTransformer3DModel", {}, {"present": "exact", "rope": "head", "v_dim": 7, "streaming": STREAMING},
    ),
    "in bits": ("WanTransformer3DModel", {}, {"layers": "0,2", "key_norm": "token", "streaming": STREAMING}),
    "image to video": ("WanTransformer3DModel", IMAGE, {}),
    "SkyReels-V2": ("SkyReelsV2Transformer3DModel", {}, {"layers": "0,1"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checks")
    for name, (source, sizes, recipe) in KINDS.items():
        reference(source, **sizes).save_pretrained(root / "source" / name)
        convert(root / "source" / name, root / name, ConvertRecipe(init="svd", **recipe))
    count_bits(root / "in bits")
    return {name: root / name for name in KINDS}


@pytest.mark.filterwarnings("ignore")  # diffusers' and accelerate's own, of options that the checks mean
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_passes(kinds: dict[str, Path], tmp_path: Path, kind: str, check: str) -> None:
    CHECKS[check](kinds[kind], tmp_path)


def not_the_same_twice(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return self.to_out[0](self.heads(x, *rest)) + torch.randn(())


def without_gradients(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return self.to_out[0](self.heads(x, *rest).detach())


FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(
        ("outputs", "save_and_load", "save_in_shards", "device_maps", "layerwise_casting", "group_offload"),
        not_the_same_twice,
    ),
    "training": without_gradients,
    "gradient_checkpointing": not_the_same_twice,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", FAULTS)
def test_a_check_fails_where_it_should(
    kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    monkeypatch.setattr(LatentSelfAttention, "attended", FAULTS[check])
    with pytest.raises(AssertionError):
        CHECKS[check](kinds["all layers"], tmp_path)


def test_a_weight_that_is_not_saved_shows(
    kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model would write what it was loaded from."""

    def stale(self: Any, target: Path, **options: Any) -> None:
        fresh = WanMLATransformer3DModel.from_pretrained(kinds["all layers"])
        with torch.no_grad():
            fresh.blocks[1].attn1.kv_b_proj.weight.mul_(1.1)
        original(fresh, target, **options)

    original = WanMLATransformer3DModel.save_pretrained
    monkeypatch.setattr(WanMLATransformer3DModel, "save_pretrained", stale)
    for name in ("save_and_load", "save_in_shards"):
        with pytest.raises(AssertionError):
            CHECKS[name](kinds["all layers"], tmp_path)


def run_example(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["diffusers_checks.py", str(folder)])
    EXAMPLE["main"]()


@pytest.mark.parametrize(("folder", "said"), [("source/all layers", "the model is dense"), ("gone", "no such file")])
def test_what_is_no_converted_folder_is_said(
    kinds: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    said: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_example(monkeypatch, kinds["all layers"].parent / folder)
    assert caught.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert said in found.err


def test_a_check_that_breaks_does_not_stop_the_others(
    kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path, scratch: Path) -> None:
        raise RuntimeError("out of memory")

    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    for name, check in {"first_one": broken, "next_one": lambda folder, scratch: None}.items():
        monkeypatch.setitem(CHECKS, name, check)
    with pytest.raises(SystemExit) as caught:
        run_example(monkeypatch, kinds["all layers"])
    assert caught.value.code == 1
    assert capsys.readouterr().out == "first one: failed, RuntimeError: out of memory\nnext one: passed\n"
