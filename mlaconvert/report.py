"""What people see of an analysis, a conversion or a memory plan: rich tables and one PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table
from torch import Tensor

from mlaconvert.analyze import Analysis, DenseSpectra, LatentSpectrum
from mlaconvert.convert import ConversionPlan, ModelReport
from mlaconvert.demo import Demo
from mlaconvert.errors import OutputError
from mlaconvert.memory import MemoryPlan
from mlaconvert.spectrum import cumulative_energy

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """`count` bytes in binary units, three or more significant digits: 180 KiB, 1.87 GiB."""
    value, unit = float(count), 0
    # What would round up to 1024 belongs to the next unit.
    while value >= 1023.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 or value.is_integer() else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def titled(name: str) -> str:
    """What a line or a title begins with when there are several models: the subfolder's name."""
    return f"{name}: " if name else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _count(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


# Title, the figure's name in Analysis.summary, how to write it. {t} is the threshold, {k} the budget's rank.
_DENSE_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("r_{t}\nK", "key_rank", _count),
    ("r_{t}\nV", "value_rank", _count),
    ("r_{t}\n\\[K;V]", "joint_rank", _count),
    ("energy\nat {k}", "energy_at_budget", _percent),
    ("error\nat {k}", "relative_error", _percent),
)
_LATENT_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("d_c", "kv_lora_rank", _count),
    ("r_{t}\nM", "effective_rank", _count),
    ("M\nof d_c", "occupancy", _percent),
    ("random\nof d_c", "baseline_occupancy", _percent),
)


def _figures(layer: DenseSpectra | LatentSpectrum) -> dict[str, float]:
    if isinstance(layer, DenseSpectra):
        return {
            "key_rank": layer.key.effective_rank,
            "value_rank": layer.value.effective_rank,
            "joint_rank": layer.joint.effective_rank,
            "energy_at_budget": layer.joint.energy,
            "relative_error": layer.joint.error,
        }
    return {
        "kv_lora_rank": layer.kv_lora_rank,
        "effective_rank": layer.effective_rank,
        "occupancy": layer.occupancy,
        "baseline_occupancy": layer.baseline_occupancy,
    }


def analysis_table(analysis: Analysis) -> Table:
    """One row a layer, then min, median and max.

    Dense layers: effective ranks of K, V and [K; V] (of D), and what [K; V] keeps at the budget's rank. MLA
    layers: effective rank of M, its share of d_c, and the same of random factors. A model with both has both
    sets of columns.
    """
    columns = (_DENSE_COLUMNS if analysis.dense else ()) + (_LATENT_COLUMNS if analysis.latent else ())
    notes = []
    if analysis.dense:
        notes.append(f"Ranks are of D = {analysis.dim}; energy and error are those of \\[K;V].")
    if analysis.latent:
        notes.append("Random: Gaussian factors of the same shapes. A rank like theirs proves no learning.")
    notes.append("The effective rank of weights does not predict quality after healing.")
    table = Table(title="Weight spectra of self-attention", collapse_padding=bool(analysis.dense and analysis.latent))
    table.caption, table.caption_justify = "\n".join(notes), "left"
    table.add_column("layer", justify="right")
    for title, _, _ in columns:
        table.add_column(title.format(t=f"{analysis.threshold:g}", k=analysis.kv_rank), justify="right")
    for layer in analysis.layers:
        figures = _figures(layer)
        cells = (write(figures[name]) if name in figures else "-" for _, name, write in columns)
        table.add_row(str(layer.layer), *cells)
    table.add_section()
    summary = analysis.summary()
    for row in ("min", "median", "max"):
        table.add_row(row, *(write(getattr(summary[name], row)) for _, name, write in columns), style="bold")
    return table


