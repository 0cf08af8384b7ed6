"""What each way to convert loses on the shipped model before any training, over seeds; prints a Markdown table.

    python benchmarks/fidelity.py [--seeds 3] [--jobs 2] [--only REGEX] [--write BENCHMARKS.md] [--json]

Excess is the validation loss on held-back clips above the teacher's, in percent of it (block-causal, an independent
noise level per chunk, stratified shift-5 grid). A seed draws validation noise, random weights, calibration noise. Jobs
are processes of one thread each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tables import put_between

from mlaconvert.clips.tiny.clips import held_back, training_clips
from mlaconvert.config.mla import MLALayer
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.method import CalibrationSetup, Method
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Regime
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe
from mlaconvert.conversion.run import convert
from mlaconvert.evaluation.losses import validation_loss
from mlaconvert.families.open import open_checkpoint
from mlaconvert.latent.matrices import affine
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

CLIPS = 64
TINY = load_recipe("tiny")
TOTAL = TINY.kv_rank or 0
ROPE = 8  # a quarter of a head, where the rotary key has scalars of its own
change = dataclasses.replace
BASE = ConvertRecipe(init="svd", height=TINY.height, width=TINY.width, vae_stride=TINY.vae_stride)
WEIGHTS = change(BASE, kv_rank=TOTAL - ROPE, rope_dim=ROPE, q_rank="none")
CACHED = change(BASE, init="calibrated", kv_rank=TOTAL - ROPE, rope_dim=ROPE, rope="cached", allocation="uniform")
HEAD = change(BASE, init="calibrated", kv_rank=TOTAL, rope="head", allocation="uniform")
ADAPTIVE = change(HEAD, allocation="adaptive")
NARROW = change(ADAPTIVE, rope="latent")


@dataclasses.dataclass(frozen=True)
class Ablated:
    """A calibrated conversion of which some parts of the method are switched off."""

    recipe: ConvertRecipe
    method: Method


def without(recipe: ConvertRecipe, *parts: str) -> Ablated:
    return Ablated(recipe, Method(**dict.fromkeys(parts, False)))


FIXED = change(CACHED, allocation="fixed")
# Every row's name and conversion; None is the head-mean baseline, which the package does not offer.
TABLES: dict[str, dict[str, ConvertRecipe | Ablated | None]] = {
    "conversion, no training after it": {
        "random, latent RMSNorm": change(WEIGHTS, init="random"),
        "head-mean RoPE key, SVD of weights, latent RMSNorm": None,
        "shared complex RoPE key, SVD of weights, latent RMSNorm": WEIGHTS,
        "the same, queries compressed too: the paper's widths": change(WEIGHTS, q_rank=None),
        "the same with exact queries and key norm": change(WEIGHTS, key_norm="token"),
        "covariance-weighted, key norm exact, rho and energy-chosen pairs": without(
            FIXED, "centring", "components", "weights", "sensitivity", "refit"
        ),
        "and Omega": without(FIXED, "centring", "components", "sensitivity", "refit"),
        "and W_O (and queries) refitted": without(FIXED, "centring", "components"),
        "a better split of the same scalars, measured": without(CACHED, "centring", "components"),
        "and several shared components of a pair, inputs centred": CACHED,
        "and splits layer by layer, measured": change(CACHED, allocation="adaptive"),
        "alike in all layers, rotary key read from the latent": without(change(HEAD, rope="latent"), "sensitivity"),
        "and the latent chosen by the output's sensitivity": change(HEAD, rope="latent"),
        "each head's own rotation": HEAD,
        "and scalars shared between layers: **the default**": ADAPTIVE,
        "the default, latent RMSNorm": change(ADAPTIVE, key_norm="latent"),
        "the default at twice the cache": change(ADAPTIVE, kv_rank=2 * TOTAL),
        "everything kept (lossless)": change(BASE, init="lossless"),
    },
    "the default without": {
        "centring": without(ADAPTIVE, "centring"),
        "sensitivity": without(ADAPTIVE, "sensitivity"),
        "sensitivity and Omega": without(ADAPTIVE, "weights"),
        "refits": without(ADAPTIVE, "refit"),
    },
    "scores and values of a head (32 wide)": {
        "32 and 32, each head's own rotation": ADAPTIVE,
        "32 and 32, shared rotary key": NARROW,
        "at most 28 (12 unrotated), 28": change(NARROW, nope_dim=12, rope_dim=16, v_dim=28),
        "at most 24 (12 unrotated), 24": change(NARROW, nope_dim=12, rope_dim=12, v_dim=24),
        "at most 24 (8 unrotated), 24": change(NARROW, nope_dim=8, rope_dim=16, v_dim=24),
        "24 (8 unrotated), 16": change(NARROW, nope_dim=8, rope_dim=16, v_dim=16),
        "16 (8 unrotated), 16": change(NARROW, nope_dim=8, rope_dim=8, v_dim=16),
    },
}
ROWS = {name: recipe for table in TABLES.values() for name, recipe in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
    parser.add_argument("--only", metavar="REGEX", help="rows whose name it is found in")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.only is not None and arguments.write is not None:
        parser.error("--write wants all rows; leave out --only")
    found: dict[str, dict[int, float]] = {name: {} for name in ROWS if re.search(arguments.only or "", name)}
    if not found:
        parser.error(f"no row's name has {arguments.only!r} in it")
    teacher: dict[int, float] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        work = {pool.submit(measure, name, seed): (name, seed) for name in found for seed in range(arguments.seeds)}
        for i, done in enumerate(as_completed(work), 1):
            name, seed = work[done]
            teacher[seed], loss = done.result()
            found[name][seed] = 100 * (loss / teacher[seed] - 1)
            print(f"{i}/{len(work)}  {name}, seed {seed}: {found[name][seed]:.2f}%", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"teacher_loss": teacher, "excess_percent": found}, indent=2))
        return
    text = tables(teacher, found)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "fidelity", text)


def tables(teacher: dict[int, float], found: dict[str, dict[int, float]]) -> str:
    """The tables as Markdown."""
    seeds = len(teacher)
    lines = [f"Teacher's validation loss: {statistics.mean(teacher.values()):.4f} (mean of {seeds} seeds).", ""]
    for title, rows in TABLES.items():
        asked = [name for name in rows if name in found]
        if asked:
            lines += [f"| {title} | excess, mean | lowest to highest |", "|---|---|---|"]
        for name in asked:
            values = found[name].values()
            digits = 1 if max(values) >= 0.05 else 5
            low, mean, high = min(values), statistics.mean(values), max(values)
            lines.append(f"| {name} | {mean:.{digits}f}% | {low:.{digits}f} to {high:.{digits}f}% |")
        lines.append("")
    return "\n".join(lines)


def measure(name: str, seed: int) -> tuple[float, float]:
    """Validation losses of the teacher and of its conversion."""
    torch.set_num_threads(1)
    row, teacher, clips = ROWS[name], load_model("tiny"), held_back(CLIPS)
    recipe, method = (row.recipe, row.method) if isinstance(row, Ablated) else (row, Method())
    with tempfile.TemporaryDirectory() as folder:
        if recipe is None:
            student = head_mean(teacher)
        else:
            chosen = dataclasses.replace(recipe, seed=seed)
            convert("tiny", Path(folder) / "out", chosen, data=CalibrationSetup(method=method))
            student = load_model(Path(folder) / "out")
        return validation_loss(teacher, clips, seeds=[seed]), validation_loss(student, clips, seeds=[seed])


def head_mean(teacher: WanModel) -> WanModel:
    """What a first script would do: average the heads' rotary keys, plain SVD of the rest, RMSNorm on the latent."""
    config = teacher.config
    with tempfile.TemporaryDirectory() as folder:
        convert("tiny", Path(folder) / "out", WEIGHTS)
        student = load_model(Path(folder) / "out")
    state = student.state_dict()
    with open_checkpoint("tiny") as checkpoint:
        for layer in LayerWalk(checkpoint, training_clips(16), Regime.of(config.streaming)):
            shape = student.config.mla.layers[layer.index] if student.config.mla else None
            assert shape is not None
            for name, tensor in head_mean_layer(layer, layer_moments(layer), shape, config.num_heads).items():
                state[f"blocks.{layer.index}.self_attn.{name}"].copy_(tensor)
    return student


