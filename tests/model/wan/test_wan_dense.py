"""Our Wan model against the reference implementations' outputs and against diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SaveFolder, randomize, relative
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import ConfigError, InputError, MLAConvertError
from mlaconvert.families.wan import WanFamily
from mlaconvert.model.attention.kernel import attend
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.rope import rotary, rotate
from mlaconvert.model.wan import WanModel
from mlaconvert.model.window import chunk_mask

TOLERANCE = 1e-5  # the differences that these vectors discriminate are 3e-2 and more


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return dict(load_file(Path(__file__).parents[2] / "golden" / "wan_tiny" / "golden.safetensors"))


def stream(model: WanModel, x: Tensor, v: dict[str, Tensor]) -> tuple[Tensor, LatentCache]:
    """Chunks of three frames, each run twice: the second run overwrites the first one's slots."""
    cache = LatentCache(model.config, batch=1, height=x.shape[3], width=x.shape[4])
    out = []
    for start in range(0, x.shape[2], 3):
        chunk = x[:, :, start : start + 3]
        model(chunk + 1, v["t"], v["context"], cache=cache, start_frame=start)
        out.append(model(chunk, v["t"], v["context"], cache=cache, start_frame=start))
    return torch.cat(out, 2), cache


def window(positions: str) -> StreamingConfig:
    return StreamingConfig(window_frames=6, positions=positions)  # type: ignore[arg-type]


def test_wan21_golden(golden: Path, vectors: dict[str, Tensor]) -> None:
    model = load_model(golden)
    assert model.config.streaming is None
    assert relative(model(vectors["x"], vectors["t"], vectors["context"]), vectors["wan21.out"]) < TOLERANCE


def test_per_frame_timesteps_equal_one_timestep(golden: Path, vectors: dict[str, Tensor]) -> None:
    out = load_model(golden)(vectors["x"], vectors["t"].expand(1, 6), vectors["context"])
    assert relative(out, vectors["wan21.out"]) < TOLERANCE


@pytest.mark.parametrize(
    ("positions", "latents", "expected"),
    [
        ("absolute", "x", "sf.chunks3.out"),
        ("absolute", "x_long", "sf.window6_sink1.out"),
        ("window", "x", "infrope.chunks3.out"),
        ("window", "x_long", "infrope.window6_sink1.out"),
    ],
)
def test_streaming_golden(
    golden: Path, vectors: dict[str, Tensor], positions: str, latents: str, expected: str
) -> None:
    out, _ = stream(load_model(golden, streaming=window(positions)), vectors[latents], vectors)
    assert relative(out, vectors[expected]) < TOLERANCE


def test_streaming_cache_golden(golden: Path, vectors: dict[str, Tensor]) -> None:
    """We cache keys unrotated; turned by their frames they are Self-Forcing's."""
    model = load_model(golden, streaming=window("absolute"))
    _, cache = stream(model, vectors["x"], vectors)
    keys, values = cache.layers[0].buffers
    turned = rotate(keys, rotary(torch.arange(6), 3, 5, model.config.rope_split))
    assert relative(turned, vectors["sf.chunks3.cache_k0"]) < TOLERANCE
    assert relative(values, vectors["sf.chunks3.cache_v0"]) < TOLERANCE


def test_streaming_equals_one_masked_pass(golden: Path, vectors: dict[str, Tensor]) -> None:
    model = load_model(golden, streaming=window("window"))
    masked = model(vectors["x"], vectors["t"], vectors["context"])
    streamed, _ = stream(model, vectors["x"], vectors)
    assert relative(streamed, masked) < TOLERANCE
    bidirectional = load_model(golden)(vectors["x"], vectors["t"], vectors["context"])
    assert relative(streamed, bidirectional) > 1e-2


