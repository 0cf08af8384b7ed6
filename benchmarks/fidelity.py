"""What each way to convert loses on the shipped model before any training, over seeds; prints a Markdown table.

    python benchmarks/fidelity.py [--seeds 3] [--jobs 2] [--only REGEX] [--write BENCHMARKS.md] [--json]
    python benchmarks/fidelity.py --teacher runs/sister   # another model of the shipped one's clips

Two excesses of the velocity's loss on held-back clips above the teacher's, in percent of it: behind clean pasts (the
newest chunk at each of eight timesteps, as in a rollout), with its relative velocity error, and with noisy pasts (an
independent noise level per chunk, stratified shift-5 grid). A seed draws validation noise, random weights, calibration
noise. Jobs are processes of one thread each.
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
from typing import NamedTuple

import torch
from tables import put_between

from mlaconvert.clips.folder import save_shard
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
from mlaconvert.evaluation.timesteps import CleanPast, velocity_by_timestep
from mlaconvert.families.open import open_checkpoint
from mlaconvert.latent.matrices import affine
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

CLIPS = 64
BYTES = (108, 56, 42, 28, 14)
TINY = load_recipe("tiny")
TOTAL = TINY.kv_rank or 0
ROPE = 8  # a quarter of a head, where the rotary key has scalars of its own
change = dataclasses.replace
BASE = ConvertRecipe(init="svd", height=TINY.height, width=TINY.width, vae_stride=TINY.vae_stride)
WEIGHTS = change(BASE, kv_rank=TOTAL - ROPE, rope_dim=ROPE, q_rank="none")
DEFAULT = change(BASE, init="calibrated", kv_rank=TOTAL)
LATENT = change(DEFAULT, present="latent")
LAYERS = change(DEFAULT, refit_steps=0)
MEASURED = change(DEFAULT, refit_clips=40)  # refitted on the measured clips alone, which takes no fewer steps
NARROW = change(MEASURED, rope="latent")


@dataclasses.dataclass(frozen=True)
class Ablated:
    """A calibrated conversion of which some parts of the method are switched off."""

    recipe: ConvertRecipe
    method: Method


# Every row's name and recipe; None is the head-mean baseline, which the package does not offer.
TABLES: dict[str, dict[str, ConvertRecipe | Ablated | None]] = {
    "conversion, no training after it": {
        "random, latent RMSNorm": change(WEIGHTS, init="random"),
        "head-mean RoPE key, SVD of weights, latent RMSNorm": None,
        "shared complex RoPE key, SVD of weights, latent RMSNorm": WEIGHTS,
        "the same, queries compressed too: the paper's widths": change(WEIGHTS, q_rank=None),
        "calibrated on pasts that are half noisy, present latent too": change(LATENT, noisy_past=0.5),
        "calibrated on clean pasts, present latent too": LATENT,
        "the present exact, nothing refitted": Ablated(DEFAULT, Method(refit=False)),
        "and the past refitted layer by layer": LAYERS,
        "and the whole model refitted: **the default**": DEFAULT,
        "the same, refitted on the measured clips alone": MEASURED,
        "the same on pasts that are half noisy": change(MEASURED, noisy_past=0.5),
        "the default, latent RMSNorm": change(DEFAULT, key_norm="latent"),
        "the default at twice the cache": change(DEFAULT, kv_rank=2 * TOTAL),
        "everything kept (lossless)": change(BASE, init="lossless"),
    },
    "refitted layer by layer, without": {
        "centring": Ablated(LAYERS, Method(centring=False)),
        "sensitivity": Ablated(LAYERS, Method(sensitivity=False)),
        "sensitivity and Omega": Ablated(LAYERS, Method(weights=False)),
        "sharing scalars between layers": change(LAYERS, allocation="uniform"),
    },
    "bytes a token and layer (dense: 768 in bfloat16)": {
        **{f"{size}": change(DEFAULT, bytes_per_token=size) for size in BYTES},
        "28, refitted layer by layer": change(LAYERS, bytes_per_token=28),
    },
    "heads that read the past (32 wide)": {
        "scores 32, values 32, shared rotary key": NARROW,
        "28 (12 unrotated), 28": change(NARROW, nope_dim=12, rope_dim=16, v_dim=28),
        "24 (8 unrotated), 24": change(NARROW, nope_dim=8, rope_dim=16, v_dim=24),
        "20 (8 unrotated), 20": change(NARROW, nope_dim=8, rope_dim=12, v_dim=20),
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
    parser.add_argument("--teacher", default="tiny", help="what is converted (default tiny, the shipped model)")
    arguments = parser.parse_args()
    if arguments.write is not None and arguments.teacher != "tiny":
        parser.error("--write is for the shipped model; leave out --teacher")
    if arguments.only is not None and arguments.write is not None:
        parser.error("--write wants all rows; leave out --only")
    found: dict[str, dict[int, Measured]] = {name: {} for name in ROWS if re.search(arguments.only or "", name)}
    if not found:
        parser.error(f"no row's name has {arguments.only!r} in it")
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        work = {
            pool.submit(measure, name, seed, arguments.teacher): (name, seed)
            for seed in range(arguments.seeds)
            for name in found
        }
        for i, done in enumerate(as_completed(work), 1):
            name, seed = work[done]
            found[name][seed] = one = done.result()
            print(
                f"{i}/{len(work)}  {name}, seed {seed}: noisy {one.noisy:.2f}%, clean {one.clean:.2f}%, "
                f"velocity {one.velocity:.3f}%",
                file=sys.stderr,
                flush=True,
            )
    if arguments.json:
        print(json.dumps({name: {s: one._asdict() for s, one in by.items()} for name, by in found.items()}, indent=2))
        return
    text = tables(found)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "fidelity", text)


class Measured(NamedTuple):
    """Of one conversion, in percent: both excesses over the teacher's loss, and the velocity error."""

    noisy: float
    clean: float
    velocity: float  # behind clean pasts


