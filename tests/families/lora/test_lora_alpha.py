"""LoRAs in every layout, merged as the checkpoint is read; each against the sum written longhand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from lora_cases import MODULES, RANK, plain, write_comfy, write_diffusers, write_kohya, write_peft
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.errors import InputError
from mlaconvert.families.adapter import PEFT_CONFIG
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import find_recorded, merge_loras, merged, remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import WEIGHTS_NAME


def renamed(folder: Path, factors: Any, **changes: Any) -> Path:
    """PEFT's two files, the weights under another name, as people keep several in one folder."""
    file = write_peft(folder, factors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "target_modules": ["q", "o", "v", "0", "ffn.2"]}
    (folder / PEFT_CONFIG).write_text(json.dumps(config | changes))
    return file.rename(folder / "style_v2.safetensors")


def scalings(golden: Path, file: Path) -> tuple[Any, list[str]]:
    """The record, the factor that the merged weights of each module really show, and the remarks."""
    with open_checkpoint(golden) as plain_model, merge_loras(open_checkpoint(golden), [LoraFile(path=file)]) as view:
        (record,) = merged(view)
        state = load_file(file)
        found = {}
        for module in MODULES:
            a, b = (
                next(t for key, t in state.items() if f"{module}.lora_{part}" in key or f"{module}.{part}" in key)
                for part in ("A", "B")
            )
            change = view.read(f"{module}.weight").double() - plain_model.read(f"{module}.weight").double()
            full = b.double() @ a.double()
            found[module] = round(float((change * full).sum() / full.square().sum()), 4)
        return record["alpha"], found, remarks(view)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, dict.fromkeys(MODULES, 4.0)),
        ({"target_modules": [f"model.{module}" for module in MODULES]}, dict.fromkeys(MODULES, 4.0)),
        ({"target_modules": r".*\.(q|o|v|0|2)"}, dict.fromkeys(MODULES, 4.0)),
        ({"use_rslora": True}, dict.fromkeys(MODULES, round(12 / RANK**0.5, 4))),
        ({"alpha_pattern": {"ffn.0": 6}}, dict.fromkeys(MODULES, 4.0) | {"blocks.1.ffn.0": 2.0}),
        ({"r": 5, "rank_pattern": dict.fromkeys(("q", "o", "v", "ffn.0", "ffn.2"), RANK)}, dict.fromkeys(MODULES, 4.0)),
    ],
)
def test_a_configuration_beside_a_renamed_file_counts(
    golden: Path, tmp_path: Path, factors: Any, changes: Any, expected: dict[str, float]
) -> None:
    file = renamed(tmp_path, factors, **changes)
    alpha, found, said = scalings(golden, file)
    assert alpha == "config"
    assert found == pytest.approx(expected, rel=1e-3)
    values = " and ".join(f"{value:g}" for value in sorted(set(expected.values())))
    (line,) = said
    assert line.startswith(
        "LoRA style_v2.safetensors: alpha is that of the adapter_config.json beside it, a factor of "
    )
    assert [float(v) for v in line.rpartition("of ")[2].split(" and ")] == pytest.approx(
        [float(v) for v in values.split(" and ")], rel=1e-4
    )


def test_a_link_to_a_renamed_file_keeps_its_configuration(golden: Path, tmp_path: Path, factors: Any) -> None:
    link = tmp_path / "linked.safetensors"
    (tmp_path / "elsewhere").mkdir()
    file = renamed(tmp_path / "elsewhere", factors)
    link.symlink_to(file)
    assert scalings(golden, link)[:2] == scalings(golden, file)[:2]
    assert scalings(golden, link)[0] == "config"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 5}, "its r is 5, and 'blocks.0.self_attn.q' has rank 3"),
        ({"r": None}, "its r is None"),
        ({"rank_pattern": {"o": 4}}, "its r is 4, and 'blocks.1.self_attn.o' has rank 3"),
        ({"target_modules": ["q", "o", "ffn.0", "ffn.2"]}, "'blocks.2.cross_attn.v' is none of its target_modules"),
        ({"lora_alpha": None}, "it has no lora_alpha"),
        ({"peft_type": "LOHA"}, "it is of 'LOHA'"),
    ],
)
def test_a_configuration_of_another_lora_does_not_count_and_that_is_said(
    golden: Path, tmp_path: Path, factors: Any, changes: Any, reason: str
) -> None:
    alpha, found, (line,) = scalings(golden, renamed(tmp_path, factors, **changes))
    assert alpha == "rank"
    assert found == pytest.approx(dict.fromkeys(MODULES, 1.0), rel=1e-3)
    assert line.startswith("LoRA style_v2.safetensors: the adapter_config.json beside it is another's (")
    assert reason in line
    assert "alpha is taken for the rank" in line