def tensor_table(plan: ConversionPlan) -> Table:
    """The new tensors of the first converted layer, which stand for all, and what passes through."""
    first = min(plan.layers)
    table = Table(title=f"Tensors of each converted layer (here layer {first})")
    table.add_column("tensor")
    for name in ("shape", "dtype", "size"):
        table.add_column(name, justify="right")
    for operation in plan.operations:
        if operation.layer == first:
            spec = operation.spec
            shape, dtype = " x ".join(map(str, spec.shape)), str(spec.dtype).removeprefix("torch.")
            table.add_row(spec.name, shape, dtype, format_bytes(spec.nbytes))
    passed = [operation.spec.nbytes for operation in plan.operations if operation.layer is None]
    table.add_section()
    table.add_row(f"{len(passed)} tensors that pass through", "", "", format_bytes(sum(passed)))
    return table


def layer_table(model: ModelReport) -> Table:
    """One row a converted layer: how compressible it was, and what the factors miss."""
    table = Table(title=f"{titled(model.plan.subfolder)}converted layers")
    rows = [layer.to_json() for layer in model.layers]
    stages = list(rows[0]["errors"]) if rows else []
    calibrated = model.plan.recipe.init == "calibrated"  # random inputs say nothing of it, and it has real ones
    checked = model.verification.attention_errors if model.verification is not None and not calibrated else {}
    for name in ("layer", "r_0.99\n\\[K;V]", "energy at\nkv rank", *(f"error\n{stage}" for stage in stages)):
        table.add_column(name, justify="right")
    if checked:
        table.add_column("attention\noutput", justify="right")
    for row in rows:
        cells = [str(row["layer"]), str(row["effective_rank"]), f"{100 * row['energy_at_kv_rank']:.1f}%"]
        cells += [f"{row['errors'][stage]:.3g}" for stage in stages]
        cells += [f"{checked[row['layer']]:.3g}"] if checked else []
        table.add_row(*cells)
    table.caption_justify = "left"
    if stages:
        table.caption = (
            "Relative errors of the attention output on the calibration clips, after each step."
            if calibrated
            else "Relative errors on inputs guessed from the modulation: a proxy, no data was seen."
        )
    return table


def memory_table(plan: MemoryPlan) -> Table:
    """Dense and MLA side by side in binary units, with the change; with a GPU, also what fits on it."""
    reduction = f"{-plan.reduction_percent:+.1f}%, {plan.ratio:.1f}x"
    change = 100 * (plan.mla.weight_bytes / plan.dense.weight_bytes - 1)
    frames = plan.window_frames
    table = Table(title=f"Memory at {plan.height}x{plan.width}, {plan.fps} fps, batch {plan.batch}")
    table.add_column("")
    for side in ("dense", "MLA", "change"):
        table.add_column(side, justify="right")
    for name, dense, mla, text in (
        ("cache of a token", plan.dense.bytes_per_token, plan.mla.bytes_per_token, reduction),
        (
            f"cache of {frames} latent frames, {plan.seconds(frames):.2f} s",
            plan.dense.bytes_per_window,
            plan.mla.bytes_per_window,
            reduction,
        ),
        ("cache of a minute kept whole", plan.dense.bytes_per_minute, plan.mla.bytes_per_minute, reduction),
        ("weights", plan.dense.weight_bytes, plan.mla.weight_bytes, f"{change:+.1f}%"),
    ):
        table.add_row(name, format_bytes(dense), format_bytes(mla), text)
    layers = len(plan.dense.scalars_per_token)
    notes = [f"Cache: {layers} layers, {plan.itemsize} bytes a scalar, {plan.frame_tokens} tokens a latent frame."]
    if plan.gpu_bytes is not None:
        table.add_section()
        batches = (plan.dense.largest_batch, plan.mla.largest_batch)
        windows = (plan.dense.longest_window, plan.mla.longest_window)
        table.add_row(f"max batch at {frames} frames", *map(_bound, batches))
        table.add_row(f"max window at batch {plan.batch}", *(_bound(w, " frames") for w in windows))
        table.add_row("", *(f"{plan.seconds(w):.1f} s" if w else "" for w in windows))
        notes.append(
            f"Max: an upper bound for {format_bytes(plan.gpu_bytes)} less the weights; activations not counted."
        )
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _bound(count: int | None, unit: str = "") -> str:
    return f"{count}{unit}" if count else "does not fit"


