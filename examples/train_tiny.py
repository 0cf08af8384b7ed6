"""Train the tiny model that ships with mlaconvert: a chunk-causal, text-conditioned video transformer in Wan's layout.

    python examples/train_tiny.py runs/tiny            # about two hours on one CPU core; start again to resume

Flow matching on clips drawn on the fly (mlaconvert/tiny/clips.py). Half of the clips are six frames in two chunks;
the others are a sink frame from the past and two chunks, which is what a rolling window shows the model. Chunks have
independent noise levels (shift 5), or clean, slightly perturbed predecessors, as in a rollout. Writes the model in
float32 with an averaged copy of the weights, the caption embeddings, and the loss curve (training.json).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mlaconvert.config import StreamingConfig, WanConfig
from mlaconvert.model import Block, WanModel
from mlaconvert.rollout import add_noise, warp
from mlaconvert.tiny.clips import CAPTION_LEN, VOCABULARY, embed_captions, sample_scenes

BATCH, WARM_UP, PEAK_RATE, EMA = 16, 200, 2e-3, 0.999
# First everything; then mostly chunks behind a clean past, which is what a rollout asks for.
FIRST, STEPS, SECOND_RATE = 7500, 9900, 1.2e-3
CONFIG = WanConfig(
    dim=192,
    num_heads=6,
    num_layers=6,
    ffn_dim=352,
    in_dim=3,
    out_dim=3,
    freq_dim=64,
    text_dim=32,
    text_len=8,
    patch_size=(1, 4, 4),
    streaming=StreamingConfig(),
)


GEOMETRY = (
    "dim",
    "num_heads",
    "num_layers",
    "ffn_dim",
    "in_dim",
    "out_dim",
    "freq_dim",
    "text_dim",
    "text_len",
    "eps",
)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tables = caption_embeddings()
    model = WanModel(CONFIG)
    initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, curve = 0, []
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, curve = state["step"], state["curve"]
        average = state["average"]
    began, first, recent = time.time(), step, []
    while step < STEPS:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        clips, sigma, chunks, tokens, noise = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(add_noise(clips, noise, sigma), 1000 * sigma, embed_captions(tokens, tables), chunks=chunks)
        per_frame = (out.float() - (noise - clips)).square().mean((1, 3, 4))
        counted = (sigma > 0).float()
        loss = (per_frame * counted).sum() / counted.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            weight = 1 - min(EMA, step / (step + 100))
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), weight)
        recent.append(loss.item())
        if step % 100 == 0:
            curve.append([step, round(sum(recent) / len(recent), 5)])
            left = (STEPS - step) * (time.time() - began) / (step - first) / 60
            print(f"step {step}/{STEPS}  loss {curve[-1][1]:.4f}  {left:.0f} min left", flush=True)
            recent = []
        if step % 500 == 0 or step == STEPS:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step, "curve": curve}, folder / "state.tmp")
            (folder / "state.tmp").replace(state_file)
            export(folder, average, tables, curve)


def batch(step: int) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor, Tensor]:
    """Clips [B, 3, F, H, W], noise levels [B, F], chunks, caption tokens [B, T] and noise of one step."""
    g = torch.Generator().manual_seed(step)
    scenes = sample_scenes(BATCH, 1_000_000 + step)
    if step % 2:
        chunks: tuple[int, ...] = (3, 3)
        times = torch.arange(6).float().expand(BATCH, -1)
    else:
        chunks = (1, 3, 3)
        gap = torch.randint(2, 60, (BATCH, 1), generator=g).float()
        times = torch.cat((torch.zeros(BATCH, 1), gap + torch.arange(1, 7)), 1)
    clips = scenes.draw(times + torch.randint(0, 60, (BATCH, 1), generator=g))
    count = len(chunks)
    second = step >= FIRST
    level = warp(torch.rand(BATCH, count, generator=g), 3.0 if second else 5.0)
    # Often everything before one chunk is clean, as the cache is in a rollout.
    clean_before = torch.randint(0, count, (BATCH, 1), generator=g) * (
        torch.rand(BATCH, 1, generator=g) < (0.95 if second else 0.6)
    )
    clean = torch.arange(count) < clean_before
    level = level.masked_fill(clean, 0.0).repeat_interleave(torch.tensor(chunks), 1)
    # A rollout's own past is not quite clean: perturb it a little, without saying so.
    noise = torch.randn(clips.shape, generator=g)
    slight = 0.12 * torch.rand(BATCH, 1, generator=g) * (torch.rand(BATCH, 1, generator=g) < 0.6)
    clips = add_noise(clips, torch.randn(clips.shape, generator=g), slight * (level == 0))
    tokens = scenes.tokens()
    tokens[torch.rand(BATCH, generator=g) < 0.1] = 0
    return clips, level, chunks, tokens, noise


def caption_embeddings() -> dict[str, Tensor]:
    """The fixed tables that stand in for a text encoder: words, and their places in a caption."""
    g = torch.Generator().manual_seed(7)
    return {
        "words": torch.randn(len(VOCABULARY), CONFIG.text_dim, generator=g),
        "positions": torch.randn(CAPTION_LEN, CONFIG.text_dim, generator=g),
    }


def initialise(model: WanModel) -> None:
    """Wan's initialisation: Xavier for linear layers, small embeddings, and a head that starts at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        nn.init.normal_(cast(Block, block).modulation, std=CONFIG.dim**-0.5)
    nn.init.normal_(model.head.modulation, std=CONFIG.dim**-0.5)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for embedding in (model.text_embedding, model.time_embedding):
        for layer in (embedding[0], embedding[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine down to a thousandth; once for each part."""
    start, end, peak = (0, FIRST, PEAK_RATE) if step < FIRST else (FIRST, STEPS, SECOND_RATE)
    if step < start + WARM_UP:
        return peak * (step - start + 1) / WARM_UP
    share = (step - start - WARM_UP) / (end - start - WARM_UP)
    return peak * max(0.001, 0.5 + 0.5 * math.cos(math.pi * share))


def export(folder: Path, average: dict[str, Tensor], tables: dict[str, Tensor], curve: list[list[float]]) -> None:
    """Write the averaged weights, their config, the caption tables and the loss curve."""
    save_file(average, folder / "diffusion_pytorch_model.safetensors")
    save_file(tables, folder / "captions.safetensors")
    config = {
        "_class_name": "CausalWanModel",
        "model_type": "t2v",
        **{name: getattr(CONFIG, name) for name in (*GEOMETRY, "patch_size")},
        "streaming": asdict(CONFIG.streaming) if CONFIG.streaming else None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    record = {
        "steps": STEPS,
        "batch": BATCH,
        "loss": "mean squared velocity error, every 100 steps",
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))
