"""LoRAs in every layout, merged as the checkpoint is read; each against the sum written longhand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveFolder, relative
from hub_server import Hub
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.conversion.provenance import open_teacher
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.adapter import PEFT_CONFIG
from mlaconvert.families.lora import LoraFile, open_lora, pair, refuse_converted
from mlaconvert.families.merged import MergedCheckpoint, find_recorded, merge_loras, merged, remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import WEIGHTS_NAME

RANK, DIM, FFN = 3, 96, 160  # the golden model's
# Canonical module -> (outputs, inputs) of those that the test's LoRA changes.
MODULES = {
    "blocks.0.self_attn.q": (DIM, DIM),
    "blocks.1.self_attn.o": (DIM, DIM),
    "blocks.2.cross_attn.v": (DIM, DIM),
    "blocks.1.ffn.0": (FFN, DIM),
    "blocks.2.ffn.2": (DIM, FFN),
}


@pytest.fixture
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A [r, in], B [out, r])."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (
            torch.randn(RANK, inputs, generator=generator) * 0.1,
            torch.randn(outputs, RANK, generator=generator) * 0.1,
        )
        for name, (outputs, inputs) in MODULES.items()
    }


def diffusers_name(module: str) -> str:
    return WanFamily().source(f"{module}.weight", "diffusers").removesuffix(".weight")


def plain(factors: Mapping[str, tuple[Tensor, Tensor]], pattern: str) -> dict[str, Tensor]:
    """Keys such as `pattern`, which names a module and its part (lora_A, lora_B)."""
    return {
        pattern.format(module=module, other=diffusers_name(module), flat=module.replace(".", "_"), part=part): tensor
        for module, pair_of in factors.items()
        for part, tensor in zip(("A", "B"), pair_of, strict=True)
    }


def write_peft(folder: Path, factors: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(plain(factors, "base_model.model.{module}.lora_{part}.weight"), file)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "alpha_pattern": {"ffn.0": 24}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return file


def write_diffusers(folder: Path, factors: Any) -> Path:
    file = folder / "pytorch_lora_weights.safetensors"
    metadata = {"transformer.lora_alpha": 12, "transformer.alpha_pattern": {}}
    state = plain(factors, "transformer.{other}.lora_{part}.weight")
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    return file


def write_longlive(folder: Path, factors: Any) -> Path:
    file = folder / "lora.pt"
    state = plain(factors, "base_model.model._fsdp_wrapped_module.{module}.lora_{part}.weight")
    torch.save({"generator_lora": state, "critic_lora": plain(factors, "base_model.model.{module}.x")}, file)
    return file


def write_comfy(folder: Path, factors: Any) -> Path:
    file = folder / "comfy.safetensors"
    state = plain(factors, "diffusion_model.{module}.lora_{part}.weight")
    state = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in state.items()}
    save_file(state | {f"diffusion_model.{m}.alpha": torch.tensor(1.5) for m in factors}, file)
    return file


def write_kohya(folder: Path, factors: Any) -> Path:
    file = folder / "kohya.safetensors"
    state = plain(factors, "lora_unet_{flat}.lora_{part}.weight")
    state = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in state.items()}
    save_file(state | {f"lora_unet_{m.replace('.', '_')}.alpha": torch.tensor(6.0) for m in factors}, file)
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
    convert(golden, tmp_path / "out", recipe, loras=[LoraFile(path=file, scale=2.0)], verify=True)
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


# --- alpha -----------------------------------------------------------------------------------------------------------


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


# --- a LoRA in the checkpoint's own file ------------------------------------------------------------------------------


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


# --- what is refused -------------------------------------------------------------------------------------------------


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
            state["diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector"] = torch.zeros(DIM)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layer", r"'diffusion_model.blocks.7.self_attn.q.lora_A.weight' is no LoRA of this model \(wan, 3 layers\)"),
        ("part", "'diffusion_model.blocks.0.self_attn.q.hada_w1_a' is no LoRA of this model"),
        ("shape", r"q.lora_A.weight' has shape \[3, 97\] for 'blocks.0.self_attn.q' .*expected \[3, 96\]"),
        ("rank", r"q.lora_B.weight' has shape \[96, 4\] for 'blocks.0.self_attn.q' .*expected \[96, 3\]"),
        ("partner", "q.lora_A.weight' has no partner"),
        ("nan", "q.lora_B.weight' holds NaN"),
        ("alpha", "alpha of .*q.lora_A.weight' is None"),
        ("twice", "are both down of 'blocks.0.self_attn.q'"),
        ("bias", "norm_q.diff_b' has shape .*, which has none to change"),
        ("integer", "is torch.int32; expected floating point"),
        ("experts", "LoRAs of two experts"),
        ("dora", "is a DoRA"),
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
    refused(file, "is a DoRA")
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


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