def head_mean_layer(dense: Layer, moments: LayerMoments, layer: MLALayer, heads: int) -> dict[str, torch.Tensor]:
    """Tensors of one layer, in the names of a converted model with exact queries.

    The scale of keys and of the latent's norm come from real inputs, which is more than a first script would have.
    """
    w = dense.weights.double()
    dim, rank = w.q_weight.shape[0], layer.kv_lora_rank
    width = dim // heads
    rotary = [channel for pair, _ in layer.rope_components for channel in (2 * pair, 2 * pair + 1)]
    plain = [channel for channel in range(width) if channel not in rotary]
    key = affine(w.norm_k[:, None] * w.k_weight, w.norm_k * w.k_bias).unflatten(0, (heads, width))
    key = key * moments.inverse_norm
    shared = key[:, rotary].mean(0)
    value = w.v_weight.unflatten(0, (heads, width))
    joint = torch.cat((key[:, plain, :dim], value), 1).flatten(0, 1)
    left, sigma, right = torch.linalg.svd(joint, full_matrices=False)
    down = right[:rank]
    second = moments.covariance + torch.outer(moments.mean, moments.mean)
    gain = ((down @ second) * down).sum().div(rank).sqrt()
    select = torch.eye(width, dtype=torch.float64)[plain + rotary].expand(heads, -1, -1)
    return {
        "q_b_proj.weight": select,
        "kv_a_proj_with_mqa.weight": torch.cat((down, shared[:, :dim])),
        "kv_a_proj_with_mqa.bias": torch.cat((torch.zeros(rank, dtype=torch.float64), shared[:, dim])),
        "kv_a_layernorm.weight": gain.expand(rank),
        "kv_b_proj.weight": left[:, :rank] * sigma[:rank],
        "kv_b_proj.bias": key[:, plain, dim].flatten(),
        "o.weight": w.o_weight,
        "o.bias": w.o_bias + w.o_weight @ w.v_bias,
    }


if __name__ == "__main__":
    main()
