"""A converted model, read back and held against its source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mlaconvert.config.camera import CameraConfig
from mlaconvert.conversion.from_weights import layer_modulation, time_modulation
from mlaconvert.conversion.plan import ConversionPlan, mla_of
from mlaconvert.conversion.recipes import timesteps_of
from mlaconvert.errors import MLAConvertError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.attention.dense import DenseAttention
from mlaconvert.model.attention.kernel import AttentionPlan, by_token
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.camera.attention import camera_attention
from mlaconvert.model.camera.turns import Cameras, Turns
from mlaconvert.model.rope import rotary
from mlaconvert.progress import Counter, Progress, silent

_VERIFY_GRID = (3, 4, 5)  # frames, height and width in tokens


@dataclass(frozen=True, kw_only=True)
class Verification:
    """`passed_through` tensors are the source's bit for bit. `attention_errors` of each converted layer: relative
    error of its output against the dense layer's on random inputs under the layer's own modulation. Beside an exact
    present each frame sees those before it, and the first one, which is exact by construction, does not count.
    """

    passed_through: int
    attention_errors: Mapping[int, float]


def verify_conversion(
    checkpoint: Checkpoint,
    path: Path,
    plan: ConversionPlan,
    *,
    device: torch.device,
    progress: Progress = silent,
) -> Verification:
    """Read the model at `path` back and hold it against the `checkpoint` that it was converted from.

    Raises MLAConvertError when a tensor that passed through differs in a bit, or an attention output is not finite.
    """
    passed = [operation for operation in plan.operations if operation.layer is None]
    errors: dict[int, float] = {}
    count = Counter(progress, "verify", len(plan.layers))
    count.show()
    with open_checkpoint(path) as converted:
        for operation in passed:
            expected = checkpoint.read(operation.canonical).to(operation.spec.dtype)
            if not _same_bits(expected, converted.read(operation.canonical)):
                raise MLAConvertError(
                    f"{path}: tensor {operation.spec.name!r} differs from the source's; convert again"
                )
        time = time_modulation(checkpoint, timesteps_of(plan.recipe, plan.source_config))
        for layer in plan.layers:
            x = _random_inputs(layer_modulation(checkpoint, layer, time), layer).to(device)
            error = _camera_error if isinstance(plan.config, CameraConfig) else _attention_error
            errors[layer] = error(checkpoint, converted, plan, layer, x)
            if not math.isfinite(errors[layer]):
                raise MLAConvertError(f"{path}: the attention output of layer {layer} is not finite")
            count.step()
    return Verification(passed_through=len(passed), attention_errors=errors)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def _random_inputs(modulation: Tensor, seed: int) -> Tensor:
    """Inputs [1, N, D] in float32 as a block's LayerNorm and modulation make them, each frame at its own timestep."""
    frames, height, width = _VERIFY_GRID
    noise = torch.randn(frames, height * width, modulation.shape[-1], generator=torch.Generator().manual_seed(seed))
    steps = torch.linspace(0, len(modulation) - 1, frames).round().long()
    shift, scale = modulation[steps].float().unsqueeze(2).unbind(1)
    return (noise * (1 + scale) + shift).flatten(0, 1).unsqueeze(0)


@torch.no_grad()
def _attention_error(
    checkpoint: Checkpoint, converted: Checkpoint, plan: ConversionPlan, layer: int, x: Tensor
) -> float:
    """|latent - dense| / |dense| of one layer's attention output, in float32."""
    prefix, mla = f"blocks.{layer}.self_attn.", mla_of(plan.config)
    frames, size = _VERIFY_GRID[0], _VERIFY_GRID[1] * _VERIFY_GRID[2]
    turn = rotary(torch.arange(frames, device=x.device), *_VERIFY_GRID[1:], plan.config.rope_split)
    passes, first = AttentionPlan(query_rotary=turn, key_rotary=turn), 0
    if mla.present == "exact":
        visible = torch.ones(frames, frames, dtype=torch.bool, device=x.device).tril()
        mask, segments = by_token(visible, size)
        passes, first = dataclasses.replace(passes, mask=mask, segments=segments), size
    with torch.device("meta"):
        dense = DenseAttention(plan.source_config)
        latent = LatentAttention(plan.config, mla, plan.layers[layer])
    outputs = []
    for module, source in ((dense, checkpoint), (latent, converted)):
        outputs.append(_with_weights(module, source, prefix, x.device)(x, passes)[:, first:])
    return _relative_error(*outputs)


@torch.no_grad()
def _camera_error(checkpoint: Checkpoint, converted: Checkpoint, plan: ConversionPlan, layer: int, x: Tensor) -> float:
    """The same of attention that turns by cameras: of the last frame, which sees those before it as they are cached.

    The cameras are drawn: rotations, and shifts about as large as what they see.
    """
    block, (frames, height, width) = f"blocks.{layer}.", _VERIFY_GRID
    drawn = torch.randn(frames, 3, 4, generator=torch.Generator().manual_seed(layer)).to(x.device)
    viewmats = torch.eye(4, device=x.device).repeat(frames, 1, 1)
    viewmats[:, :3] = torch.cat((torch.linalg.qr(drawn[..., :3]).Q, drawn[..., 3:]), -1)
    cameras = Cameras(viewmats, torch.eye(3, device=x.device).repeat(frames, 1, 1))
    outputs, last, size = [], frames - 1, height * width
    for config, source in ((plan.source_config, checkpoint), (plan.config, converted)):
        assert isinstance(config, CameraConfig)
        with torch.device("meta"):
            module, camera_o = camera_attention(config, layer), nn.Linear(config.dim, config.dim)
        _with_weights(module, source, f"{block}self_attn.", x.device)
        _with_weights(camera_o, source, f"{block}camera_o.", x.device)
        before, newest = (
            Turns.of(
                rotary(torch.arange(frames, device=x.device)[some], height, width, config.rope_split,
                       theta=config.rope_theta),
                Cameras(cameras.viewmats[some], cameras.intrinsics[some]),
            )
            for some in (slice(last), slice(last, None))
        )  # fmt: skip
        *_, cached = module(x[:, : last * size], before, keep=True)
        out, by_camera, _ = module(x[:, last * size :], newest, past=(cached, before))
        outputs.append(out + camera_o(by_camera))
    return _relative_error(*outputs)


def _relative_error(expected: Tensor, found: Tensor) -> float:
    """|found - expected| / |expected|, and 0 of what is the same: a layer may put out nothing at all."""
    missed = (found - expected).norm()
    return float(missed / expected.norm()) if missed != 0 else 0.0


def _with_weights(module: nn.Module, source: Checkpoint, prefix: str, device: torch.device) -> nn.Module:
    """`module` with the tensors of `source` below `prefix`, in float32."""
    state = {name: source.read(prefix + name).to(device, torch.float32) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module
