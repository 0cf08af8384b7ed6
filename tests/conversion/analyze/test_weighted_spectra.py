"""The analysis of whole checkpoints, and what people see of it."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from analyze_cases import CONFIG, dense_weights, mixed_weights, shown
from command_line import invoke
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from support import randomize

from mlaconvert.clips.folder import Clips
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.analyze import analyze, read_ahead
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Regime
from mlaconvert.conversion.spectra import Analysis
from mlaconvert.errors import CheckpointError, UnsupportedModelError
from mlaconvert.families import open as families
from mlaconvert.families import wan
from mlaconvert.latent.factorize import factorize_layer
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.latent.weights import AttentionWeights
from mlaconvert.model.wan import WanModel
from mlaconvert.reports.plots import plot_analysis
from mlaconvert.reports.tables import budget_table


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with `first`, without it."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line)
    return next(row[1:] for row in rows if row[0] == first)


STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
REGIME = Regime(streaming=STREAMING, timesteps=(900.0, 400.0))


def make_clips(channels: int, text_dim: int) -> Clips:
    """3 clips of 7 frames of 2 x 3 tokens."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, channels, 7, 4, 6, generator=generator)
    return Clips(latents, torch.randn(3, 4, text_dim, generator=generator))


CLIPS = make_clips(CONFIG.in_dim, CONFIG.text_dim)


@dataclasses.dataclass
class Case:
    """A streaming model on disk, its analysis, and what the analysis should have seen of each layer."""

    folder: Path
    analysis: Analysis
    calls: list[tuple[str, int, int]]
    layers: list[tuple[AttentionWeights, LayerMoments]]
    powers: list[float]  # mean square of each layer's output, a token that is read


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("weighted")
    config = dataclasses.replace(CONFIG, streaming=STREAMING)
    model = WanModel(config)
    randomize(model)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    raw = wan.WanFamily().raw_config(config) | {"streaming": dataclasses.asdict(STREAMING)}
    (folder / "config.json").write_text(json.dumps(raw))
    calls: list[tuple[str, int, int]] = []
    with families.open_checkpoint(folder) as checkpoint:
        layers, powers = [], []
        for layer in LayerWalk(checkpoint, CLIPS, REGIME):
            layers.append((layer.weights, layer_moments(layer)))
            tokens = sum(batch.x.shape[0] * batch.x.shape[1] for batch in layer.inputs)
            powers.append(float(sum(out.double().square().sum() for out in layer.expected)) / tokens)
        analysis = analyze(
            checkpoint, clips=CLIPS, regime=REGIME, threshold=0.9, progress=lambda *call: calls.append(call[:3])
        )
    return Case(folder=folder, analysis=analysis, calls=calls, layers=layers, powers=powers)


def metrics(moments: LayerMoments) -> tuple[np.ndarray, np.ndarray]:
    """C, damped by a millionth of its mean eigenvalue, and S."""
    assert moments.sensitivity is not None
    covariance = moments.covariance.numpy()
    return covariance + 1e-6 * np.trace(covariance) / len(covariance) * np.eye(48), moments.sensitivity.numpy()


