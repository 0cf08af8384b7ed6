"""Train the tiny model that ships with mlaconvert: a chunk-causal, text-conditioned video transformer in Wan's layout.

    python examples/train_tiny.py runs/tiny           # about 70 minutes on two CPU cores; start again to resume
    python examples/train_tiny.py runs/sister --adamw # its sister: the same data and size, trained with AdamW alone

Flow matching on clips drawn on the fly (mlaconvert/clips/tiny/clips.py). A batch is six frames in two chunks, or a sink
frame from the past and two chunks, which is what a rolling window shows the model. Behind a sink, the past is mostly
clean or slightly perturbed, as in a rollout; other chunks have a noise level of their own. Later, half of most batches
lie behind a past that the model generated itself, with the true next chunk as the target, so that a rollout's errors
are mended instead of growing. Muon (Jordan et al. 2024; torch 2.9 has it) trains the blocks' matrices, AdamW the rest;
the rate is constant, and falls to zero in the last third. Writes the model in float32 with an averaged copy of the
weights, the caption embeddings, and the loss curve (training.json)."""

from __future__ import annotations

import json
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

from mlaconvert.clips.tiny.clips import CAPTION_LEN, HEIGHT, VOCABULARY, WIDTH, embed_captions, sample_scenes
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.model.blocks import Block
from mlaconvert.model.rollout import Given, LatentSize, rollout
from mlaconvert.model.schedule import Sampler, add_noise, warp
from mlaconvert.model.wan import WanModel

BATCH, STEPS, WARM_UP, DECAY = 16, 9000, 200, 5500  # steps; the rate falls from DECAY on
MUON_RATE, ADAMW_RATE = 0.02, 3e-3
MATRICES_ADAMW_RATE = 2e-3  # of the blocks' matrices in the sister
# Own pasts, from step OWN on: rollouts of so many chunks behind a given one, sampled briefly, dropped where they leave
# the true clip.
OWN, OWN_CHUNKS, OWN_SAMPLER, STRAYED = 2500, 8, Sampler.many_step(4, shift=3.0), 0.15
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


def main(folder: Path, adamw_alone: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tables = caption_embeddings()
    model = WanModel(CONFIG)
    initialise(model)
    optimizers = make_optimizers(model, adamw_alone)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, curve = 0, []
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, curve, average = state["step"], state["curve"], state["average"]
    began, first, recent = time.time(), step, []
    pasts = own_pasts(model, tables, step)
    while step < STEPS:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step)
        clips, sigma, chunks, tokens, noise = batch(step, pasts)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(add_noise(clips, noise, sigma), 1000 * sigma, embed_captions(tokens, tables), chunks=chunks)
        per_frame = (out.float() - (noise - clips)).square().mean((1, 3, 4))
        counted = (sigma > 0).float()
        loss = (per_frame * counted).sum() / counted.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 100 / (step + 100))
        recent.append(loss.item())
        if step % 100 == 0:
            curve.append([step, round(sum(recent) / len(recent), 5)])
            left = (STEPS - step) * (time.time() - began) / (step - first) / 60
            print(f"step {step}/{STEPS}  loss {curve[-1][1]:.4f}  {left:.0f} min left", flush=True)
            recent = []
        if step % 500 == 0 or step == STEPS:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save({**state, "average": average, "step": step, "curve": curve}, folder / "state.tmp")
            (folder / "state.tmp").replace(state_file)
            export(folder, average, tables, curve)


def make_optimizers(model: WanModel, adamw_alone: bool) -> list[torch.optim.Optimizer]:
    """Muon (or AdamW too) for the blocks' matrices, AdamW for all else; each group keeps its "peak" rate."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = {"params": rest, "peak": ADAMW_RATE}
    if adamw_alone:
        decayed = {"params": matrices, "peak": MATRICES_ADAMW_RATE, "weight_decay": 0.1}
        return [torch.optim.AdamW([decayed, adamw], weight_decay=0.01, betas=(0.9, 0.99))]
    muon = {"params": matrices, "peak": MUON_RATE}
    return [
        torch.optim.Muon([muon], weight_decay=0.1, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW([adamw], weight_decay=0.01, betas=(0.9, 0.99)),
    ]


Batch = tuple[Tensor, Tensor, tuple[int, ...], Tensor, Tensor]
# Clips [N, 3, 7, H, W]: a sink frame, a chunk that the model made, the true next one; and their caption tokens [N, T].
Past = tuple[Tensor, Tensor]


def batch(step: int, pasts: Iterator[Past]) -> Batch:
    """Clips [B, 3, F, H, W], noise levels [B, F], chunks, caption tokens [B, T] and noise of one step."""
    g = torch.Generator().manual_seed(step)
    scenes = sample_scenes(BATCH, 1_000_000 + step)
    two_chunks = step % 3 == 0
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
    level = warp(torch.rand(BATCH, parts, generator=g), 3.0)
    # Behind a sink mostly all before the last chunk is clean, as the cache is in a rollout; else mostly nothing.
    known = torch.randint(0, parts, (BATCH, 2), generator=g)
    clean = torch.arange(parts) < (known.amin(1) if two_chunks else known.amax(1))[:, None]
    # A rollout's own past is not quite clean: perturb it a little, without saying so.
    noise = torch.randn(clips.shape, generator=g)
    slight = 0.12 * torch.rand(BATCH, 1, generator=g) * (torch.rand(BATCH, 1, generator=g) < 0.6)
    if step >= OWN and not two_chunks:
        half = BATCH // 2
        clips[:half], tokens[:half] = next(pasts)
        clean[:half] = torch.tensor([True, True, False])
        slight[:half] = 0
    level = level.masked_fill(clean, 0.0).repeat_interleave(torch.tensor(chunks), 1)
    clips = add_noise(clips, torch.randn(clips.shape, generator=g), slight * (level == 0))
    tokens[torch.rand(BATCH, generator=g) < 0.1] = 0
    return clips, level, chunks, tokens, noise


def own_pasts(model: WanModel, tables: dict[str, Tensor], first_seed: int) -> Iterator[Past]:
    """BATCH / 2 clips at a time, from rollouts of the model as it is."""
    chunk, half = 3, BATCH // 2
    for seed in count(first_seed):
        scenes = sample_scenes(BATCH, 500_000_000 + seed)
        g = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 60, (BATCH, 1), generator=g)
        clips, tokens = scenes.draw(start + torch.arange((OWN_CHUNKS + 1) * chunk)), scenes.tokens()
        with torch.autocast("cpu", torch.bfloat16):
            made = torch.cat(
                list(
                    rollout(
                        model,
                        embed_captions(tokens, tables),
                        size=LatentSize(frames=OWN_CHUNKS * chunk, height=HEIGHT, width=WIDTH),
                        given=Given(prefix=clips[:, :, :chunk]),
                        sampler=OWN_SAMPLER,
                        seed=seed,
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
        for some in torch.cat([torch.randperm(len(own), generator=g) for _ in range(2)]).split(half):
            if len(some) == half:
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


def rate(step: int) -> float:
    """The share of the peak rate: linear warm-up, constant, and linearly down to zero."""
    return min(1.0, (step + 1) / WARM_UP) if step < DECAY else (STEPS - step) / (STEPS - DECAY)


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
    named = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(Path(named[0] if named else "runs/tiny"), adamw_alone="--adamw" in sys.argv)
