"""Plots of what was analysed and swept, as PNG files."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from mlaconvert.conversion.spectra import Analysis, Summary
from mlaconvert.evaluation.cells import CellResult, SweepReport
from mlaconvert.evaluation.timesteps import CleanPast
from mlaconvert.latent.spectrum import cumulative_energy
from mlaconvert.reports.save import save_report
from mlaconvert.units import percent


def plot_analysis(analysis: Analysis, path: str | Path) -> None:
    """Write one PNG, 1600 x 750 pixels: cumulative energy of every layer, and effective ranks over depth.

    With weighted spectra it is 1600 x 1400: the energy of weights and weighted beside each other, the ranks of both,
    and the predicted error over the budget. An existing file is replaced, at once and only when the new one is
    complete. Raises OutputError when `path` cannot be written.
    """
    weighted = bool(analysis.weighted)
    with matplotlib.rc_context({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(16, 14 if weighted else 7.5), dpi=100, layout="constrained")
        source = Path(analysis.source).name or analysis.source
        figure.suptitle(f"{source}: self-attention, D = {analysis.dim}", parse_math=False)
        if weighted:
            (energy, beside), (ranks, budget) = figure.subplots(2, 2)
            _plot_weighted_energy(beside, analysis)
            _plot_budgets(budget, analysis)
        else:
            energy, ranks = figure.subplots(1, 2)
        _plot_energy(energy, analysis)
        _plot_ranks(ranks, analysis)
        depth, colors = _depth(analysis)
        colorbar = figure.colorbar(
            ScalarMappable(depth, colors), ax=[beside, budget] if weighted else energy, label="layer"
        )
        colorbar.locator = MaxNLocator(integer=True)
        colorbar.update_ticks()
        image = io.BytesIO()
        figure.savefig(image, format="png")
    save_report(Path(path), image.getvalue(), "the plot")


def _plot_energy(axes: Axes, analysis: Analysis) -> None:
    """Cumulative energy of the weights over rank, the budget marked."""
    dense = {layer.layer: layer.joint.singular_values for layer in analysis.dense}
    latent = {layer.layer: layer.singular_values for layer in analysis.latent}
    for spectra, label, style in ((dense, "[K;V]", "-"), (latent, "M of the MLA layers", "--")):
        if spectra:
            _energy_curves(axes, analysis, spectra, label, style)
    if dense:
        _mark_budget(axes, analysis, percent(analysis.summary()["energy_at_budget"].median))
    _finish_energy(axes, analysis, "Weights: energy held by the leading directions")


def _plot_weighted_energy(axes: Axes, analysis: Analysis) -> None:
    """Cumulative energy of the weighted spectra, on the scales of the weights'."""
    spectra = {layer: spectrum.singular_values for layer, spectrum in analysis.weighted.items()}
    _energy_curves(axes, analysis, spectra, "weighted", "-")
    _mark_budget(axes, analysis, percent(statistics.median(s.energy for s in analysis.weighted.values())))
    _finish_energy(axes, analysis, "Weighted by real inputs: energy held by the leading directions")


def _plot_budgets(axes: Axes, analysis: Analysis) -> None:
    """Predicted error over the width of the latent: layers, median, largest, the tabled budgets as dots."""
    depth, colors = _depth(analysis)
    budgets, spectra = analysis.budgets(), analysis.weighted
    most = max(budget.kv_rank for budget in budgets)
    widths = range(1, most + 1)
    curves = {layer: [spectrum.predicted_error(rank) for rank in widths] for layer, spectrum in spectra.items()}
    for layer, curve in curves.items():
        axes.plot(widths, curve, color=colors(depth(layer)), linewidth=0.9, alpha=0.8)
    ranks = [budget.kv_rank for budget in budgets]
    for name, style in (("median", "k-"), ("max", "k--")):
        over = [getattr(Summary.of(errors), name) for errors in zip(*curves.values(), strict=True)]
        axes.plot(widths, over, style, linewidth=2.2, label=f"{name} of the layers")
        axes.plot(ranks, [getattr(budget.summary, name) for budget in budgets], "ko", markersize=6)
    chosen = next(budget for budget in budgets if budget.kv_rank == analysis.kv_rank)
    _mark_budget(axes, analysis, percent(chosen.summary.median))
    axes.set(title="Predicted error of attention's output, before refits", yscale="log")
    axes.set(
        xlabel="latent channels (cached with one scalar of the key norm)",
        xlim=(0, most * 1.02),
        ylabel="relative error (log)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper right")
    share = axes.secondary_xaxis("top", functions=_shares(2 * analysis.dim))
    share.xaxis.set_major_formatter(PercentFormatter(1.0))
    share.set_xlabel("of the dense cache")


