"""Published relatives of Wan, converted: from weights, calibrated, in another layout, and run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from golden_relatives import FUN, make, vectors
from safetensors.torch import load_file, save_file
from support import relative

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.analyze import analyze
from mlaconvert.conversion.calibration.method import CalibrationSetup
from mlaconvert.conversion.from_weights import layer_modulation, time_modulation
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.integrations.collect import Pass, collect
from mlaconvert.model.load import load_model

TOLERANCE = 1e-5
SIZES: dict[str, tuple[int, dict[str, object]]] = {
    "krea_tiny": (11, {"in_dim": 5, "out_dim": 5}),
    "skyreels_v2_tiny": (21, {"in_dim": 5, "out_dim": 5, "fps": 24}),
    "longlive_2_tiny": (31, {"in_dim": 6, "out_dim": 6}),
    **{f"wan_fun_tiny/{name}": (seed, {"in_dim": 15, "out_dim": 5, **parts}) for name, (seed, parts) in FUN.items()},
}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of clips, of as many channels as `channels` says."""
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def fill(clips: Path, channels: int) -> Path:
    g = torch.Generator().manual_seed(5)
    latents, context = torch.randn(3, channels, 9, 6, 10, generator=g), torch.randn(3, 7, 14, generator=g)
    save_file({"latents": latents, "context": context}, clips / "a.safetensors")
    return clips


@pytest.mark.parametrize("name", SIZES)
def test_from_weights(name: str, tmp_path: Path) -> None:
    """A lossless conversion gives what the dense model gives, which is what their class gives."""
    seed, geometry = SIZES[name]
    source = make(tmp_path, name, seed, **geometry)
    assert len(analyze(source).layers) == 2
    made = convert(source, tmp_path / "svd", ConvertRecipe(init="svd", kv_rank=9), verify=True)
    assert made.models[0].verification is not None
    kept = load_file(tmp_path / "svd" / WEIGHTS_NAME)
    dense = load_file(source / WEIGHTS_NAME)
    assert all(torch.equal(kept[key], value) for key, value in dense.items() if ".self_attn." not in key)
    convert(source, tmp_path / "lossless", ConvertRecipe(init="lossless"))
    one, other = (load_model(folder, streaming=None) for folder in (source, tmp_path / "lossless"))
    v = vectors(name.split("/", maxsplit=1)[0])
    given: dict[str, Any] = {}
    if "fun" in name:
        features = torch.rand(2, 257, 1280, generator=torch.Generator().manual_seed(43)) - 0.5
        given = {"image_latents": v["y"], "image_features": features if "image_dim" in geometry else None}
        given |= {"reference": v["reference"]} if "reference_dim" in geometry else {}
    t = v["t"] if v.get("t", torch.empty(0)).ndim == 1 and "t" in v else torch.tensor([625.0] * len(v["x"]))
    x = v["x"][:, :, :6]
    assert relative(other(x, t, v["context"], **given), one(x, t, v["context"], **given)) < TOLERANCE


@pytest.mark.parametrize("name", ["krea_tiny", "skyreels_v2_tiny", "longlive_2_tiny"])
def test_calibrated_on_clips(name: str, tmp_path: Path, clips: Path) -> None:
    seed, geometry = SIZES[name]
    source = make(tmp_path, name, seed, **geometry)
    recipe = ConvertRecipe(kv_rank=9, clips=3, height=48, width=80)
    made = convert(source, tmp_path / "out", recipe, data=fill(clips, int(str(geometry["in_dim"]))), verify=True)
    assert made.models[0].verification is not None
    model = load_model(tmp_path / "out")
    assert model.config.fps == geometry.get("fps")
    assert (model.config.streaming is None) == (name == "skyreels_v2_tiny")
    v = vectors(name)
    x = v["x"][:1, :, :6]
    assert relative(model(x, torch.tensor([300.0]), v["context"][:1]), load_model(source)(
        x, torch.tensor([300.0]), v["context"][:1])) < 0.2  # fmt: skip


def test_a_frame_rate_modulates_what_self_attention_reads(tmp_path: Path) -> None:
    """`--init svd` and `--verify` reckon with the modulation, of which the frame rate is a part."""
    seed, geometry = SIZES["skyreels_v2_tiny"]
    source = make(tmp_path, "skyreels_v2_tiny", seed, **geometry)
    model = load_model(source)
    with open_checkpoint(source) as checkpoint:
        found = layer_modulation(checkpoint, 1, time_modulation(checkpoint, [300.0, 20.0]))
    _, modulation = model.embed_time(torch.tensor([300.0, 20.0]), 2, 1)
    expected = (modulation + model.blocks[1].modulation)[:, 0, :2]
    assert relative(found.float(), expected) < TOLERANCE