def test_alpha_that_nothing_says_is_said(golden: Path, tmp_path: Path, factors: Any) -> None:
    """And a file's own alpha goes before any configuration beside it."""
    file = renamed(tmp_path, factors)
    (tmp_path / PEFT_CONFIG).unlink()
    alpha, found, (line,) = scalings(golden, file)
    assert (alpha, set(found.values())) == ("rank", {1.0})
    assert "nothing in it or beside it says its alpha, so alpha is taken for the rank" in line
    assert "--lora-scale ALPHA/RANK" in line
    state = load_file(file)
    module = "base_model.model.blocks.0.self_attn.q"
    save_file(state | {f"{module}.alpha": torch.tensor(6.0)}, file)
    alpha, found, (line,) = scalings(golden, file)
    assert alpha == "file+rank"
    assert found == pytest.approx(dict.fromkeys(MODULES, 1.0) | {"blocks.0.self_attn.q": 2.0}, rel=1e-3)
    config = {"r": RANK, "lora_alpha": 12, "target_modules": ["q", "o", "v", "0", "2"]}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    alpha, found, _ = scalings(golden, file)
    assert alpha == "file+config"
    assert found == pytest.approx(dict.fromkeys(MODULES, 4.0) | {"blocks.0.self_attn.q": 2.0}, rel=1e-3)
    save_file(state, file)
    (tmp_path / PEFT_CONFIG).write_text("{")
    assert "another's (it is not readable)" in scalings(golden, file)[2][0]
    for whole in (write_comfy, write_kohya, write_peft):
        with merge_loras(open_checkpoint(golden), [LoraFile(path=whole(tmp_path, factors))]) as view:
            assert remarks(view) == []


def test_metadata_without_alpha_says_none(golden: Path, tmp_path: Path, factors: Any) -> None:
    file = write_diffusers(tmp_path, factors)
    state = load_file(file)
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 12})}
    save_file(state, file, metadata=metadata)
    with merge_loras(open_checkpoint(golden), [LoraFile(path=file)]) as view:
        assert [record["alpha"] for record in merged(view)] == ["rank"]
        assert len(remarks(view)) == 1


def test_a_record_is_merged_with_the_alpha_of_that_time(golden: Path, tmp_path: Path, factors: Any) -> None:
    file = renamed(tmp_path, factors)
    config = (tmp_path / PEFT_CONFIG).read_text()
    with merge_loras(open_checkpoint(golden), [LoraFile(path=file)]) as view:
        record = json.loads(json.dumps(merged(view)))
        expected = view.read("blocks.1.ffn.0.weight")

    def again(records: Any) -> Tensor:
        with merge_loras(open_checkpoint(golden), find_recorded(records, [tmp_path])) as view:
            return view.read("blocks.1.ffn.0.weight").clone()

    assert torch.equal(again(record), expected)
    for text in (None, config.replace("12", "24")):
        (tmp_path / PEFT_CONFIG).unlink(missing_ok=True)
        if text is not None:
            (tmp_path / PEFT_CONFIG).write_text(text)
        with pytest.raises(InputError, match="its alpha is not the one it was merged with before the conversion"):
            again(record)
    # What was merged with alpha for the rank, before or beside another configuration, is merged so again.
    plain_factor = again([{name: record[0][name] for name in ("name", "sha256", "scale")} | {"alpha": "rank"}])
    a, b = factors["blocks.1.ffn.0"]
    before = load_file(golden / WEIGHTS_NAME)["blocks.1.ffn.0.weight"]
    assert relative(plain_factor - before, b @ a) < 1e-4


@pytest.mark.parametrize("key", ["generator_lora", "style_lora"])
def test_a_lora_beside_the_generator_is_mentioned_and_can_be_merged(
    golden: Path, golden_state: dict[str, Tensor], tmp_path: Path, factors: Any, key: str
) -> None:
    state = {f"model.{name}": tensor for name, tensor in golden_state.items()}
    lora = plain(factors, "base_model.model.{module}.lora_{part}.weight")
    critic = plain(factors, "base_model.model.{module}.lora_{part}.weight")
    file = tmp_path / "longlive.pt"
    torch.save({"generator": state, key: lora, "critic_lora": critic, "step": 5}, file)
    arguments = ("--config", golden / "config.json", "--init", "svd", "-o")
    result = invoke("convert", file, *arguments, tmp_path / "out")
    said = f"longlive.pt also holds a LoRA, '{key}', which is not applied; convert merges it with --lora {file}"
    assert result.exit_code == 0, result.stderr
    assert said in result.stderr.splitlines()
    assert "critic" not in result.stderr
    assert said in invoke("analyze", file, "--config", golden / "config.json").stderr.splitlines()
    result = invoke("convert", file, *arguments, tmp_path / "merged", "--lora", file)
    assert result.exit_code == 0, result.stderr
    assert "not applied" not in result.stderr
    assert "alpha is taken for the rank" in result.stderr
    made = load_file(tmp_path / "merged" / WEIGHTS_NAME)["blocks.1.ffn.0.weight"]
    a, b = factors["blocks.1.ffn.0"]
    assert relative(made - golden_state["blocks.1.ffn.0.weight"], b @ a) < 1e-4
    (record,) = json.loads((tmp_path / "merged" / "conversion.json").read_text())["source"]["loras"]
    assert (record["name"], record["alpha"], record["modules"]) == ("longlive.pt", "rank", len(MODULES))
