"""Converted models in diffusers: loaded, saved, in pipelines, offloaded, compiled, and with LoRAs."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_cases import TOLERANCE, diffusers
from hub_server import Blob, Hub
from safetensors.torch import load_file
from support import SaveFolder, relative
from torch.nn import functional
from wan_diffusers import IMAGE, SMALL, inputs, reference

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, OutputError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel


@pytest.mark.parametrize("image_dim", [None, 10])
@pytest.mark.parametrize("text_len", [512, 16])
def test_the_config_of_a_layout_is_read_back(image_dim: int | None, text_len: int) -> None:
    """What diffusers' own class makes of its fields, and what we read from ours."""
    family = WanFamily()
    config = WanConfig(
        dim=36, num_heads=3, num_layers=2, ffn_dim=44, text_len=text_len, image_dim=image_dim, text_dim=14
    )
    shapes = family.expected_shapes(config)
    raw = family.raw_config(config, "diffusers")
    theirs = diffusers.WanTransformer3DModel.from_config(raw)
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == {
        family.source(name, "diffusers"): shape for name, shape in shapes.items()
    }
    infos = {name: _info(name, shape) for name, shape in shapes.items()}
    assert family.parse_config(raw, infos) == dataclasses.replace(config, model_type=config.model_type)
    assert set(raw) - {"text_len", "_class_name"} == {name for name in theirs.config if not name.startswith("_")} - {
        "text_len"
    }


def _info(name: str, shape: tuple[int, ...]) -> Any:
    from mlaconvert.files.headers import TensorInfo

    return TensorInfo(name, shape, torch.float32, 0)


@pytest.mark.parametrize("layout", ["native", "diffusers", None])
def test_convert_writes_the_layout_that_is_asked_for(folders: dict[str, Path], tmp_path: Path, layout: Any) -> None:
    convert(folders["source"], tmp_path / "out", ConvertRecipe(init="svd", layout=layout))
    with open_checkpoint(tmp_path / "out") as found, open_checkpoint(folders["svd"]) as expected:
        assert found.layout == (layout or "diffusers")
        assert found.config == expected.config
        assert set(found.names) == set(expected.names)
        for name in found.names:
            assert torch.equal(found.read(name), expected.read(name)), name
    names = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert ("blocks.0.self_attn.kv_b_proj.weight" in names) == (layout == "native")
    raw = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert ("num_heads" in raw) == (layout == "native")
    assert raw["_class_name"] == "WanMLATransformer3DModel"


def test_a_native_source_becomes_diffusers(golden: Path, tmp_path: Path) -> None:
    """Dense layers of the output load into diffusers' own class."""
    convert(golden, tmp_path / "out", ConvertRecipe(init="svd", layers="1", layout="diffusers"))
    weights = load_file(tmp_path / "out" / WEIGHTS_NAME)
    theirs = diffusers.WanTransformer3DModel.from_config(json.loads((tmp_path / "out" / CONFIG_NAME).read_text()))
    found = theirs.load_state_dict(weights, strict=False)
    assert {name.split(".")[1] for name in (*found.missing_keys, *found.unexpected_keys)} == {"1"}


@pytest.mark.parametrize("name", ["svd", "partly", "streaming", "lossless"])
@pytest.mark.parametrize("text", [512, 9])
@torch.no_grad()
def test_equals_our_runtime(folders: dict[str, Path], name: str, text: int) -> None:
    """Our runtime fills texts up to 512 tokens as Wan's own code does; in diffusers, the pipeline does it."""
    ours, theirs = load_model(folders[name]), WanMLATransformer3DModel.from_pretrained(folders[name])
    x, t, context = inputs(text=text)
    expected = ours(x, t, context)
    context = functional.pad(context, (0, 0, 0, 512 - text))
    assert relative(theirs(x, t, context).sample, expected) < TOLERANCE
    assert relative(theirs(x, t, context, return_dict=False)[0], expected) < TOLERANCE
    if name == "streaming":
        everything_seen = dataclasses.replace(ours.config, streaming=None)
        seen = WanModel(everything_seen)
        seen.load_state_dict(ours.state_dict())
        assert relative(seen(x, t, context), expected) > 1e-3