def test_a_frame_rate_keeps_its_meaning_in_another_layout(tmp_path: Path) -> None:
    seed, geometry = SIZES["skyreels_v2_tiny"]
    source, v = make(tmp_path, "skyreels_v2_tiny", seed, **geometry), vectors("skyreels_v2_tiny")
    raw = json.loads((source / CONFIG_NAME).read_text())
    (source / CONFIG_NAME).write_text(json.dumps(raw | {"fps": 16}))
    convert(source, tmp_path / "out", ConvertRecipe(init="lossless", layout="diffusers"))
    assert "fps_projection.net.0.proj.weight" in load_file(tmp_path / "out" / WEIGHTS_NAME)
    found = load_model(tmp_path / "out")(v["x"], v["t"], v["context"])
    assert relative(found, v["fps16.out"]) < TOLERANCE


def test_a_reference_has_no_place_in_diffusers(tmp_path: Path) -> None:
    seed, geometry = SIZES["wan_fun_tiny/control22"]
    source = make(tmp_path, "wan_fun_tiny/control22", seed, **geometry)
    with pytest.raises(UnsupportedModelError, match=r"reference image \(ref_conv\), which no class of diffusers"):
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", layout="diffusers"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FUN)
def test_a_control_model_is_calibrated_on_what_was_collected(name: str, tmp_path: Path, clips: Path) -> None:
    """Clips hold no control latents; a run with them does, and the reference's tokens are part of what is seen."""
    seed, geometry = SIZES[f"wan_fun_tiny/{name}"]
    source, v = make(tmp_path, f"wan_fun_tiny/{name}", seed, **geometry), vectors("wan_fun_tiny")
    for data in (None, fill(clips, 5)):
        with pytest.raises(ConfigError, match=r"clips hold no image or control latents.*mlaconvert\.collect"):
            convert(source, tmp_path / "out", ConvertRecipe(kv_rank=9), data=data)
    model = load_model(source)
    frames = 4 if "reference_dim" in geometry else 3
    features = torch.rand(2, 257, 1280, generator=torch.Generator().manual_seed(43)) - 0.5
    given: dict[str, Any] = {"image_latents": v["y"]}
    given |= {"image_features": features} if "image_dim" in geometry else {}
    given |= {"reference": v["reference"]} if "reference_dim" in geometry else {}

    def read(arguments: Mapping[str, Any]) -> Pass:
        return Pass(arguments["x"], (frames, 3, 5))

    with collect(model, output=tmp_path / "moments", read=read), torch.no_grad():
        for t in (900.0, 500.0, 100.0):
            model(v["x"], torch.tensor([t, t]), v["context"], **given)
    setup = CalibrationSetup(moments=tmp_path / "moments")
    convert(source, tmp_path / "out", ConvertRecipe(kv_rank=40), data=setup, verify=True)
    expected = model(v["x"], v["t"], v["context"], **given)
    assert relative(load_model(tmp_path / "out")(v["x"], v["t"], v["context"], **given), expected) < 0.1


def test_generated_where_it_can_be(tmp_path: Path) -> None:
    save_file(
        {"context": torch.randn(1, 7, 14, generator=torch.Generator().manual_seed(1))}, tmp_path / "text.safetensors"
    )
    given = (
        "--embeddings",
        tmp_path / "text.safetensors",
        "--frames",
        "3",
        "--height",
        "96",
        "--width",
        "96",
        "--steps",
        "1",
    )
    for name, says in (("skyreels_v2_tiny", "told 24 frames a second"), ("krea_tiny", ""), ("longlive_2_tiny", "")):
        seed, geometry = SIZES[name]
        folder = make(tmp_path, name, seed, **geometry)
        code, _, stderr = invoke("generate", folder, *given, "-o", tmp_path / f"{name}-out")
        assert code == 0, stderr
        assert says in stderr
    seed, geometry = SIZES["wan_fun_tiny/inp"]
    folder = make(tmp_path, "wan_fun_tiny/inp", seed, **geometry)
    code, _, stderr = invoke("generate", folder, *given, "-o", tmp_path / "inp-out")
    assert code == 2
    assert "needs image_latents [1, 10, 3, 12, 12]" in " ".join(stderr.split())
    save_file(
        {"image_latents": torch.zeros(1, 10, 3, 12, 12), "image_features": torch.zeros(1, 257, 1280)},
        tmp_path / "image.safetensors",
    )
    more = ("--given", tmp_path / "image.safetensors", "-o", tmp_path / "inp-out")
    code, _, stderr = invoke("generate", folder, *given, *more)
    assert code == 0, stderr
    seed, geometry = SIZES["wan_fun_tiny/control"]
    folder = make(tmp_path, "wan_fun_tiny/control", seed, **geometry)
    code, _, stderr = invoke("generate", folder, *given, "-o", tmp_path / "control")
    assert code == 2
    assert "given a control video and a reference image with every clip" in " ".join(stderr.split())
    assert not (tmp_path / "control").exists()


def test_windows_are_what_their_files_say(tmp_path: Path) -> None:
    seed, geometry = SIZES["longlive_2_tiny"]
    with open_checkpoint(make(tmp_path, "longlive_2_tiny", seed, **geometry)) as checkpoint:
        assert checkpoint.config.streaming == StreamingConfig(
            chunk_frames=2, window_frames=6, sink_frames=2, positions="absolute"
        )