def tables(found: dict[str, dict[int, Measured]]) -> str:
    """The tables as Markdown: means over seeds, and from the lowest to the highest."""
    lines = []
    for title, rows in TABLES.items():
        asked = [name for name in rows if name in found]
        if asked:
            lines += [f"| {title} | behind clean pasts | velocity | with noisy pasts |", "|---|---|---|---|"]
        for name in asked:
            measured = found[name].values()
            cells = [_spread([getattr(one, field) for one in measured]) for field in ("clean", "velocity", "noisy")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    low, mean, high = min(values), statistics.mean(values), max(values)
    digits = 1 if high >= 5 else 2 if high >= 0.05 else 5
    return f"{mean:.{digits}f}% ({low:.{digits}f} to {high:.{digits}f})"


def measure(name: str, seed: int, source: str = "tiny") -> Measured:
    """What the conversion of a row loses."""
    torch.set_num_threads(1)
    row, teacher = ROWS[name], load_model(source)
    recipe, method = (row.recipe, row.method) if isinstance(row, Ablated) else (row, Method())
    with tempfile.TemporaryDirectory() as folder:
        if recipe is None:
            student = head_mean(teacher, source)
        else:
            chosen = dataclasses.replace(recipe, seed=seed)
            data = None if source == "tiny" or recipe.init != "calibrated" else drawn(Path(folder) / "clips")
            convert(source, Path(folder) / "out", chosen, data=CalibrationSetup(data=data, method=method))
            student = load_model(Path(folder) / "out")
    return compared(teacher, student, seed)


def drawn(folder: Path) -> Path:
    """A folder with the clips that the shipped model's conversion and its refit take."""
    folder.mkdir()
    save_shard(folder / "drawn.safetensors", training_clips(160)._asdict())
    return folder


def compared(teacher: WanModel, student: WanModel, seed: int = 0) -> Measured:
    """What `student` loses against `teacher` on the held-back clips."""
    clips = held_back(CLIPS)
    past = CleanPast.of(velocity_by_timestep(teacher, student, clips, seed=seed))
    noisy = [validation_loss(model, clips, seeds=[seed]) for model in (student, teacher)]
    return Measured(100 * (noisy[0] / noisy[1] - 1), 100 * past.excess, 100 * past.velocity_error)


def head_mean(teacher: WanModel, source: str) -> WanModel:
    """What a first script would do: average the heads' rotary keys, plain SVD of the rest, RMSNorm on the latent."""
    config = teacher.config
    with tempfile.TemporaryDirectory() as folder:
        convert(source, Path(folder) / "out", WEIGHTS)
        student = load_model(Path(folder) / "out")
    state = student.state_dict()
    with open_checkpoint(source) as checkpoint:
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
