"""Published relatives of Wan, read from their own layouts, against what their own classes compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_relatives import FUN, make, vectors
from support import relative
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import InputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

TOLERANCE = 1e-5  # what is left out, or done in another order, makes differences of 1e-2 and more


def stream(model: WanModel, x: Tensor, context: Tensor, size: int, times: Callable[[int], Tensor]) -> Tensor:
    """Chunks of `size` frames, each at its `times` and then at timestep 0, which is what stays in the cache."""
    cache, out = LatentCache(model.config, batch=1, height=x.shape[3], width=x.shape[4]), []
    for start in range(0, x.shape[2], size):
        for t in (times(start), torch.zeros(1)):
            out.append(model(x[:, :, start : start + size], t, context, cache=cache, start_frame=start))
    return torch.cat(out[::2], 2)


def test_krea_realtime(tmp_path: Path) -> None:
    v = vectors("krea_tiny")
    folder = make(tmp_path, "krea_tiny", 11, "model.", in_dim=5, out_dim=5)
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.passengers
        assert checkpoint.config.streaming is not None
    found = stream(load_model(folder), v["x"], v["context"], 3, lambda _: torch.tensor([625.0]))
    assert relative(found, v["chunks.out"]) < TOLERANCE
    # A past that is computed again: the sink and the newest two frames are one chunk, before the one that is made.
    window = StreamingConfig(chunk_frames=3, window_frames=6, sink_frames=1)
    model, past = load_model(folder, streaming=window), torch.cat((v["x"][:, :, :1], v["x"][:, :, 4:6]), 2)
    cache = LatentCache(model.config, batch=1, height=6, width=10)
    model(past, torch.zeros(1), v["context"], cache=cache, start_frame=0)
    newest = model(v["x"][:, :, 6:], torch.tensor([625.0]), v["context"], cache=cache, start_frame=3)
    assert relative(newest, v["recomputed.out"]) < TOLERANCE
    assert relative(newest, v["chunks.out"][:, :, 6:]) > 1e-2


@pytest.mark.parametrize("fps", [16, 24])
def test_skyreels_is_told_its_frame_rate(tmp_path: Path, fps: int) -> None:
    v = vectors("skyreels_v2_tiny")
    folder = make(tmp_path, "skyreels_v2_tiny", 21, in_dim=5, out_dim=5, fps=24)
    config = json.loads((folder / CONFIG_NAME).read_text())
    if fps == 16:
        (folder / CONFIG_NAME).write_text(json.dumps(config | {"fps": 16}))
    model = load_model(folder)
    assert model.config.fps == fps
    assert model.config.streaming is None
    found = model(v["x"], v["t"], v["context"])
    assert relative(found, v[f"fps{fps}.out"]) < TOLERANCE
    assert relative(v["fps16.out"], v["fps24.out"]) > 1e-2
    if fps == 24:
        frames = model(v["x"], v["t_frames"], v["context"])
        assert relative(frames, v["forcing.fps24.out"]) < TOLERANCE
        model = load_model(folder, streaming=StreamingConfig(chunk_frames=3, window_frames=6, sink_frames=0))
        assert relative(model(v["x"], v["t_frames"], v["context"]), v["blocks3.fps24.out"]) < TOLERANCE


@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_longlive_2(tmp_path: Path, positions: str) -> None:
    v = vectors("longlive_2_tiny")
    folder = make(tmp_path, "longlive_2_tiny", 31, "model.", in_dim=6, out_dim=6)
    with open_checkpoint(folder) as checkpoint:
        found = checkpoint.config.streaming
        assert found == StreamingConfig(chunk_frames=2, window_frames=6, sink_frames=2, positions="absolute")
    told = StreamingConfig(chunk_frames=2, window_frames=6, sink_frames=2, positions=positions)  # type: ignore[arg-type]
    out = stream(
        load_model(folder, streaming=told), v["x"], v["context"], 2, lambda start: v["t"][:, start : start + 2]
    )
    assert relative(out, v["absolute.out" if positions == "absolute" else "relative.out"]) < TOLERANCE
    assert relative(v["absolute.out"], v["relative.out"]) > 1e-3


def test_a_timestep_for_every_token(tmp_path: Path) -> None:
    """Wan2.2 5B's image-to-video, whose first frame is clean."""
    v = vectors("longlive_2_tiny")
    folder = make(tmp_path, "longlive_2_tiny", 31, in_dim=6, out_dim=6)
    raw = json.loads((folder / CONFIG_NAME).read_text()) | {"_class_name": "WanModel"}
    raw = {
        key: value for key, value in raw.items() if key not in ("local_attn_size", "num_frame_per_block", "sink_size")
    }
    (folder / CONFIG_NAME).write_text(json.dumps(raw))
    model, x = load_model(folder), v["x"][:, :, :3]
    assert model.config.streaming is None
    assert relative(model(x, v["t_tokens"], v["context"]), v["tokens.out"]) < TOLERANCE
    with pytest.raises(InputError, match=r"must be \[1\] or \[1, 3\] or \[1, 45\], not \[1, 44\]"):
        model(x, v["t_tokens"][:, 1:], v["context"])