def directions(moments: LayerMoments) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of C S, which is similar to R^T S R: no root is taken."""
    covariance, metric = metrics(moments)
    values, vectors = np.linalg.eig(covariance @ metric)
    order = np.argsort(-values.real)
    return values.real[order], vectors.real[:, order]


def test_weighted_spectra_are_the_eigenvalues_of_covariance_times_metric(case: Case) -> None:
    analysis = case.analysis
    assert sorted(analysis.weighted) == [0, 1, 2]
    assert analysis.kv_rank == 7  # 7/48 of the width: no rotary key is cached beside the latent
    assert case.calls == [("analyze", done, 3) for done in range(4)]
    for index, (_, moments) in enumerate(case.layers):
        values, _ = directions(moments)
        spectrum = analysis.weighted[index]
        found = spectrum.singular_values.square().numpy()
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-12 * values[0])
        share = values.cumsum() / values.sum()
        assert spectrum.effective_rank == next(r for r in range(1, 49) if share[r - 1] >= 0.9)
        assert spectrum.energy == pytest.approx(share[6], rel=1e-9)
        assert spectrum.error == pytest.approx((values[7:].sum() / case.powers[index]) ** 0.5, rel=1e-6)
        weights = analysis.dense[index].joint
        assert not torch.allclose(spectrum.singular_values, weights.singular_values, rtol=0.1)


def test_the_predicted_error_is_that_of_the_inputs_a_latent_drops(case: Case) -> None:
    """E (g . (x - P x))^2 / E (g . x)^2 of the projection P that a latent keeps, and what convert makes of it."""
    shape = MLALayer(kv_lora_rank=5, qk_nope_head_dim=12, v_head_dim=12, rope_components=())
    for index, (weights, moments) in enumerate(case.layers):
        (covariance, metric), kept = metrics(moments), directions(moments)[1][:, :5]
        # Onto the leading eigenvectors, orthogonally in C^-1: latent and remainder are uncorrelated.
        inverse = np.linalg.inv(covariance)
        project = kept @ np.linalg.solve(kept.T @ inverse @ kept, kept.T @ inverse)
        rest = np.eye(48) - project
        expected = (np.trace(metric @ rest @ covariance @ rest.T) / np.trace(metric @ covariance)) ** 0.5
        values = case.analysis.weighted[index].singular_values.square()
        assert float(values[5:].sum() / values.sum()) ** 0.5 == pytest.approx(expected, rel=1e-8)
        mla = MLAConfig(key_norm="token", q_lora_rank=None, rope="head", softmax_scale=1.0, layers=())
        made = factorize_layer(weights, shape, moments, num_heads=4, mla=mla).errors["latent"]
        assert made == pytest.approx(expected, rel=1e-8)


def test_budgets_run_from_a_48th_to_a_quarter_of_the_width(case: Case) -> None:
    assert [budget.kv_rank for budget in case.analysis.budgets()] == [1, 2, 3, 4, 6, 7, 8, 10, 12]
    wider = dataclasses.replace(case.analysis, dim=100, kv_rank=14)
    assert [budget.kv_rank for budget in wider.budgets()] == [2, 4, 6, 8, 12, 14, 16, 20, 25]
    chosen = dataclasses.replace(case.analysis, kv_rank=17)
    budgets = {budget.kv_rank: budget for budget in chosen.budgets()}
    assert list(budgets) == [1, 2, 3, 4, 6, 7, 8, 10, 12, 17]
    for rank, budget in budgets.items():
        assert budget.cached_scalars == rank + 1
        assert budget.cache_share == (rank + 1) / 96
        tails = []
        for (_, moments), power in zip(case.layers, case.powers, strict=True):
            values, _ = directions(moments)
            tails.append((values[rank:].sum() / power) ** 0.5)
        assert budget.errors == pytest.approx(tails, rel=1e-6)
        found = budget.summary
        assert (found.min, found.median, found.max) == tuple(sorted(budget.errors))
    assert analyze(dense_weights()).budgets() == ()


def test_weighted_layers_are_the_same_alone_and_later_ones_are_not_run(case: Case) -> None:
    calls: list[tuple[str, int, int]] = []
    with families.open_checkpoint(case.folder) as checkpoint:
        found = analyze(
            checkpoint, layers=[1], clips=CLIPS, regime=REGIME, progress=lambda *call: calls.append(call[:3])
        )
    assert list(found.weighted) == [1]
    assert torch.equal(found.weighted[1].singular_values, case.analysis.weighted[1].singular_values)
    assert calls == [("analyze", done, 2) for done in range(3)]


def test_clips_need_a_dense_model() -> None:
    checkpoint = mixed_weights()
    with pytest.raises(UnsupportedModelError, match=r"some.safetensors: it is converted already"):
        analyze(checkpoint, clips=CLIPS)
    assert checkpoint.names == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3e38, r"layer 1 reads inputs on these clips that do not vary or are not finite"),
        (torch.nan, r"'blocks\.0\.ffn\.0\.weight' holds NaN"),
    ],
)
def test_inputs_that_are_not_finite_are_named(case: Case, tmp_path: Path, value: float, message: str) -> None:
    tensors = dict(load_file(case.folder / "diffusion_pytorch_model.safetensors"))
    tensors["blocks.0.ffn.0.weight"] = torch.full_like(tensors["blocks.0.ffn.0.weight"], value)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    with (
        families.open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=message),
    ):
        analyze(checkpoint, clips=CLIPS, regime=REGIME)


def test_json_holds_the_weighted_spectra_and_the_budgets(case: Case) -> None:
    data = json.loads(json.dumps(case.analysis.to_json(singular_values=True)))
    assert data["calibration"] == {"clips": 3, **REGIME.to_json()}
    assert data["layers"][2]["weighted"]["singular_values"] == case.analysis.weighted[2].singular_values.tolist()
    assert data["layers"][2]["weighted"]["relative_error"] == case.analysis.weighted[2].error
    budget = next(budget for budget in data["budgets"] if budget["kv_rank"] == 7)
    errors = [spectrum.error for spectrum in case.analysis.weighted.values()]
    assert budget["predicted_errors"] == errors
    assert budget["predicted_error"] == data["summary"]["predicted_error"]
    assert budget["predicted_error"] == {"min": min(errors), "median": sorted(errors)[1], "max": max(errors)}
    without = analyze(dense_weights()).to_json()
    assert {"calibration", "budgets"}.isdisjoint(without)
    assert "weighted" not in json.dumps(without)


def test_tables_show_the_weighted_spectra_and_every_budget(case: Case) -> None:
    text = shown(case.analysis)
    for index, spectrum in case.analysis.weighted.items():
        assert cells(text, str(index))[-2:] == [str(spectrum.effective_rank), f"{100 * spectrum.error:.1f}%"]
    assert "…" not in text
    assert "weighted" not in shown(analyze(dense_weights()))

    text = shown(case.analysis, budget_table)
    for budget in case.analysis.budgets():
        errors = sorted(budget.errors)
        assert cells(text, str(budget.kv_rank)) == [
            str(budget.kv_rank + 1),
            f"{100 * (1 - (budget.kv_rank + 1) / 96):.1f}%",
            *(f"{100 * error:.1f}%" for error in errors),
        ]
    assert "no measurement" in " ".join(text.split())
    assert "…" not in text


@pytest.mark.parametrize("kv_rank", [7, 48])
def test_plot_of_weighted_spectra(case: Case, kv_rank: int, tmp_path: Path) -> None:
    path = tmp_path / "spectra.png"
    plot_analysis(dataclasses.replace(case.analysis, kv_rank=kv_rank), path)
    with Image.open(path) as image:
        image.load()
        assert image.size == (1600, 1400)


def test_plot_draws_what_the_budgets_predict(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_analysis(case.analysis, tmp_path / "spectra.png")
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    predicted = next(axes for title, axes in panels.items() if "Predicted" in title)
    lines = {line.get_label(): line for line in predicted.lines}
    for budget in case.analysis.budgets():
        for name in ("median", "max"):
            line = lines[f"{name} of the layers"]
            at = list(line.get_xdata()).index(budget.kv_rank)
            assert line.get_ydata()[at] == getattr(budget.summary, name)
    marked = next(line for label, line in lines.items() if label.startswith("budget, rank 7"))
    assert list(marked.get_xdata()) == [7, 7]
    weights, weighted = (
        next(axes for title, axes in panels.items() if title.startswith(start)) for start in ("Weights:", "Weighted")
    )
    assert weights.get_xlim() == weighted.get_xlim()
    assert weights.get_ylim() == weighted.get_ylim()
    values = case.analysis.weighted[0].singular_values.square()
    np.testing.assert_allclose(weighted.lines[0].get_ydata()[1:], (values.cumsum(0) / values.sum()).numpy())


def test_the_command_reads_clips_and_prints_both(golden: Path, tmp_path: Path) -> None:
    config = json.loads((golden / "config.json").read_text())
    data = tmp_path / "clips"
    data.mkdir()
    save_file(make_clips(config["in_dim"], config["text_dim"])._asdict(), data / "clips.safetensors")
    few = ("--calibrated", "--data", data, "--clips", 2, "--layers", "0")
    result = invoke("analyze", golden, *few, "--json", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["calibration"]["clips"] == 2
    assert found["calibration"]["streaming"] is None
    assert found["kv_rank"] == 14
    assert found["memory"]["mla"]["scalars_per_token"] == [15] * 3
    assert len(found["layers"][0]["weighted"]["singular_values"]) == 96
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (1600, 1400)
    result = invoke("analyze", golden, *few)
    assert result.exit_code == 0, result.stderr
    assert "Predicted error of each latent budget" in result.stdout


def test_the_command_generates_clips_without_data(golden: Path) -> None:
    result = invoke(
        "analyze", golden, "--calibrated", "--clips", 1, "--layers", "0", "--height", 32, "--width", 48, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["calibration"]["clips"] == 1


@pytest.mark.parametrize("option", [("--data", "clips"), ("--clips", 3)])
def test_clips_are_refused_where_nothing_reads_them(golden: Path, option: tuple[object, ...]) -> None:
    result = invoke("analyze", golden, *option)
    assert result.exit_code == 2
    assert "only read with --calibrated" in result.stderr
    assert result.stdout == ""


def test_the_next_layer_is_read_while_this_one_is_used() -> None:
    """In order, one ahead and no more; an error comes up at its own turn."""
    asked: list[int] = []
    third = threading.Event()

    def read(index: int) -> int:
        asked.append(index)
        if index == 7:
            third.set()
        if index == 9:
            raise CheckpointError("torn")
        return 10 * index

    found = read_ahead(read, [3, 5, 7, 8, 9])
    assert next(found) == 30
    assert next(found) == 50
    assert third.wait(20)
    assert 8 not in asked
    assert [next(found), next(found)] == [70, 80]
    with pytest.raises(CheckpointError, match="torn"):
        next(found)
    assert list(read_ahead(read, [])) == []