def _proportion(dense: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """From cached scalars to the share of `dense` ones, and back."""
    return lambda scalars: scalars / dense, lambda share: share * dense


def _shares(dense: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """From latent channels to the share of `dense` cached scalars, key norm included, and back."""
    return lambda rank: (rank + 1) / dense, lambda share: share * dense - 1


def _depth(analysis: Analysis) -> tuple[Normalize, Colormap]:
    return Normalize(0, max(1, analysis.num_layers - 1)), matplotlib.colormaps["viridis"]


def _energy_curves(axes: Axes, analysis: Analysis, spectra: Mapping[int, Tensor], label: str, style: str) -> None:
    """Thin lines coloured by depth and a thick median."""
    depth, colors = _depth(analysis)
    curves = {layer: _energy_curve(values) for layer, values in spectra.items()}
    for layer, curve in curves.items():
        axes.plot(curve, color=colors(depth(layer)), linewidth=0.9, alpha=0.8)
    axes.plot(_median(list(curves.values())), "k" + style, linewidth=2.2, label=f"median, {label}")


def _mark_budget(axes: Axes, analysis: Analysis, median: str) -> None:
    label = f"budget, rank {analysis.kv_rank}: {median} (median)"
    axes.axvline(analysis.kv_rank, color="tab:red", linestyle=":", linewidth=2, label=label)


def _finish_energy(axes: Axes, analysis: Analysis, title: str) -> None:
    axes.axhline(analysis.threshold, color="grey", linewidth=1, label=f"{100 * analysis.threshold:g}% of the energy")
    axes.set(title=title, xlabel="rank", ylabel="share of the energy", xlim=(0, None), ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right")


def _plot_ranks(axes: Axes, analysis: Analysis) -> None:
    """Effective rank of every layer."""
    dense, latent = analysis.dense, analysis.latent
    if dense:
        at = [layer.layer for layer in dense]
        for label, style, ranks in (
            ("K", "o", [layer.key.effective_rank for layer in dense]),
            ("V", "s", [layer.value.effective_rank for layer in dense]),
            ("[K;V]", "D", [layer.joint.effective_rank for layer in dense]),
        ):
            axes.plot(at, ranks, style, markersize=6, linestyle="-", linewidth=1, label=label)
        if analysis.weighted:
            ranks = [spectrum.effective_rank for spectrum in analysis.weighted.values()]
            axes.plot(list(analysis.weighted), ranks, "^", markersize=8, linestyle="-", linewidth=2, label="weighted")
        axes.axhline(analysis.dim, color="grey", linewidth=1, label=f"full rank, {analysis.dim}")
        axes.axhline(analysis.kv_rank, color="tab:red", linestyle=":", linewidth=2, label=f"budget, {analysis.kv_rank}")
    if latent:
        at = [layer.layer for layer in latent]
        axes.plot(at, [layer.kv_lora_rank for layer in latent], "_", color="0.3", markersize=14, label="d_c")
        axes.plot(at, [layer.effective_rank for layer in latent], "o", color="tab:purple", markersize=9, label="M")
        axes.plot(at, [layer.baseline_rank for layer in latent], "kx", label="M of random factors")
    axes.set(
        title="Effective rank of each layer", xlabel="layer", ylabel=f"r_{analysis.threshold:g} (number of directions)"
    )
    if dense:
        axes.set_ylim(0, 1.05 * analysis.dim)
    else:
        axes.margins(y=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    columns = 3 if analysis.weighted else 4 if latent else 5
    # Below the axes: points can lie anywhere in them.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=columns, columnspacing=1.2)


def _energy_curve(singular_values: Tensor) -> list[float]:
    """Cumulative energy at ranks 0, 1, ..., n."""
    return [0.0, *cumulative_energy(singular_values).tolist()]


def _median(curves: list[list[float]]) -> list[float]:
    """Pointwise median; past its end a curve stays at 1."""
    length = max(len(curve) for curve in curves)
    padded = torch.tensor([curve + [1.0] * (length - len(curve)) for curve in curves])
    return padded.quantile(0.5, dim=0).tolist()


def plot_sweep(report: SweepReport, path: str | Path) -> None:
    """Write one PNG, 1600 x 750 pixels: loss above the dense model's, and velocity error, against the cache.

    Where clips have pasts it is 1600 x 1400: with noisy pasts above, behind clean ones below, without the cells that
    lack these. One line for each init and split; of a single budget's splits, one line for each init. An existing file
    is replaced, at once and only when the new one is complete. Raises OutputError when `path` cannot be written.
    """
    one_budget = len({result.kv_rank for result in report.results}) == 1
    lines: dict[str, list[CellResult]] = {}
    for result in sorted(report.results, key=lambda result: result.scalars):
        lines.setdefault(result.init if one_budget else result.series, []).append(result)
    with matplotlib.rc_context({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3}):
        pasts = any(result.clean_past is not None for result in report.results)
        figure = Figure(figsize=(16, 14 if pasts else 7.5), dpi=100, layout="constrained")
        figure.suptitle(f"{report.source}: quality against cache, before any training", parse_math=False)
        regimes: dict[str, Callable[[CellResult], CellResult | CleanPast | None]] = {
            " with noisy pasts" if pasts else "": lambda result: result
        }
        if pasts:
            regimes[" behind clean pasts"] = lambda result: result.clean_past
        panels = [
            (f"{title}{where}", name, read)
            for where, read in regimes.items()
            for title, name in (
                ("loss above the dense model's", "excess"),
                ("relative error of the velocity", "velocity_error"),
            )
        ]
        for axes, (title, name, read) in zip(figure.subplots(len(regimes), 2).flat, panels, strict=True):
            for label, every in lines.items():
                results = [result for result in every if read(result) is not None]
                at, values = [r.scalars for r in results], [max(getattr(read(r), name), 1e-6) for r in results]
                axes.plot(at, values, "o-", linewidth=2, markersize=7, label=label)
                for result, x, y in zip(results, at, values, strict=True):
                    text = f"{result.nope_dim}/{result.rope_dim}" if one_budget and result.rope_dim else result.kv_rank
                    axes.annotate(str(text), (x, y), textcoords="offset points", xytext=(6, 6), fontsize=11)
            axes.set(title=title, yscale="log", xlabel="cached scalars a token, all layers")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.legend(loc="best")
            share: Any = axes.secondary_xaxis("top", functions=_proportion(report.results[0].dense_scalars))
            share.xaxis.set_major_formatter(PercentFormatter(1.0))
            share.set_xlabel("of the dense cache; labels: " + ("split" if one_budget else "latent channels"))
        image = io.BytesIO()
        figure.savefig(image, format="png")
    save_report(Path(path), image.getvalue(), "the plot")
