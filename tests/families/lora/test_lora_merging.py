"""LoRAs in every layout, merged as the checkpoint is read; each against the sum written longhand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import DIM, MODULES, RANK, plain, write_comfy, write_diffusers, write_kohya, write_peft
from safetensors.torch import load_file, save_file
from support import SaveFolder, relative
from torch import Tensor

from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import InputError
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import MergedCheckpoint, merge_loras, merged
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import WEIGHTS_NAME


def write_longlive(folder: Path, factors: Any) -> Path:
    file = folder / "lora.pt"
    state = plain(factors, "base_model.model._fsdp_wrapped_module.{module}.lora_{part}.weight")
    torch.save({"generator_lora": state, "critic_lora": plain(factors, "base_model.model.{module}.x")}, file)
    return file


def write_default(folder: Path, factors: Any) -> Path:
    file = folder / "trained.safetensors"
    save_file(plain(factors, "{module}.lora_{part}.default.weight"), file)
    return file


# (how it is written, alpha / r of most modules, where alpha came from)
LAYOUTS = [
    (write_peft, 12 / RANK, "config"),
    (write_diffusers, 12 / RANK, "config"),
    (write_longlive, 1.0, "rank"),
    (write_comfy, 0.5, "file"),
    (write_kohya, 2.0, "file"),
    (write_default, 1.0, "rank"),
]


@pytest.mark.parametrize(("write", "scaling", "alpha"), LAYOUTS)
def test_every_layout_merges_to_the_longhand_sum(
    golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any, write: Any, scaling: float, alpha: str
) -> None:
    file = write(tmp_path, factors)
    with merge_loras(open_checkpoint(golden), [LoraFile(path=file, scale=-0.7)]) as checkpoint:
        (record,) = merged(checkpoint)
        assert f"LoRA {file.name} x -0.7" in checkpoint.describe()
        for name, before in golden_state.items():
            module, _, leaf = name.rpartition(".")
            after = checkpoint.read(name)
            if leaf == "weight" and module in factors:
                a, b = factors[module]
                own = 24 / RANK if write is write_peft and module.endswith("ffn.0") else scaling
                change = after.double() - before.double()
                assert relative(change, -0.7 * own * (b.double() @ a.double())) < 1e-5, name
            else:
                assert torch.equal(after, before), name
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    beside = {"scaling": [4.0, 8.0]} if write is write_peft else {}  # what lies outside the file that the hash pins
    found = {"name": file.name, "sha256": digest, "scale": -0.7, "alpha": alpha, "modules": len(MODULES)}
    assert record == found | beside


def test_a_layout_of_files_is_no_matter(
    golden_state: dict[str, Tensor],
    golden_config: dict[str, Any],
    save_folder: SaveFolder,
    tmp_path: Path,
    factors: Any,
) -> None:
    """A diffusers checkpoint takes a native LoRA; biases, whole differences and norms are merged too."""
    family = WanFamily()
    state = {family.source(name, "diffusers"): tensor for name, tensor in golden_state.items()}
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 24}
    folder = save_folder(state, config)
    diff = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, DIM)
    file = tmp_path / "mixed.safetensors"
    extra = {
        "blocks.0.self_attn.q.diff_b": bias,
        "blocks.0.cross_attn.k.diff": diff,
        "blocks.1.norm3.diff_b": bias.clone(),
        "blocks.2.self_attn.norm_k.diff": bias.clone(),
    }
    shapes = (RANK, *golden_state["patch_embedding.weight"].shape[1:])
    patch = torch.randn(shapes, generator=torch.Generator().manual_seed(2))
    up = torch.randn(DIM, RANK, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    extra |= {"patch_embedding.lora_A.weight": patch, "patch_embedding.lora_B.weight": up}
    save_file(plain(factors, "diffusion_model.{module}.lora_{part}.weight") | extra, file)
    with merge_loras(open_checkpoint(folder), [LoraFile(path=file)]) as checkpoint:
        expected = {
            "blocks.0.self_attn.q.bias": bias,
            "blocks.0.cross_attn.k.weight": diff,
            "blocks.1.norm3.bias": bias,
            "blocks.2.self_attn.norm_k.weight": bias,
            "patch_embedding.weight": torch.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], patch),
        }
        for name, change in expected.items():
            assert relative(checkpoint.read(name) - golden_state[name], change) < 1e-5, name


def test_conversion_is_that_of_merged_weights(
    golden: Path,
    golden_state: dict[str, Tensor],
    golden_config: dict[str, Any],
    save_folder: SaveFolder,
    tmp_path: Path,
    factors: Any,
) -> None:
    """The same bytes as from a checkpoint that was merged beforehand; the record says so, and the teacher is found."""
    file = write_comfy(tmp_path, factors)
    recipe = ConvertRecipe(init="svd", dtype="float32")
    convert(Source(golden, loras=(LoraFile(path=file, scale=2.0),)), tmp_path / "out", recipe, verify=True)
    with merge_loras(open_checkpoint(golden), [LoraFile(path=file, scale=2.0)]) as checkpoint:
        state = {name: checkpoint.read(name).contiguous() for name in golden_state}
    convert(save_folder(state, golden_config, "merged"), tmp_path / "expected", recipe)
    found, expected = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    conversion = json.loads((tmp_path / "out" / "conversion.json").read_text())
    plain_source = json.loads((tmp_path / "expected" / "conversion.json").read_text())["source"]
    (record,) = conversion["source"]["loras"]
    assert (record["name"], record["scale"], "loras" in plain_source) == ("comfy.safetensors", 2.0, False)
    # The teacher is the base, found where it lies here, with the LoRA beside the model.
    conversion["source"]["name"] = str(golden)
    with open_teacher(str(tmp_path / "out"), conversion) as teacher:
        assert isinstance(teacher, MergedCheckpoint)
        assert torch.equal(teacher.read("blocks.1.ffn.0.weight"), state["blocks.1.ffn.0.weight"])
    # Named by hand, the base is known by its hash; a model that was merged by hand is left as it is.
    with open_teacher(str(tmp_path / "out"), conversion, teacher=str(golden)) as teacher:
        assert merged(teacher) == [record]
    with open_teacher(str(tmp_path / "out"), conversion, teacher=str(tmp_path / "merged")) as teacher:
        assert merged(teacher) == []
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match=r"LoRA comfy.safetensors was merged before the conversion and is not here"):  # noqa: SIM117
        with open_teacher(str(tmp_path / "out"), conversion):
            pass


def test_moments_belong_to_the_merged_model(golden: Path, tmp_path: Path, factors: Any) -> None:
    from mlaconvert.conversion.from_clips import keep_moments
    from mlaconvert.conversion.plan import plan_conversion

    file, folder = write_default(tmp_path, factors), tmp_path / "moments"
    kept = []
    for scale in (None, 1.0, 1.0, 0.5):
        loras = [] if scale is None else [LoraFile(path=file, scale=scale)]
        with merge_loras(open_checkpoint(golden), loras) as checkpoint:
            keep_moments(folder, checkpoint, plan_conversion(checkpoint, ConvertRecipe(clips=1)), None)
        kept.append((folder / "layer-0").exists())
        (folder / "layer-0").touch()
    assert kept == [False, False, True, False]