@pytest.mark.parametrize("image", [False, True])
def test_equals_diffusers(save_folder: SaveFolder, image: bool) -> None:
    """Random weights through diffusers' own transformer, text- and image-to-video."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=20,
        in_channels=9 if image else 4,
        out_channels=4,
        text_dim=14,
        freq_dim=16,
        ffn_dim=44,
        num_layers=2,
        image_dim=10 if image else None,
        added_kv_proj_dim=60 if image else None,
        eps=1e-6,
    ).eval()
    randomize(reference)
    state = {name: t.contiguous() for name, t in reference.state_dict().items()}
    model = load_model(save_folder(state, dict(reference.config)))
    latents, t = torch.randn(2, 9 if image else 4, 3, 6, 10), torch.tensor([625.0, 20.0])
    context = torch.randn(2, model.config.text_len, 14)
    features = torch.randn(2, 257, 10) if image else None
    with torch.no_grad():
        expected = reference(latents, t, context, encoder_hidden_states_image=features).sample
    assert relative(model(latents, t, context, image_features=features), expected) < TOLERANCE
    each = torch.rand(2, 3 * 3 * 5) * 1000  # a timestep for every token, as Wan2.2 5B has it (expand_timesteps)
    with torch.no_grad():
        by_token = reference(latents, each, context, encoder_hidden_states_image=features).sample
    assert relative(model(latents, each, context, image_features=features), by_token) < TOLERANCE
    if image:
        split = model(latents[:, :4], t, context, image_latents=latents[:, 4:], image_features=features)
        assert relative(split, expected) < TOLERANCE
        assert relative(model(latents, t, context), expected) > 1e-3


@pytest.mark.parametrize(("image_dim", "norm"), [(None, True), (8, True), (None, False)])
def test_parameters_are_those_the_family_expects(image_dim: int | None, norm: bool) -> None:
    config = WanConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=10, image_dim=image_dim, cross_attn_norm=norm)
    with torch.device("meta"):
        model = WanModel(config)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == WanFamily().expected_shapes(config)


def test_chunk_mask_by_hand() -> None:
    """Chunks of 2 with a window of 5 and a sink of 1: the third chunk sees the sink and the last 4 frames."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
    rows = ["110000", "110000", "111100", "111100", "101111", "101111"]
    assert chunk_mask([2, 2, 2], streaming).int().tolist() == [[int(c) for c in row] for row in rows]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m(torch.zeros(1, 5, 3, 6, 10), torch.zeros(1), torch.zeros(1, 2, 40)),
        lambda m: m(torch.zeros(1, 16, 3, 5, 10), torch.zeros(1), torch.zeros(1, 2, 40)),
        lambda m: m(torch.zeros(1, 16, 3, 6, 10), torch.zeros(1, 2), torch.zeros(1, 2, 40)),
        lambda m: m(torch.zeros(1, 16, 3, 6, 10), torch.zeros(1), torch.zeros(1, 17, 40)),
        lambda m: m(torch.zeros(1, 16, 3, 6, 10), torch.zeros(1), torch.zeros(1, 2, 40), chunks=(2, 2)),
    ],
    ids=["channels", "patches", "timesteps", "text", "chunks"],
)
def test_wrong_shapes_are_refused(golden: Path, wrong: object) -> None:
    with pytest.raises(InputError):
        wrong(load_model(golden))  # type: ignore[operator]


def test_impossible_geometry_is_refused() -> None:
    base = WanConfig(dim=24, num_heads=2, num_layers=1, ffn_dim=4)
    for change in ({"num_heads": 5}, {"dim": 0}, {"eps": 2.0}, {"freq_dim": 3}, {"patch_size": (1, 2)}):
        with pytest.raises(ConfigError):
            dataclasses.replace(base, **change)  # type: ignore[arg-type]
    assert issubclass(ConfigError, MLAConvertError)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Against the formula in float64; values are narrower than keys, and every query misses some keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 5, 3, 12), "k": (2, 9, 3, 12), "v": (2, 9, 3, 6)}
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    pull = torch.randn(2, 5, 3, 6, generator=generator).double()
    mask = torch.ones(5, 9, dtype=torch.bool).tril(3)

    exact = {name: x.double().requires_grad_() for name, x in given.items()}
    scores = torch.einsum("bnhd,bmhd->bhnm", exact["q"], exact["k"]) * 0.4
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, exact["v"])
    expected.backward(pull)

    ours = {name: x.clone().requires_grad_() for name, x in given.items()}
    found = attend(ours["q"], ours["k"], ours["v"], mask, 0.4)
    found.backward(pull.to(dtype))
    assert found.dtype == dtype
    assert relative(found.detach(), expected.detach()) < tolerance
    for name in shapes:
        assert relative(ours[name].grad, exact[name].grad) < tolerance  # type: ignore[arg-type]
