"""Python code that uses a published model, for its card."""

from __future__ import annotations

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig


def usage_code(repo: str, subfolder: str, config: WanConfig) -> str:
    """Python that loads a model of geometry `config` from the Hub and runs it; `subfolder` is "" for none."""
    return _camera_code(repo, config) if isinstance(config, CameraConfig) else _plain_code(repo, subfolder, config)


def _plain_code(repo: str, subfolder: str, config: WanConfig) -> str:
    """Python that rolls the model out, or runs one pass where it needs more than noise and text."""
    video = default_video(config)
    height, width = video.height // video.vae_stride, video.width // video.vae_stride
    frames = (config.streaming or StreamingConfig()).chunk_frames
    source = f'Source("{repo}", subfolder="{subfolder}")' if subfolder else f'"{repo}"'
    streams = config.streaming is not None and config.in_dim == config.out_dim and config.image_dim is None
    offered = ["LatentSize", "Sampler"] if streams else []
    offered += (["Source"] if subfolder else []) + ["load_model"] + (["rollout"] if streams else [])
    lines = [
        "import torch",
        "",
        f"from mlaconvert import {', '.join(offered)}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"model = load_model({source}, device=device)",
        f"context = torch.zeros(1, 1, {config.text_dim}, device=device)  # put the prompt's text embeddings here",
    ]
    if streams:
        lines += [
            f"sampler = Sampler.{'few_step()' if config.few_step else 'many_step(20)'}",
            f"size = LatentSize(frames={2 * frames}, height={height}, width={width})",
            "for latents in rollout(model, context, size=size, sampler=sampler):",
            f"    print(latents.shape)  # [1, {config.out_dim}, {frames}, {height}, {width}], to be decoded by the VAE",
        ]
    else:
        channels = config.out_dim
        lines.append(f"latents = torch.randn(1, {channels}, {frames}, {height}, {width}, device=device)")
        extra = ""
        if config.in_dim != channels:
            lines.append(
                f"image = torch.zeros(1, {config.in_dim - channels}, {frames}, {height}, {width}, device=device)"
                "  # mask and first frame"
            )
            extra += ", image_latents=image"
        if config.image_dim is not None:
            lines.append(f"features = torch.zeros(1, 257, {config.image_dim}, device=device)  # CLIP's, of the image")
            extra += ", image_features=features"
        if config.reference_dim is not None and config.streaming is None:
            lines.append(f"reference = torch.zeros(1, {config.reference_dim}, {height}, {width}, device=device)")
            extra += ", reference=reference"
        lines += [
            "with torch.no_grad():",
            f"    velocity = model(latents, torch.tensor([500.0], device=device), context{extra})",
            "print(velocity.shape)  # noise - data at timestep 500 of 1000, shaped like the latents",
        ]
    return "\n".join(lines)


def _camera_code(repo: str, config: CameraConfig) -> str:
    """Python that runs a chunk behind a past."""
    video, streaming = default_video(config), config.streaming or StreamingConfig()
    size = f"{video.height // video.vae_stride}, {video.width // video.vae_stride}"
    past, timestep = streaming.window_frames - streaming.chunk_frames, config.past_timestep
    return f"""import torch

from mlaconvert import load_camera_model
from mlaconvert.model.camera.model import Frames
from mlaconvert.model.camera.turns import Cameras

device = "cuda" if torch.cuda.is_available() else "cpu"
model = load_camera_model("{repo}", device=device)


def frames(count, timestep):  # put latents, actions and cameras of so many latent frames here
    latents = torch.randn(1, {config.in_dim}, count, {size}, device=device)  # noise, then the first image and its mask
    cameras = Cameras(torch.eye(4).repeat(count, 1, 1), torch.eye(3).repeat(count, 1, 1))
    return Frames(latents, torch.full((count,), timestep), torch.zeros(count), cameras)


with torch.no_grad():
    text = model.read(torch.zeros(1, 1, {config.text_dim}, device=device))  # put the prompt's text embeddings here
    past = model.remember(frames({past}, {timestep}), text)  # the frames that this chunk is to remember
    velocity = model(frames({streaming.chunk_frames}, 500.0), text, past)
print(velocity.shape, past.nbytes)"""
