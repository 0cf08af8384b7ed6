"""LoRAs in every layout, merged as the checkpoint is read; each against the sum written longhand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from hub_server import Hub
from lora_cases import DIM, RANK, plain, write_comfy, write_diffusers, write_kohya, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.lora import LoraFile, open_lora, pair, refuse_converted
from mlaconvert.families.merged import find_recorded, merge_loras
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import WEIGHTS_NAME


def wrong(factors: Any, change: str) -> dict[str, Tensor]:
    state = plain(factors, "diffusion_model.{module}.lora_{part}.weight")
    q = "diffusion_model.blocks.0.self_attn.q.lora_"
    match change:
        case "layer":
            state["diffusion_model.blocks.7.self_attn.q.lora_A.weight"] = torch.zeros(RANK, DIM)
        case "part":
            state["diffusion_model.blocks.0.self_attn.q.hada_w1_a"] = torch.zeros(DIM, RANK)
        case "shape":
            state[q + "A.weight"] = torch.zeros(RANK, DIM + 1)
        case "rank":
            state[q + "B.weight"] = torch.zeros(DIM, RANK + 1)
        case "partner":
            del state[q + "B.weight"]
        case "nan":
            state[q + "B.weight"] = torch.full((DIM, RANK), float("nan"))
        case "alpha":
            state["diffusion_model.blocks.0.self_attn.q.alpha"] = torch.zeros(2)
        case "twice":
            state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(RANK, DIM)
        case "bias":
            state["diffusion_model.blocks.0.self_attn.norm_q.diff_b"] = torch.zeros(DIM)
        case "integer":
            state[q + "A.weight"] = torch.zeros(RANK, DIM, dtype=torch.int32)
        case "experts":
            state = plain(factors, "transformer.{other}.lora_{part}.weight")
            state |= {key.replace("transformer.", "transformer_2."): tensor.clone() for key, tensor in state.items()}
        case "dora":
            state["diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector"] = torch.zeros(DIM - 1)
        case "magnitude":
            state["diffusion_model.blocks.0.self_attn.k.dora_scale"] = torch.zeros(DIM, 1)
        case "kron":
            state["diffusion_model.blocks.0.self_attn.q.lokr_w1"] = torch.zeros(4, 5)
            state["diffusion_model.blocks.0.self_attn.q.lokr_w2"] = torch.zeros(20, 12)
        case "product":
            shapes = {"w1_a": (DIM, 2), "w1_b": (3, DIM), "w2_a": (DIM, 2), "w2_b": (2, DIM)}
            state |= {f"diffusion_model.blocks.0.self_attn.q.hada_{n}": torch.zeros(s) for n, s in shapes.items()}
        case "oft":
            state["diffusion_model.blocks.0.self_attn.q.oft_blocks"] = torch.zeros(4, 4)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layer", r"'diffusion_model.blocks.7.self_attn.q.lora_A.weight' is no LoRA of this model \(wan, 3 layers\)"),
        ("part", "q.hada_w1_a' has no partner for 'blocks.0.self_attn.q'; get the whole file"),
        ("kron", r"q.lokr_w1' has shape \[4, 5\] .*with its partners makes \[80, 60\], expected \[96, 96\]"),
        ("product", "q.hada_w1_a' has shape .* which does not fit its partners"),
        ("shape", r"q.lora_A.weight' has shape \[3, 97\] for 'blocks.0.self_attn.q' .*expected \[3, 96\]"),
        ("rank", r"q.lora_B.weight' has shape \[96, 4\] for 'blocks.0.self_attn.q' .*expected \[96, 3\]"),
        ("partner", "q.lora_A.weight' has no partner"),
        ("nan", "q.lora_B.weight' holds NaN"),
        ("alpha", "alpha of .*q.lora_A.weight' is None"),
        ("twice", "are both down of 'blocks.0.self_attn.q'"),
        ("bias", "norm_q.diff_b' has shape .*, which has none to change"),
        ("integer", "is torch.int32; expected floating point"),
        ("experts", "LoRAs of two experts"),
        ("dora", r"q.lora_magnitude_vector' has shape \[95\] .* one number for each of 96 outputs"),
        ("magnitude", "k.dora_scale' has no factors for 'blocks.0.self_attn.k'; get the whole file"),
        ("oft", "is an OFT .*merge it into the model with the library that made it"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    golden: Path, tmp_path: Path, factors: Any, change: str, message: str
) -> None:
    file = tmp_path / "wrong.safetensors"
    save_file(wrong(factors, change), file)

    def read_merged() -> None:
        with open_checkpoint(golden) as checkpoint:
            merge_loras(checkpoint, [LoraFile(path=file)]).read("blocks.0.self_attn.q.weight")

    with pytest.raises(CheckpointError, match=message) as raised:
        read_merged()
    assert str(raised.value).startswith(str(file))


def test_files_that_are_no_lora(golden: Path, tmp_path: Path, factors: Any) -> None:
    def refused(path: Path, match: str, scale: float = 1.0) -> None:
        with open_checkpoint(golden) as checkpoint, pytest.raises(InputError, match=match):
            open_lora(LoraFile(path=path, scale=scale), checkpoint)

    refused(tmp_path / "none.safetensors", "no such LoRA file; download")
    refused(golden / WEIGHTS_NAME, "it holds no LoRA")
    file = write_peft(tmp_path, factors)
    refused(file, "the scale of .* is nan", float("nan"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_dora": True}))
    refused(file, "its configuration says DoRA, and .*q.lora_A.weight' has no magnitudes; get the whole file")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "four"}))
    refused(file, "alpha of .* is 'four'")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(file, "it has no lora_alpha")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 5}))
    refused(file, "its r is 5, and .* has rank 3; get the adapter's own file")
    (tmp_path / "adapter_config.json").unlink()
    refused(file, "adapter_config.json is missing beside it")
    with pytest.raises(ConfigError, match="2 scales for 1 LoRAs"):
        pair([file], [1, 2])
    assert [lora.scale for lora in pair([file, file], [])] == [1, 1]


@pytest.mark.parametrize("records", [5, "lora.pt", [3], [{"name": "x"}], [{"name": 4, "scale": 1.0}], {"scale": True}])
def test_records_that_are_none_are_refused(records: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.loras has .*; expected a name, sha256 and scale"):
        find_recorded(records, [tmp_path])


def test_a_record_leads_nowhere_but_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "lora.pt").write_bytes(b"abc")
    record = {"name": "../lora.pt", "scale": 2, "sha256": hashlib.sha256(b"abc").hexdigest()}
    with pytest.raises(InputError, match="is not here"):
        find_recorded([record], [tmp_path / "inside"])
    assert find_recorded([record], [tmp_path / "inside", tmp_path]) == [LoraFile(path=tmp_path / "lora.pt", scale=2.0)]
    assert find_recorded(None, [tmp_path]) == []


def test_rank_stabilised_scaling(golden: Path, tmp_path: Path, factors: Any) -> None:
    file = write_peft(tmp_path, factors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": True}))
    with open_checkpoint(golden) as checkpoint:
        lora = open_lora(LoraFile(path=file), checkpoint)
        assert {round(parts.scaling, 6) for parts in lora.modules.values()} == {round(6 / RANK**0.5, 6)}
        lora.store.close()


def test_attention_loras_are_refused_afterwards(golden: Path, tmp_path: Path, factors: Any) -> None:
    convert(golden, tmp_path / "out", ConvertRecipe(init="svd", layers="0,1"))
    hint = "was converted; merge this LoRA before: mlaconvert convert SOURCE --lora FILE"
    with open_checkpoint(tmp_path / "out") as converted:
        for write in (write_peft, write_diffusers, write_kohya):
            with pytest.raises(UnsupportedModelError, match=hint):
                merge_loras(converted, [LoraFile(path=write(tmp_path, factors))])
        # What a conversion leaves alone can still be merged: cross-attention, feed-forward, a layer that stayed dense.
        rest = {name: pair_of for name, pair_of in factors.items() if ".self_attn." not in name}
        rest["blocks.2.self_attn.q"] = factors["blocks.0.self_attn.q"]
        with merge_loras(converted, [LoraFile(path=write_comfy(tmp_path, rest))]) as view:
            before = load_file(tmp_path / "out" / WEIGHTS_NAME)["blocks.2.self_attn.q.weight"]
            assert not torch.equal(view.read("blocks.2.self_attn.q.weight"), before)
        refuse_converted(plain(rest, "{other}.lora_{part}"), converted.config, "here")


def test_the_command_merges_and_refuses(hub: Hub, golden: Path, tmp_path: Path, factors: Any) -> None:
    first, second = write_comfy(tmp_path, factors), write_kohya(tmp_path, factors)
    arguments = ("convert", golden, "--init", "svd", "--lora", first, "--lora", second, "--lora-scale", 0.5)
    result = invoke(*arguments, "--lora-scale", 2, "-o", tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "LoRA comfy.safetensors x 0.5, LoRA kohya.safetensors x 2" in " ".join(result.stderr.split())
    assert "tensors are those of source and LoRA bit for bit" in result.stderr
    records = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["loras"]
    assert [(record["name"], record["scale"]) for record in records] == [(first.name, 0.5), (second.name, 2.0)]
    result = invoke("push", tmp_path / "out", "alice/out", "--dry-run")
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    assert "--lora comfy.safetensors --lora-scale 0.5 --lora kohya.safetensors --lora-scale 2.0`" in result.stdout
    assert f"SHA-256 of the LoRA kohya.safetensors: `{digest}`" in result.stdout
    result = invoke(*arguments, "-o", tmp_path / "other")
    assert (result.exit_code, "1 scales for 2 LoRAs" in result.stderr) == (2, True)
    result = invoke("convert", tmp_path / "out", "--init", "svd", "--lora", first, "-o", tmp_path / "other")
    assert (result.exit_code, "merge this LoRA before" in result.stderr) == (2, True)
    assert not (tmp_path / "other").exists()
