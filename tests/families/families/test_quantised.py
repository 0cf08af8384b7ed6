"""Quantised sources: float8 and GGUF are decoded as they are read, held against the sum written longhand and the gguf
package's own quantiser; other kinds are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families_cases import State
from safetensors.torch import load_file, save_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.merged import remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.model.load import load_model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def scaled(
    state: State, leaf: str, *, rows: str = "", dtype: torch.dtype = E4M3, prefix: str = "", more: State | None = None
) -> tuple[State, State]:
    """What a file holds, and what it means: W / s in float8 beside s, one number or one a row."""
    held, meant = {}, {}
    for name, tensor in state.items():
        if not is_quantised(name, tensor):
            held[prefix + name] = meant[name] = tensor.clone()
            continue
        scale = tensor.abs().amax(1 if rows else None, keepdim=bool(rows)) / 100
        held[prefix + name] = (tensor / scale).to(dtype)
        held[prefix + name.removesuffix("weight") + leaf] = scale.flatten() if rows == "flat" else scale
        meant[name] = (held[prefix + name].double() * scale.double()).float().to(torch.bfloat16)
    return held | (more or {}), meant


def plain(state: State, dtype: torch.dtype) -> tuple[State, State]:
    held = {name: tensor.to(dtype) if is_quantised(name, tensor) else tensor for name, tensor in state.items()}
    return held, {
        name: tensor.to(torch.bfloat16) if is_quantised(name, tensor) else tensor for name, tensor in held.items()
    }


def comfy(kind: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def in_blocks(state: State, leaf: str, side: int, more: State | None = None) -> tuple[State, State]:
    """A scale for each square of `side`, the last ones cut off; what each element means, one block after the other."""
    held, meant = {}, {}
    for name, tensor in state.items():
        held[name] = meant[name] = tensor.clone()
        if not is_quantised(name, tensor) or (leaf == "weight_scale" and min(tensor.shape) % side):
            continue
        counts = [-(-size // side) for size in tensor.shape]
        scale, small, decoded = torch.zeros(counts), tensor.to(E4M3), torch.zeros(tensor.shape).double()
        for i in range(counts[0]):
            for j in range(counts[1]):
                block = (slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side))
                scale[i, j] = tensor[block].abs().max() / 448
                small[block] = (tensor[block] / scale[i, j]).to(E4M3)
                decoded[block] = small[block].double() * scale[i, j].double()
        held[name], held[name.removesuffix("weight") + leaf] = small, scale
        meant[name] = decoded.float().to(torch.bfloat16)
    return held | (more or {}), meant


Q = "blocks.0.self_attn.q"
FILES: dict[str, tuple[Callable[[State], tuple[State, State]], str]] = {
    "ComfyUI, scaled": (
        lambda s: scaled(
            s, "scale_weight", more={"scaled_fp8": torch.zeros(0, dtype=E4M3), f"{Q}.scale_input": torch.ones(())}
        ),
        "float8_e4m3fn with scales",
    ),
    "ComfyUI, all in one": (
        lambda s: scaled(s, "scale_weight", prefix="model.diffusion_model.", more={
            "model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=E4M3),
        }),
        "float8_e4m3fn with scales",
    ),
    "LightX2V, a scale a row": (lambda s: scaled(s, "weight_scale", rows="column"), "float8_e4m3fn with scales"),
    "a flat scale a row": (lambda s: scaled(s, "weight_scale", rows="flat", dtype=E5M2), "float8_e5m2 with scales"),
    "ComfyUI, mixed": (
        lambda s: scaled(s, "weight_scale", more={
            f"{Q}.comfy_quant": comfy("float8_e4m3fn"), f"{Q}.input_scale": torch.ones(1),
            "blocks.1.ffn.0.comfy_quant": torch.zeros(25, dtype=torch.uint8),
        }),
        "float8_e4m3fn with scales",
    ),
    "DeepSeek, a scale a block": (
        lambda s: in_blocks(s, "weight_scale_inv", 128), "float8_e4m3fn with scales of blocks of 128 x 128",
    ),
    "ComfyUI, in blocks": (
        lambda s: in_blocks(s, "weight_scale", 32, {f"{Q}.comfy_quant": comfy("float8_e4m3fn_blockwise")}),
        "float8_e4m3fn with scales of blocks of 32 x 32",
    ),
    "plain": (lambda s: plain(s, E4M3), "float8_e4m3fn"),
    "plain, more range": (lambda s: plain(s, E5M2), "float8_e5m2"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_float8_is_decoded(case: str, golden: Path, golden_state: State, tmp_path: Path) -> None:
    make, kind = FILES[case]
    held, meant = make(golden_state)
    save_file(held, tmp_path / "m.safetensors")
    source = Source(tmp_path / "m.safetensors", config=golden / "config.json")
    with open_checkpoint(source) as checkpoint:
        assert remarks(checkpoint) == [f"quantised weights ({kind}): decoded to bfloat16 as they are read"]
        assert set(checkpoint.names) == set(golden_state)
        for name, tensor in meant.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype == checkpoint.info(name).dtype
            assert torch.equal(found, tensor), name
    convert(source, tmp_path / "out", ConvertRecipe(init="random", layers="0,2"), verify=True)
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    layer_1 = [name for name in meant if not name.startswith(("blocks.0.self_attn.", "blocks.2.self_attn."))]
    assert all(torch.equal(written[name], meant[name]) for name in layer_1)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["decoded"] == kind
    assert load_model(source).blocks[1].ffn[0].weight.isfinite().all()


def test_a_linear_patch_embedding_in_float8(golden: Path, golden_state: State, tmp_path: Path) -> None:
    weight = golden_state["patch_embedding.weight"]
    small = weight.to(E4M3)
    save_file(golden_state | {"patch_embedding.weight": small.view(len(small), -1)}, tmp_path / "m.safetensors")
    with open_checkpoint(Source(tmp_path / "m.safetensors", config=golden / "config.json")) as checkpoint:
        assert torch.equal(checkpoint.read("patch_embedding.weight"), small.to(torch.bfloat16))


def test_float8_pickles(golden: Path, golden_state: State, tmp_path: Path) -> None:
    held, meant = scaled(golden_state, "scale_weight")
    torch.save({"generator": held}, tmp_path / "m.pt")
    with open_checkpoint(Source(tmp_path / "m.pt", config=golden / "config.json")) as checkpoint:
        assert checkpoint.state_key == "generator"
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in meant.items())


BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "bitsandbytes NF4": (lambda s: {f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.ones(3)}, "NF4 or FP4"),
    "bitsandbytes int8": (lambda s: {f"{Q}.SCB": torch.ones(96)}, "int8 by bitsandbytes"),
    "SVDQuant": (
        lambda s: {f"{Q}.qweight": torch.ones(96, 48, dtype=torch.int8), f"{Q}.wscales": torch.ones(3, 96),
                   f"{Q}.lora_down": torch.ones(96, 4)},
        "SVDQuant",
    ),
    "AWQ": (lambda s: {f"{Q}.qzeros": torch.ones(3, 5, dtype=torch.int32)}, "GPTQ or AWQ"),
    "NVFP4 of LongLive 2.0": (
        lambda s: {f"{Q}.quantized_weight_values": torch.ones(96, 48, dtype=torch.uint8)}, "NVFP4",
    ),
    "NVFP4": (lambda s: {f"{Q}.weight_scale_2": torch.ones(())}, "NVFP4"),
    "blocks of another size": (
        lambda s: {f"{Q}.weight": s[f"{Q}.weight"].to(E4M3), f"{Q}.weight_scale_inv": torch.ones(2, 2)},
        r"q.weight_scale_inv' is \[2, 2\] .* a weight \[96, 96\] in blocks of 128 x 128",
    ),
    "blocks of nothing": (
        lambda s: {f"{Q}.weight_scale_inv": torch.ones(1, 1)}, "scale of a weight that is torch.float",
    ),
    "MXFP8": (
        lambda s: {f"{Q}.weight": s[f"{Q}.weight"].to(E4M3), f"{Q}.weight_scale": torch.ones(96, 3).to(torch.uint8)},
        "quantised to MXFP8",
    ),
    "NVFP4 of ComfyUI": (
        lambda s: {f"{Q}.weight": torch.ones(96, 48, dtype=torch.uint8), f"{Q}.weight_scale_2": torch.ones(()),
                   f"{Q}.weight_scale": torch.ones(96, 6).to(E4M3), f"{Q}.comfy_quant": comfy("nvfp4")},
        "NVFP4",
    ),
    "quanto": (lambda s: {f"{Q}.weight._data": torch.ones(96, 96, dtype=torch.int8)}, "quanto"),
    "int8 with scales": (
        lambda s: {f"{Q}.weight": torch.ones(96, 96, dtype=torch.int8), f"{Q}.weight_scale": torch.ones(96, 1)},
        "quantised to int8",
    ),
    "ComfyUI's other formats": (
        lambda s: {f"{Q}.weight": s[f"{Q}.weight"].to(E4M3), f"{Q}.comfy_quant": comfy("mxfp8")},
        "quantised to 'mxfp8' by ComfyUI",
    ),
    "scales of no blocks": (
        lambda s: {f"{Q}.weight": s[f"{Q}.weight"].to(E4M3), f"{Q}.weight_scale": torch.ones(3, 4)},
        r"q.weight_scale' is \[3, 4\] of torch.float32, .*one a row",
    ),
    "scales of columns": (
        lambda s: {f"{Q}.weight": s[f"{Q}.weight"].to(E4M3), f"{Q}.weight_scale": torch.ones(1, 96)},
        r"q.weight_scale' has shape \[1, 96\], expected \[96, 1\]",
    ),
    "a scale of nothing": (lambda s: {f"{Q}.weight_scale": torch.ones(())}, "scale of a weight that is torch.float"),
}  # fmt: skip

if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    BAD["MXFP8, with exponents of a dtype of their own"] = (
        lambda s: {
            f"{Q}.weight": s[f"{Q}.weight"].to(E4M3),
            f"{Q}.weight_scale": torch.ones(96, 3).to(torch.float8_e8m0fnu),
        },
        "quantised to MXFP8",
    )


@pytest.mark.parametrize("case", BAD)
def test_other_quantisations_are_named(case: str, golden: Path, golden_state: State, tmp_path: Path) -> None:
    change, says = BAD[case]
    save_file(golden_state | change(golden_state), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"m\.safetensors: .*{says}"):
        open_checkpoint(Source(tmp_path / "m.safetensors", config=golden / "config.json"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(value: float, golden: Path, golden_state: State, tmp_path: Path) -> None:
    held, _ = scaled(golden_state, "scale_weight", more={f"{Q}.scale_weight": torch.tensor(value)})
    save_file(held, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"{Q}.weight' holds NaN or infinite"):
        convert(
            Source(tmp_path / "m.safetensors", config=golden / "config.json"),
            tmp_path / "out",
            ConvertRecipe(init="svd"),
        )
    assert not (tmp_path / "out").exists()


# The package quantises to these; of the K-quants it only decodes: their bytes are drawn.
QUANTISED = ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32")
DRAWN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write_gguf(path: Path, state: State, kind: str) -> State:
    """A file as ComfyUI-GGUF's converters write it; what its tensors are, by the package's own decoder."""
    writer, meant = gguf.GGUFWriter(path, "wan"), {}
    tensor_kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[tensor_kind]
    draw = np.random.default_rng(1)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if not is_quantised(name, tensor) or values.shape[1] % block:
            writer.add_tensor(name, values)
            meant[name] = tensor.float()
            continue
        if kind in DRAWN:
            data = draw.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
            half = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # scales that are numbers, wherever they stand
            for place in (0, 2, size - 2, size - 4, 16, 18, 80, 82):
                if place + 2 <= size:
                    data[..., place : place + 2] = half
            data = data.reshape(values.shape[0], -1)
        else:
            data = gguf.quants.quantize(values, tensor_kind)
        writer.add_tensor(name, data, raw_dtype=tensor_kind)
        decoded = torch.from_numpy(gguf.quants.dequantize(data, tensor_kind).copy())
        meant[name] = decoded.to({"F16": torch.float16, "F32": torch.float32}.get(kind, torch.bfloat16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture
def wide(golden_state: State) -> State:
    """The golden model widened to 256, which K-quants' blocks divide; its heads are 128 wide."""
    draw = torch.Generator().manual_seed(8)
    return {
        name: torch.randn([{96: 256, 576: 1536}.get(n, n) for n in tensor.shape], generator=draw) * 0.05
        for name, tensor in golden_state.items()
    }


