"""Train the tiny model that ships with mlaconvert: a chunk-causal, text-conditioned video transformer in Wan's layout.

    python examples/train_tiny.py runs/tiny           # about three hours on one CPU core; start again to resume

Flow matching on clips drawn on the fly (mlaconvert/tiny/clips.py). A batch is six frames in two chunks, or a sink frame
from the past and two chunks, which is what a rolling window shows the model. Chunks have independent noise levels, or
clean, slightly perturbed predecessors, as in a rollout. Four parts, each with its own warm-up and decay: everything, on
wild scenes; mostly chunks behind a clean past; calmer scenes, many of them behind a past that the model generated
itself, with the true next chunk as the target, so that a rollout's errors are mended instead of growing; and the
scenes that ship. Writes the model in float32 with an averaged copy of the weights, the caption embeddings, and the
loss curve (training.json).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mlaconvert.config import StreamingConfig, WanConfig
from mlaconvert.model import Block, WanModel
from mlaconvert.rollout import Sampler, add_noise, rollout, warp
from mlaconvert.tiny.clips import (
    CALM,
    CAPTION_LEN,
    HEIGHT,
    STILL,
    VOCABULARY,
    WIDTH,
    WILD,
    Difficulty,
    embed_captions,
    sample_scenes,
)

BATCH, WARM_UP, EMA = 16, 200, 0.999
# The last step of each part, its peak learning rate, and its scenes.
PARTS = ((7500, 2e-3, WILD), (9900, 1.2e-3, WILD), (13500, 1e-3, STILL), (16300, 1e-3, CALM))
OWN_PASTS = 2  # the part that begins with them
STEPS = PARTS[-1][0]
# Own pasts: rollouts of so many chunks behind a given one, sampled briefly, dropped where they leave the true clip.
OWN, OWN_CHUNKS, OWN_SAMPLER, STRAYED = BATCH // 2, 6, Sampler.many_step(4, shift=3.0), 0.15
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=PARTS[0][1], betas=(0.9, 0.99), weight_decay=0.01)
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
    part = -1
    pasts: Iterator[Past] = iter(())
    while step < STEPS:
        if part != part_of(step):
            part = part_of(step)
            pasts = own_pasts(model, tables, PARTS[part][2], step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        clips, sigma, chunks, tokens, noise = batch(step, pasts)
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


def part_of(step: int) -> int:
    """The index in PARTS."""
    return sum(step >= end for end, _, _ in PARTS)


Batch = tuple[Tensor, Tensor, tuple[int, ...], Tensor, Tensor]
# Clips [N, 3, 7, H, W]: a sink frame, a chunk that the model made, the true next one; and their caption tokens [N, T].
Past = tuple[Tensor, Tensor]


def batch(step: int, pasts: Iterator[Past]) -> Batch:
    """Clips [B, 3, F, H, W], noise levels [B, F], chunks, caption tokens [B, T] and noise of one step."""
    g = torch.Generator().manual_seed(step)
    part = part_of(step)
    scenes = sample_scenes(BATCH, 1_000_000 + step, PARTS[part][2])
    two_chunks = step % 3 == 0 if part >= OWN_PASTS else step % 2 == 1
    if two_chunks:
        chunks: tuple[int, ...] = (3, 3)
        times = torch.arange(6).float().expand(BATCH, -1)
    else:
        chunks = (1, 3, 3)
        gap = torch.randint(2, 60, (BATCH, 1), generator=g).float()
        times = torch.cat((torch.zeros(BATCH, 1), gap + torch.arange(1, 7)), 1)
    clips = scenes.draw(times + torch.randint(0, 60, (BATCH, 1), generator=g))
    tokens = scenes.tokens()
    parts = len(chunks)
    level = warp(torch.rand(BATCH, parts, generator=g), 5.0 if part == 0 else 3.0)
    # Often everything before one chunk is clean, as the cache is in a rollout.
    clean_before = torch.randint(0, parts, (BATCH, 1), generator=g) * (
        torch.rand(BATCH, 1, generator=g) < (0.6 if part == 0 else 0.95)
    )
    clean = torch.arange(parts) < clean_before
    # A rollout's own past is not quite clean: perturb it a little, without saying so.
    noise = torch.randn(clips.shape, generator=g)
    slight = 0.12 * torch.rand(BATCH, 1, generator=g) * (torch.rand(BATCH, 1, generator=g) < 0.6)
    if part >= OWN_PASTS and not two_chunks:
        clips[:OWN], tokens[:OWN] = next(pasts)
        clean[:OWN] = torch.tensor([True, True, False])
        slight[:OWN] = 0
    level = level.masked_fill(clean, 0.0).repeat_interleave(torch.tensor(chunks), 1)
    clips = add_noise(clips, torch.randn(clips.shape, generator=g), slight * (level == 0))
    tokens[torch.rand(BATCH, generator=g) < 0.1] = 0
    return clips, level, chunks, tokens, noise


def own_pasts(model: WanModel, tables: dict[str, Tensor], difficulty: Difficulty, first_seed: int) -> Iterator[Past]:
    """OWN clips at a time, from rollouts of the model as it is."""
    for seed in count(first_seed):
        scenes, chunk = sample_scenes(BATCH, 500_000_000 + seed, difficulty), 3
        g = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 60, (BATCH, 1), generator=g)
        clips, tokens = scenes.draw(start + torch.arange((OWN_CHUNKS + 1) * chunk)), scenes.tokens()
        with torch.autocast("cpu", torch.bfloat16):
            made = torch.cat(
                list(
                    rollout(
                        model,
                        embed_captions(tokens, tables),
                        frames=OWN_CHUNKS * chunk,
                        height=HEIGHT,
                        width=WIDTH,
                        sampler=OWN_SAMPLER,
                        seed=seed,
                        prefix=clips[:, :, :chunk],
                    )
                ),
                2,
            )
        pairs, words = [], []
        for first in range(chunk, OWN_CHUNKS * chunk, chunk):
            past = made[:, :, first : first + chunk]
            close = (past - clips[:, :, first : first + chunk]).square().mean((1, 2, 3, 4)) < STRAYED
            following = clips[:, :, first + chunk : first + 2 * chunk]
            pairs.append(torch.cat((made[:, :, :1], past, following), 2)[close])
            words.append(tokens[close])
        own, captions = torch.cat(pairs), torch.cat(words)
        # Each is used twice, with new noise.
        for some in torch.cat([torch.randperm(len(own), generator=g) for _ in range(2)]).split(OWN):
            if len(some) == OWN:
                yield own[some], captions[some]


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
    part = part_of(step)
    start, (end, peak, _) = PARTS[part - 1][0] if part else 0, PARTS[part]
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