@torch.no_grad()
def test_lossless_and_dense_equal_diffusers_own(teacher: Any, folders: dict[str, Path]) -> None:
    """In one timestep a video, and in one a token as Wan2.2 5B's pipeline gives them."""
    lossless = WanMLATransformer3DModel.from_pretrained(folders["lossless"])
    dense = WanMLATransformer3DModel.from_pretrained(folders["source"])
    x, t, context = inputs()
    tokens = torch.linspace(0, 900, 5 * 3 * 5).expand(2, -1)
    for timestep in (t, tokens):
        expected = teacher(x, timestep, context).sample
        assert relative(dense(x, timestep, context).sample, expected) == 0
        assert relative(lossless(x, timestep, context).sample, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", [1, 9, 77, 226, 511, 513])
@torch.no_grad()
def test_text_of_any_length_is_read_as_diffusers_reads_it(
    folders: dict[str, Path], text: int, dtype: torch.dtype
) -> None:
    teacher = diffusers.WanTransformer3DModel.from_pretrained(folders["source"], torch_dtype=dtype)
    lossless = WanMLATransformer3DModel.from_pretrained(folders["lossless"], torch_dtype=dtype)
    x, t, context = (part.to(dtype) for part in inputs(text=text))
    expected = teacher(x, t, context).sample
    assert relative(lossless(x, t, context).sample, expected) < TOLERANCE
    if text < 500:
        filled = functional.pad(context, (0, 0, 0, 512 - text))
        assert relative(lossless(x, t, filled).sample, expected) > 1e-3


@torch.no_grad()
def test_image_to_video(save_folder: SaveFolder, tmp_path: Path) -> None:
    model = reference(**IMAGE)
    source = save_folder({k: v.contiguous() for k, v in model.state_dict().items()}, dict(model.config))
    convert(source, tmp_path / "lossless", ConvertRecipe(init="lossless"))
    lossless = WanMLATransformer3DModel.from_pretrained(tmp_path / "lossless")
    for text, tokens in ((512, 257), (512, 0), (300, 257)):  # the last is read askew, as diffusers reads it
        x, t, context = inputs(9, 3, text)
        features = torch.randn(2, tokens, 10) if tokens else None
        assert relative(lossless(x, t, context, features).sample, model(x, t, context, features).sample) < TOLERANCE
    convert(source, tmp_path / "out", ConvertRecipe(init="svd"))
    ours, theirs = load_model(tmp_path / "out"), WanMLATransformer3DModel.from_pretrained(tmp_path / "out")
    x, t, context = inputs(9, 3)
    image = torch.randn(2, 257, 10)
    expected = ours(x, t, context, image_features=image)
    assert relative(theirs(x, t, context, image).sample, expected) < TOLERANCE
    assert relative(theirs(x, t, context).sample, expected) > 1e-3
    with pytest.raises(UnsupportedModelError, match="512"):
        WanMLATransformer3DModel(**SMALL, image_dim=10, added_kv_proj_dim=36, text_len=16)


@pytest.mark.parametrize("name", ["svd", "partly", "streaming"])
def test_saving_writes_back_what_was_loaded(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = WanMLATransformer3DModel.from_pretrained(folders[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    for file in (WEIGHTS_NAME, CONFIG_NAME, "conversion.json"):
        assert filecmp.cmp(folders[name] / file, tmp_path / "new" / "folder" / file, shallow=False), file
    with pytest.raises(OutputError, match="overwrite=True"):
        model.save_pretrained(folders[name])
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    model.save_pretrained(tmp_path / "new" / "folder", overwrite=True, max_shard_size="40KB")
    again = WanMLATransformer3DModel.from_pretrained(tmp_path / "new" / "folder")
    assert len(list((tmp_path / "new" / "folder").glob("*.safetensors"))) > 1
    assert torch.equal(again.proj_out.bias, model.proj_out.bias)
    assert load_model(tmp_path / "new" / "folder").config == load_model(folders[name]).config


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way of sending files
def test_a_repository_on_the_hub(folders: dict[str, Path], hub: Hub) -> None:
    for name in ("svd", "partly"):  # diffusers' layout and the native one
        files = {file.name: Blob(file.read_bytes(), file.suffix == ".safetensors") for file in folders[name].iterdir()}
        hub.create(f"alice/{name}").commit(files)
        found = WanMLATransformer3DModel.from_pretrained(f"alice/{name}").state_dict()
        expected = WanMLATransformer3DModel.from_pretrained(folders[name]).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_made_from_a_config_is_saved_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = WanMLATransformer3DModel.from_pretrained(folders["svd"])
    made = WanMLATransformer3DModel.from_config(loaded.config)
    made.load_state_dict(loaded.state_dict())
    made.save_pretrained(tmp_path / "made")
    x, t, context = inputs()
    with torch.no_grad():
        assert relative(load_model(tmp_path / "made")(x, t, context), load_model(folders["svd"])(x, t, context)) == 0


def test_half_precision_keeps_what_diffusers_keeps(folders: dict[str, Path], tmp_path: Path) -> None:
    kept = WanMLATransformer3DModel.from_pretrained(folders["svd"], torch_dtype=torch.bfloat16)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folders["source"], torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    common = {name: p.dtype for name, p in kept.named_parameters() if name in dtypes}
    assert len(common) > 40
    assert common == {name: dtypes[name] for name in common}
    assert kept.dtype == theirs.dtype == torch.bfloat16
    x, t, context = inputs()
    with torch.no_grad():
        found = kept(x.bfloat16(), t, context.bfloat16()).sample
        assert relative(found, load_model(folders["svd"])(x, t, context)) < 0.03
    convert(folders["source"], tmp_path / "half", ConvertRecipe(init="svd", dtype="bfloat16"))
    half = WanMLATransformer3DModel.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "half" / WEIGHTS_NAME, tmp_path / "again" / WEIGHTS_NAME, shallow=False)


def test_options_that_mean_nothing_here_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        WanMLATransformer3DModel.from_pretrained(folders["svd"], token="secret")
    model = WanMLATransformer3DModel.from_pretrained(folders["svd"], low_cpu_mem_usage=True, variant=None)
    for option in ({"variant": "fp16"}, {"push_to_hub": True}, {"safe_serialization": False}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            model.save_pretrained(tmp_path / "out", **option)
    with pytest.raises(ConfigError, match="5GB"):
        model.save_pretrained(tmp_path / "out", max_shard_size="5 parsecs")
    assert not (tmp_path / "out").exists()


def test_importing_mlaconvert_imports_no_diffusers() -> None:
    code = "import sys, mlaconvert.cli, mlaconvert.integrations; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
