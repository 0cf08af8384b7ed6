"""What several of these tests are made of: a small streaming model, its windows, and runs in the code of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from streaming_codebases import TheirAttention, TheirModel, TheirPipeline
from support import SaveFolder, randomize
from torch import Tensor, nn

from mlaconvert.clips.folder import Clips
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.integrations.collect import Pass, collect
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

# Heads of 14 are 7 rotary pairs, split (3, 2, 2). Clips of 4 x 6 latent pixels have 2 x 3 tokens a frame.
STREAMING = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
CONFIG = WanConfig(
    dim=42, num_heads=3, num_layers=3, ffn_dim=20, freq_dim=8, text_dim=9, text_len=6, in_dim=4, out_dim=4
)
TOKENS = 6
GRID = (2, 3)
NATIVE = {
    "_class_name": "WanModel", "model_type": "t2v", "dim": 42, "num_heads": 3, "num_layers": 3, "ffn_dim": 20,
    "freq_dim": 8, "text_dim": 9, "text_len": 6, "in_dim": 4, "out_dim": 4,
    "streaming": dataclasses.asdict(STREAMING),
}  # fmt: skip
REGIME = Regime.of(STREAMING, few_step=False, present="exact")
THEIRS = StreamingConfig(chunk_frames=3, window_frames=6, sink_frames=1, positions="absolute")
CAMERA = torch.randn(96, 12, generator=torch.Generator().manual_seed(5))


def make_model(save_folder: SaveFolder) -> Path:
    model = WanModel(dataclasses.replace(CONFIG, streaming=STREAMING))
    randomize(model)
    return save_folder(model.state_dict(), NATIVE)


def make_clip(frames: int = 9) -> Clips:
    """One clip: its windows are batches of one."""
    g = torch.Generator().manual_seed(0)
    return Clips(torch.randn(1, 4, frames, 4, 6, generator=g), torch.randn(1, 5, 9, generator=g))


@torch.no_grad()
def collect_windows(
    source: Path, output: Path, clip: Clips, count: int = 12, dtype: torch.dtype = torch.float32
) -> None:
    """Our own model runs the windows of a calibration, each whole: past and newest chunk in one call."""
    model, newest = load_model(source), [0]

    def read(arguments: Mapping[str, Any]) -> Pass:
        frames = arguments["x"].shape[1] // TOKENS
        return Pass(arguments["x"], (frames, *GRID), queries=newest[0])

    with collect(model, output=output, streaming=STREAMING, read=read):
        for window in windows(clip, REGIME):
            newest[0] = window.queries
            model(window.latents, window.timestep, window.context, chunks=window.chunks)


def with_camera(folder: Path, golden: Path) -> Path:
    """A copy of the golden checkpoint with an encoder of camera poses in its second block, as world models have."""
    folder.mkdir()
    (folder / "config.json").write_bytes((golden / "config.json").read_bytes())
    state = load_file(golden / WEIGHTS_NAME) | {"blocks.1.cam_encoder.weight": CAMERA}
    save_file(state, folder / WEIGHTS_NAME)
    return folder


def world_pipeline(golden: Path, kind: type[TheirAttention] = TheirAttention, window: int = 6) -> TheirPipeline:
    """Their pipeline around a model with that encoder."""
    pipe = TheirPipeline(TheirModel(load_model(golden), window, 1, kind))
    encoder = nn.Linear(12, 96, bias=False)
    encoder.weight.data.copy_(CAMERA)
    pipe.generator.model.blocks[1].cam_encoder = encoder  # type: ignore[union-attr]
    return pipe


def generate(pipe: TheirPipeline, context: Tensor, frames: int = 12) -> Tensor:
    return pipe.rollout(context, frames, Sampler(timesteps=(1000.0, 500.0), renoise=True))