@pytest.mark.parametrize("name", FUN)
def test_wan_fun(tmp_path: Path, name: str) -> None:
    v, (seed, parts) = vectors("wan_fun_tiny"), FUN[name]
    folder = make(tmp_path, f"wan_fun_tiny/{name}", seed, in_dim=15, out_dim=5, **parts)
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.passengers
        assert (checkpoint.config.image_dim, checkpoint.config.reference_dim) == (
            parts.get("image_dim"), parts.get("reference_dim"),
        )  # fmt: skip
    model = load_model(folder)
    features = torch.rand(2, 257, 1280, generator=torch.Generator().manual_seed(43)) - 0.5
    clip = features if "image_dim" in parts else None
    given = (v["x"], v["t"], v["context"])
    if name == "inp":
        assert relative(model(*given, image_latents=v["y"], image_features=clip), v["inp.out"]) < TOLERANCE
        with pytest.raises(InputError, match="this model reads none"):
            model(*given, image_latents=v["y"], reference=v["reference"])
        return
    whole = model(*given, image_latents=v["y"], image_features=clip, reference=v["reference"])
    assert relative(whole, v[f"{name}.out"]) < TOLERANCE
    if name == "control":
        without = model(*given, image_latents=v["y"], image_features=clip)
        assert relative(without, v["control.without.out"]) < TOLERANCE
        assert relative(whole, without) > 1e-2
        blank = {"image_latents": v["y"], "image_features": features, "reference": v["reference"]}
        found = model(*given, **{key: torch.zeros_like(value) for key, value in blank.items()})
        assert relative(found, v["control.blank.out"]) < TOLERANCE
    else:
        frames = v["t_tokens"][:, ::15]  # one for each frame is what their code has no name for, and ours has
        tokens = model(v["x"], v["t_tokens"], v["context"], image_latents=v["y"], reference=v["reference"])
        assert relative(tokens, v["control22.tokens.out"]) < TOLERANCE
        by_frame = model(v["x"], frames, v["context"], image_latents=v["y"], reference=v["reference"])
        spread = frames.repeat_interleave(15, 1)
        by_token = model(v["x"], spread, v["context"], image_latents=v["y"], reference=v["reference"])
        assert relative(by_frame, by_token) < 1e-6
    for wrong in (v["reference"][:, :4], v["reference"][:1], v["reference"].mT):
        with pytest.raises(InputError, match=r"the reference is .*expected \[2, 5, 6, 10\]"):
            model(*given, image_latents=v["y"], reference=wrong)
    with pytest.raises(InputError, match="not by a model that streams"):
        model(*given, image_latents=v["y"], reference=v["reference"], chunks=[1, 2])
    with pytest.raises(TypeError, match="'referenc' is no argument"):
        model(*given, image_latents=v["y"], referenc=v["reference"])