@pytest.mark.parametrize("kind", QUANTISED + DRAWN)
def test_gguf_is_decoded(kind: str, wide: State, tmp_path: Path) -> None:
    meant = write_gguf(tmp_path / f"wan-{kind}.gguf", wide, kind)
    with open_checkpoint(tmp_path) as checkpoint:  # the only model in its folder
        assert f"GGUF {', '.join(sorted({kind, 'F32'}))}" in remarks(checkpoint)[0]
        assert (checkpoint.config.num_heads, checkpoint.config.num_layers) == (2, 3)
        for name, tensor in meant.items():
            found = checkpoint.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, wide[name].shape)
            assert torch.equal(found, tensor), name
            if kind in QUANTISED:  # near what was quantised, and no row or column in another's place
                assert (found.float() - wide[name]).norm() < 0.2 * wide[name].norm()
    if kind == "Q8_0":
        convert(tmp_path, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=9), verify=True)
        record = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]
        assert record["decoded"] == "GGUF F32, Q8_0"


def test_gguf_with_shapes_that_it_could_not_hold(wide: State, tmp_path: Path) -> None:
    """Five dimensions are kept beside, and a quantiser in C drops a first dimension of one."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    for name, tensor in wide.items():
        values = tensor.numpy()
        if tensor.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, 16)
        writer.add_tensor(name, values.reshape(values.shape[1:]) if name.endswith("modulation") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in wide.items())


def test_gguf_that_is_damaged(wide: State, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", wide, "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    bad = {
        "a head alone": whole[:24],
        "half a head": whole[:13],
        "half of it": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "another magic": b"GGUX" + whole[4:],
        "a version to come": whole[:4] + b"\x63\0\0\0" + whole[8:],
        "no tensors": b"GGUF" + b"\x03\0\0\0" + b"\0" * 64,
        "a count beyond all": whole[:8] + b"\xff" * 8 + whole[16:],
        "fields beyond all": whole[:16] + b"\xff" * 8 + whole[24:],
        "a name that ends a terminal": whole.replace(b"text_embedding.0.bias", b"text_embedding\x1b0.bias"),
        "twice the same": whole.replace(b"text_embedding.2.bias", b"text_embedding.0.bias"),
        "a kind that is none": whole,
    }
    place = whole.index(b"text_embedding.0.bias") + len(b"text_embedding.0.bias") + 4 + 8
    bad["a kind that is none"] = whole[:place] + b"\xee\0\0\0" + whole[place + 4 :]
    for case, data in bad.items():
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(InputError, match=r"bad\.gguf: ") as caught:
            open_checkpoint(tmp_path / "bad.gguf")
        assert len(str(caught.value).splitlines()) == 1, case


def test_gguf_without_its_package(wide: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", wide, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mlaconvert\[gguf\]'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_blocks_of_the_size_that_the_configuration_says(
    golden_state: State, golden_config: dict[str, object], tmp_path: Path
) -> None:
    held, meant = in_blocks(golden_state, "weight_scale_inv", 40)
    save_file(held, tmp_path / WEIGHTS_NAME)
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [40, 40]}}
    (tmp_path / "config.json").write_text(json.dumps(golden_config | said))
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in meant.items())