def plot_analysis(analysis: Analysis, path: str | Path) -> None:
    """Write one PNG, 1600 x 750 pixels: cumulative energy of every layer, and effective ranks over depth.

    An existing file is replaced, at once and only when the new one is complete. Raises OutputError when
    `path` cannot be written.
    """
    with matplotlib.rc_context({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(16, 7.5), dpi=100, layout="constrained")
        source = Path(analysis.source).name or analysis.source
        figure.suptitle(f"{source}: self-attention weights, D = {analysis.dim}", parse_math=False)
        energy, ranks = figure.subplots(1, 2)
        _plot_energy(figure, energy, analysis)
        _plot_ranks(ranks, analysis)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(image.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write the plot ({error.strerror}); choose another path") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _plot_energy(figure: Figure, axes: Axes, analysis: Analysis) -> None:
    """Cumulative energy over rank: thin lines coloured by depth, a thick median, the budget marked."""
    depth, colors = Normalize(0, max(1, analysis.num_layers - 1)), matplotlib.colormaps["viridis"]
    dense = {layer.layer: _energy_curve(layer.joint.singular_values) for layer in analysis.dense}
    latent = {layer.layer: _energy_curve(layer.singular_values) for layer in analysis.latent}
    for curves, label, style in ((dense, "[K;V]", "-"), (latent, "M of the MLA layers", "--")):
        for layer, curve in curves.items():
            axes.plot(curve, color=colors(depth(layer)), linewidth=0.9, alpha=0.8)
        if curves:
            axes.plot(_median(list(curves.values())), "k" + style, linewidth=2.2, label=f"median, {label}")
    if analysis.dense:
        median = analysis.summary()["energy_at_budget"].median
        label = f"budget, rank {analysis.kv_rank}: {_percent(median)} (median)"
        axes.axvline(analysis.kv_rank, color="tab:red", linestyle=":", linewidth=2, label=label)
    axes.axhline(analysis.threshold, color="grey", linewidth=1, label=f"{100 * analysis.threshold:g}% of the energy")
    axes.set(title="Energy held by the leading directions", xlabel="rank", ylabel="share of the energy")
    axes.set(xlim=(0, None), ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right")
    colorbar = figure.colorbar(ScalarMappable(depth, colors), ax=axes, label="layer")
    colorbar.locator = MaxNLocator(integer=True)
    colorbar.update_ticks()


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
    # Below the axes: points can lie anywhere in them.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=4 if latent else 5, columnspacing=1.2)


def _energy_curve(singular_values: Tensor) -> list[float]:
    """Cumulative energy at ranks 0, 1, ..., n."""
    return [0.0, *cumulative_energy(singular_values).tolist()]


def _median(curves: list[list[float]]) -> list[float]:
    """Pointwise median; past its end a curve stays at 1."""
    length = max(len(curve) for curve in curves)
    padded = torch.tensor([curve + [1.0] * (length - len(curve)) for curve in curves])
    return padded.quantile(0.5, dim=0).tolist()


def demo_table(demo: Demo) -> Table:
    """Teacher and converted model side by side, as the demo measured them."""
    found = demo.evaluation
    table = Table(title="The shipped model before and after", caption_justify="left")
    for name in ("", "teacher", "converted", "change"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "cache of a window, float32",
        format_bytes(demo.teacher_bytes),
        format_bytes(demo.student_bytes),
        f"-{demo.reduction_percent:.1f}%",
    )
    table.add_row(
        "validation loss, held-back clips",
        f"{found.teacher_loss:.4f}",
        f"{found.student_loss:.4f}",
        f"+{100 * found.excess:.1f}%",
    )
    table.add_row("velocity, relative error", "", f"{100 * found.velocity_error:.1f}%", "")
    layers = " ".join(f"{100 * error:.0f}" for error in found.attention_errors)
    table.add_row("attention output, error by layer, %", "", layers, "")
    table.caption = "No training after the conversion. Scenes, noise and noise levels are the same for both."
    return table
