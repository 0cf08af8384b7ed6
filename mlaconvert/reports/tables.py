"""Tables of analyses, conversions and memory plans."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from rich.table import Table

from mlaconvert.conversion.plan import ConversionPlan
from mlaconvert.conversion.report import ModelReport
from mlaconvert.conversion.spectra import Analysis, DenseSpectra, LatentSpectrum
from mlaconvert.evaluation.lines import LOSS, SMALL_LOSS
from mlaconvert.model.memory import MemoryPlan
from mlaconvert.units import format_bytes, percent


def titled(name: str) -> str:
    """What a line or a title begins with when there are several models: the subfolder's name."""
    return f"{name}: " if name else ""


def _count(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


# Title, the figure's name in Analysis.summary, how to write it. {t} is the threshold, {k} the budget's rank.
_DENSE_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("r_{t}\nK", "key_rank", _count),
    ("r_{t}\nV", "value_rank", _count),
    ("r_{t}\n\\[K;V]", "joint_rank", _count),
    ("energy\nat {k}", "energy_at_budget", percent),
    ("error\nat {k}", "relative_error", percent),
)
_WEIGHTED_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("r_{t}\nweighted", "weighted_rank", _count),
    ("predicted\nerror at {k}", "predicted_error", percent),
)
_LATENT_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("d_c", "kv_lora_rank", _count),
    ("r_{t}\nM", "effective_rank", _count),
    ("M\nof d_c", "occupancy", percent),
    ("random\nof d_c", "baseline_occupancy", percent),
)


def _figures(layer: DenseSpectra | LatentSpectrum) -> dict[str, float]:
    if isinstance(layer, DenseSpectra):
        figures: dict[str, float] = {
            "key_rank": layer.key.effective_rank,
            "value_rank": layer.value.effective_rank,
            "joint_rank": layer.joint.effective_rank,
            "energy_at_budget": layer.joint.energy,
            "relative_error": layer.joint.error,
        }
        if layer.weighted is not None:
            figures |= {"weighted_rank": layer.weighted.effective_rank, "predicted_error": layer.weighted.error}
        return figures
    return {
        "kv_lora_rank": layer.kv_lora_rank,
        "effective_rank": layer.effective_rank,
        "occupancy": layer.occupancy,
        "baseline_occupancy": layer.baseline_occupancy,
    }


def analysis_table(analysis: Analysis) -> Table:
    """One row a layer, then min, median and max.

    Dense layers: effective ranks of K, V and [K; V] (of D), and what [K; V] keeps at the budget's rank; with clips
    also the effective rank of the weighted spectrum and the error that it predicts at the budget. MLA layers:
    effective rank of M, its share of d_c, and the same of random factors. A model with both has both sets of columns.
    """
    columns = (_DENSE_COLUMNS if analysis.dense else ()) + (_LATENT_COLUMNS if analysis.latent else ())
    columns += _WEIGHTED_COLUMNS if analysis.weighted else ()
    notes = []
    if analysis.dense:
        notes.append(f"Ranks are of D = {analysis.dim}; energy and error are those of \\[K;V].")
    if analysis.latent:
        notes.append("Random: Gaussian factors of the same shapes. A rank like theirs proves no learning.")
    notes.append("The effective rank of weights does not predict quality after healing.")
    if analysis.weighted:
        notes.append(
            "Weighted: by the inputs that arrive, and what attention makes of them. Weights must serve any input, so "
            "their own error is high; a calibrated conversion is fitted to those that arrive."
        )
    elif analysis.dense:
        notes.append(
            "The error is high because weights must serve any input. Those that arrive need far fewer channels, and a "
            "calibrated conversion (the default) is fitted to them: --calibrated shows what that makes of the error."
        )
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


def budget_table(analysis: Analysis) -> Table:
    """What the weighted spectra predict for each budget: one row a latent width, the chosen one in bold."""
    table = Table(title="Predicted error of each latent budget, calibrated", caption_justify="left")
    for name in ("latent\nchannels", "cached\nscalars", "less\ncache", "min", "median", "max"):
        table.add_column(name, justify="right")
    for budget in analysis.budgets():
        table.add_row(
            str(budget.kv_rank),
            str(budget.cached_scalars),
            percent(1 - budget.cache_share),
            *(percent(getattr(budget.summary, name)) for name in ("min", "median", "max")),
            style="bold" if budget.kv_rank == analysis.kv_rank else None,
        )
    table.caption = (
        "Relative error of attention's output, linearised and\nbefore refits: it compares budgets and layers, and is\n"
        "no measurement.\nCached: the latent and one scalar of the key norm."
    )
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


def loss_table(model: ModelReport) -> Table:
    """The model's loss after each step of a calibrated conversion, on clips that the calibration did not see."""
    table = Table(title=f"{titled(model.plan.subfolder)}loss, step by step")
    kinds = {"loss": model.losses}
    if model.noisy_losses:
        kinds = {"behind\nclean pasts": model.losses, "with\nnoisy pasts": model.noisy_losses}
    table.add_column("with all layers")
    for kind in kinds:
        table.add_column(kind, justify="right")
        table.add_column("above\ndense", justify="right")
    for name in model.losses:
        cells = []
        for kind, losses in kinds.items():
            write = (SMALL_LOSS if "clean" in kind else LOSS).table
            change = "" if name == "dense" else f"{100 * (losses[name] / losses['dense'] - 1):+.1f}%"
            cells += [write(losses[name]), change]
        table.add_row(name, *cells)
    notes = ["Mean squared error of the velocity on clips held back from calibration."]
    steps = [name for name in model.losses if name != "dense"]
    worse = [
        after for before, after in pairwise(steps) if any(losses[after] > losses[before] for losses in kinds.values())
    ]
    if worse:
        notes.append(
            f"Worse than the step before: {', '.join(worse)}. Steps are fitted to the calibration clips, and most to "
            "attention outputs: what is held back may lose a little by one."
        )
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def memory_table(plan: MemoryPlan) -> Table:
    """Dense and MLA side by side in binary units, with the change; with a GPU, also what fits on it."""
    reduction = f"{-plan.reduction_percent:+.1f}%, {plan.ratio:.1f}x"
    change = 100 * (plan.mla.weight_bytes / plan.dense.weight_bytes - 1)
    frames = plan.window_frames
    dtype = {2: "bfloat16", 4: "float32"}.get(plan.itemsize, f"{plan.itemsize} bytes a scalar")
    table = Table(title=f"Memory at {plan.height}x{plan.width}, {plan.fps} fps, batch {plan.batch}, {dtype}")
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
    in_bits = plan.mla.bytes_per_token != plan.itemsize * sum(plan.mla.scalars_per_token)
    scalar = f"{plan.itemsize} bytes a scalar" + (" of dense layers, the others in bits" if in_bits else "")
    notes = [f"Cache: {layers} layers, {scalar}, {plan.frame_tokens} tokens a latent frame."]
    if plan.itemsize == 2 and in_bits:
        notes.append("In float32, in which float32 files run on a CPU, all but what is in bits takes twice that.")
    elif plan.itemsize == 2:
        notes.append("In float32, in which float32 files run on a CPU, all of it takes twice that.")
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
