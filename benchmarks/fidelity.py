"""What each way to convert loses on the shipped model before any training, over seeds; prints a Markdown table.

    python benchmarks/fidelity.py [--seeds 3] [--json]

Excess is the validation loss on held-back clips above the teacher's, in percent of it (block-causal, an independent
noise level per chunk, stratified shift-5 grid). A seed draws validation noise, random weights, calibration noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from mlaconvert.calibrate import Layer, Regime, Sweep, layer_moments
from mlaconvert.config import ConvertRecipe, MLALayer
from mlaconvert.convert import convert, load_recipe
from mlaconvert.evaluate import validation_loss
from mlaconvert.factorize import LayerMoments, affine
from mlaconvert.families import open_checkpoint
from mlaconvert.model import WanModel, load_model
from mlaconvert.tiny.clips import held_back, training_clips

CLIPS = 64
TINY = load_recipe("tiny")
LATENT, ROPE = TINY.kv_rank or 0, TINY.rope_dim or 0
ROWS = {
    "random, latent RMSNorm": ConvertRecipe(init="random", q_rank="none"),
    "head-mean RoPE key, SVD of weights, latent RMSNorm": None,
    "shared complex RoPE key, weights only, latent RMSNorm": ConvertRecipe(init="svd", q_rank="none"),
    "the same, queries compressed (the paper's widths)": ConvertRecipe(init="svd"),
    "the same, exact queries and key norm": ConvertRecipe(init="svd", q_rank="none", key_norm="token"),
    "the same, rotary keys serve content too": ConvertRecipe(
        init="svd", q_rank="none", key_norm="token", rotary_in_content=True
    ),
    "calibrated, uniform": ConvertRecipe(init="calibrated", allocation="uniform"),
    "calibrated, adaptive": ConvertRecipe(init="calibrated"),
    "calibrated, adaptive, twice the cache": ConvertRecipe(init="calibrated", kv_rank=2 * LATENT, rope_dim=2 * ROPE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    teacher, clips = load_model("tiny"), held_back(CLIPS)
    base = {seed: validation_loss(teacher, clips, seeds=[seed]) for seed in range(arguments.seeds)}
    found: dict[str, list[float]] = {}
    for name, recipe in ROWS.items():
        for seed, expected in base.items():
            with tempfile.TemporaryDirectory() as folder:
                student = head_mean(teacher) if recipe is None else converted(recipe, seed, Path(folder) / "out")
            found.setdefault(name, []).append(100 * (validation_loss(student, clips, seeds=[seed]) / expected - 1))
        print(f"{name}: {' '.join(f'{value:.2f}%' for value in found[name])}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"teacher_loss": list(base.values()), "excess_percent": found}, indent=2))
        return
    print(f"Teacher's validation loss {statistics.mean(base.values()):.4f} (mean of {len(base)} seeds).\n")
    print("| conversion, no training after it | excess, mean | lowest to highest |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.mean(values):.1f}% | {min(values):.1f} to {max(values):.1f}% |")


def converted(recipe: ConvertRecipe, seed: int, folder: Path) -> WanModel:
    """The model that `recipe` makes with `seed`, at the tiny recipe's widths where it does not say."""
    options = {**vars(TINY), **{k: v for k, v in vars(recipe).items() if v is not None}, "seed": seed}
    for name in ("q_rank", "key_norm", "rotary_in_content", "nope_dim"):
        options[name] = getattr(recipe, name)
    convert("tiny", folder, ConvertRecipe(**options))
    return load_model(folder)


def head_mean(teacher: WanModel) -> WanModel:
    """What a first script would do: average the heads' rotary keys, plain SVD of the rest, RMSNorm on the latent."""
    config = teacher.config
    recipe = ConvertRecipe(init="svd", q_rank="none", kv_rank=LATENT, rope_dim=ROPE, height=24, width=32, vae_stride=1)
    with tempfile.TemporaryDirectory() as folder:
        convert("tiny", Path(folder) / "out", recipe)
        student = load_model(Path(folder) / "out")
    state = student.state_dict()
    with open_checkpoint("tiny") as checkpoint:
        for layer in Sweep(checkpoint, training_clips(16), Regime.of(config.streaming)):
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
