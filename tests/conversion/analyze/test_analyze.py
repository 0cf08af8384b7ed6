"""The analysis of whole checkpoints, and what people see of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from analyze_cases import CONFIG, dense_weights, mixed_weights, shown
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.analyze import analyze
from mlaconvert.errors import CheckpointError, ConfigError, OutputError
from mlaconvert.families import open as families
from mlaconvert.families import protocol, wan
from mlaconvert.latent.spectrum import random_rank_baseline
from mlaconvert.model.wan import WanModel
from mlaconvert.reports.plots import plot_analysis


def reference(matrix: Tensor, threshold: float = 0.99) -> tuple[Tensor, int]:
    values = torch.linalg.svdvals(matrix.double())
    energy = values.square()
    return values, next(r for r in range(1, len(values) + 1) if energy[:r].sum() / energy.sum() >= threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_equal_the_svd(dtype: torch.dtype) -> None:
    checkpoint = dense_weights(dtype)
    analysis = analyze(checkpoint, kv_rank=5, threshold=0.97)
    assert [layer.layer for layer in analysis.layers] == [0, 1, 2]
    for layer in analysis.dense:
        key = checkpoint.tensors[f"blocks.{layer.layer}.self_attn.k.weight"]
        value = checkpoint.tensors[f"blocks.{layer.layer}.self_attn.v.weight"]
        for spectrum, matrix in (
            (layer.key, key),
            (layer.value, value),
            (layer.joint, torch.cat((key, value))),
        ):
            values, rank = reference(matrix, 0.97)
            torch.testing.assert_close(spectrum.singular_values, values, rtol=0, atol=1e-7 * float(values[0]))
            assert spectrum.effective_rank == rank
            energy = float(values[:5].square().sum() / values.square().sum())
            assert spectrum.energy == pytest.approx(energy, abs=1e-12)
            assert spectrum.error == pytest.approx((1 - energy) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("key_norm", ["latent", "token"])
def test_mla_layers_equal_the_svd_of_the_product(key_norm: str) -> None:
    checkpoint = mixed_weights(key_norm)
    analysis = analyze(checkpoint)
    assert [layer.layer for layer in analysis.dense] == [0]
    assert [layer.kv_lora_rank for layer in analysis.latent] == [7, 13]
    for layer in analysis.latent:
        prefix, rank = f"blocks.{layer.layer}.self_attn", layer.kv_lora_rank
        down = checkpoint.tensors[f"{prefix}.kv_a_proj_with_mqa.weight"][:rank].double()
        up = checkpoint.tensors[f"{prefix}.kv_b_proj.weight"].double()
        gain = torch.linspace(2.0, 0.01, rank).double() if key_norm == "latent" else torch.ones(rank).double()
        # W_UK's and W_UV's rows taken apart, as in the definition of M.
        heads = up.view(4, 20, rank)
        key, value = heads[:, :9].reshape(-1, rank), heads[:, 9:].reshape(-1, rank)
        matrix = torch.cat((key @ gain.diag() @ down, value @ gain.diag() @ down))
        values, effective = reference(matrix)
        torch.testing.assert_close(layer.singular_values, values[:rank], rtol=1e-6, atol=1e-6 * float(values[0]))
        assert layer.effective_rank == effective
        assert layer.occupancy == effective / rank
        assert layer.baseline_rank == random_rank_baseline(80, rank, 48)
        assert layer.baseline_occupancy == layer.baseline_rank / rank


def test_only_the_chosen_layers_are_read_and_progress_counts_them() -> None:
    checkpoint, calls = dense_weights(), []
    analysis = analyze(checkpoint, layers=[2, 0, 2], progress=lambda *call: calls.append(call[:3]))
    assert [layer.layer for layer in analysis.layers] == [0, 2]
    assert calls == [("analyze", done, 2) for done in range(3)]
    assert checkpoint.names == [f"blocks.{i}.self_attn.{m}.weight" for i in (0, 2) for m in "kv"]


def test_default_rank_is_the_default_budgets() -> None:
    assert analyze(dense_weights(), layers=[1]).kv_rank == 7 - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_rank": 49}, "kv_rank is 49, but layers are 48 wide"),
        ({"kv_rank": 0}, "kv_rank is 0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": 99}, "threshold is 99"),
        ({"layers": [0, 3]}, "layer 3 does not exist: the model has 0 to 2"),
        ({"layers": [-1]}, "layer -1 does not exist"),
        ({"layers": []}, "no layers"),
        ({"device": "mps"}, "no float64"),
    ],
)
def test_impossible_options_are_named_before_anything_is_read(options: dict[str, object], message: str) -> None:
    checkpoint = dense_weights()
    with pytest.raises(ConfigError, match=message):
        analyze(checkpoint, **options)
    assert checkpoint.names == []


@pytest.mark.parametrize(
    "name",
    ["blocks.0.self_attn.v.weight", "blocks.1.self_attn.kv_b_proj.weight", "blocks.2.self_attn.kv_a_layernorm.weight"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(name: str, bad: float) -> None:
    checkpoint = mixed_weights()
    checkpoint.tensors[name].view(-1)[3] = bad
    with pytest.raises(CheckpointError, match=rf"folder/some.safetensors: tensor 'in_file.{name}'"):
        analyze(checkpoint)


def test_a_zero_layer_is_judged_without_dividing_by_zero() -> None:
    checkpoint = dense_weights()
    for tensor in checkpoint.tensors.values():
        tensor.zero_()
    layer = analyze(checkpoint, layers=[0]).dense[0]
    assert (layer.joint.effective_rank, layer.joint.energy, layer.joint.error) == (0, 1.0, 0.0)


def test_json_is_plain_and_holds_singular_values_only_on_request() -> None:
    analysis = analyze(mixed_weights(), kv_rank=6)
    data = json.loads(json.dumps(analysis.to_json()))
    assert (data["kv_rank"], data["threshold"], data["dim"], data["num_layers"]) == (6, 0.99, 48, 3)
    assert data["source"] == "some$^$model/"
    dense, latent = data["layers"][0], data["layers"][1]
    assert (dense["kind"], latent["kind"]) == ("dense", "mla")
    assert dense["joint"]["energy_at_budget"] == analysis.dense[0].joint.energy
    assert latent["occupancy"] == analysis.latent[0].occupancy
    assert "singular_values" not in json.dumps(data)

    full = json.loads(json.dumps(analysis.to_json(singular_values=True)))
    assert full["layers"][0]["key"]["singular_values"] == analysis.dense[0].key.singular_values.tolist()
    assert len(full["layers"][2]["singular_values"]) == 13


def test_summary_is_over_the_layers_that_have_the_figure() -> None:
    analysis = analyze(dense_weights())
    ranks = sorted(layer.key.effective_rank for layer in analysis.dense)
    summary = analysis.summary()
    assert vars(summary["key_rank"]) == {"min": ranks[0], "median": ranks[1], "max": ranks[2]}
    assert "occupancy" not in summary
    assert "key_rank" not in analyze(mixed_weights(), layers=[1, 2]).summary()


def test_tables_show_every_layer_and_the_summary() -> None:
    analysis = analyze(dense_weights(), kv_rank=11)
    text = shown(analysis)
    for layer in analysis.dense:
        row = next(line for line in text.splitlines() if line.split()[1:2] == [str(layer.layer)])
        assert [cell.strip() for cell in row.split("│")[2:-1]] == [
            str(layer.key.effective_rank),
            str(layer.value.effective_rank),
            str(layer.joint.effective_rank),
            f"{100 * layer.joint.energy:.1f}%",
            f"{100 * layer.joint.error:.1f}%",
        ]
    for part in ("median", "[K;V]", "at 11", "D = 48", "does not predict"):
        assert part in text
    assert "d_c" not in text

    latent = analyze(mixed_weights(), layers=[1, 2])
    text = shown(latent)
    row = next(line for line in text.splitlines() if line.split()[1:2] == ["2"])
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "13",
        str(latent.latent[1].effective_rank),
        f"{100 * latent.latent[1].occupancy:.1f}%",
        f"{100 * latent.latent[1].baseline_occupancy:.1f}%",
    ]
    assert "proves no learning" in " ".join(text.split())
    assert "[K;V]" not in text


def test_a_mixed_table_fits_eighty_columns() -> None:
    text = shown(analyze(mixed_weights()))
    assert "…" not in text
    assert all(part in text for part in ("[K;V]", "d_c", "random"))


@pytest.mark.parametrize("layers", [None, [0], [1, 2]], ids=["mixed", "dense", "mla"])
def test_plot_is_one_whole_png(layers: list[int] | None, tmp_path: Path) -> None:
    path = tmp_path / "spectra.png"
    path.write_text("an older file")
    plot_analysis(analyze(mixed_weights(), layers=layers), path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1600, 750)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["missing/spectra.png", "file/spectra.png", "folder", "folder/."])
def test_plot_needs_a_place(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write the plot"):
        plot_analysis(analyze(dense_weights(), layers=[0]), tmp_path / path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_plot_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyze(dense_weights(), layers=[0])
    path = tmp_path / "spectra.png"
    path.write_text("an older file")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        plot_analysis(analysis, path)
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


def save_model(folder: Path, config: WanConfig, layout: protocol.Layout) -> dict[str, Tensor]:
    """A random model on disk; returns its tensors by native name."""
    family = wan.WanFamily()
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in WanModel(config).named_parameters()}
    state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    renamed = {family.source(name, layout): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors")
    raw = family.raw_config(config) | ({} if config.mla is None else {"mla": config.mla.to_json()})
    (folder / "config.json").write_text(json.dumps(raw))
    return state


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_real_checkpoint_from_file(layout: protocol.Layout, tmp_path: Path) -> None:
    config = mixed_weights().config
    state = save_model(tmp_path, config, layout)

    with families.open_checkpoint(tmp_path) as checkpoint:
        analysis = analyze(checkpoint, kv_rank=9)

    assert analysis.source == str(tmp_path)
    assert "2 MLA layers" in analysis.description
    dense, latent = analysis.dense[0], analysis.latent[1]
    attention = "blocks.0.self_attn"
    values, rank = reference(torch.cat((state[f"{attention}.k.weight"], state[f"{attention}.v.weight"])))
    torch.testing.assert_close(dense.joint.singular_values, values, rtol=1e-9, atol=1e-7)
    assert dense.joint.effective_rank == rank

    attention = "blocks.2.self_attn"
    down = state[f"{attention}.kv_a_proj_with_mqa.weight"][:13].double()
    gain = state[f"{attention}.kv_a_layernorm.weight"].double()
    values, rank = reference(state[f"{attention}.kv_b_proj.weight"].double() * gain @ down)
    torch.testing.assert_close(latent.singular_values, values[:13], rtol=1e-9, atol=1e-7)
    assert latent.effective_rank == rank


def test_a_bad_weight_is_named_as_in_its_file(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, "diffusers")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # off the file that is written next
    tensors["blocks.1.attn1.to_k.weight"][5, 7] = float("nan")
    save_file(tensors, file)
    message = r"model.safetensors: tensor 'blocks.1.attn1.to_k.weight' holds NaN"
    with families.open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        analyze(checkpoint)
