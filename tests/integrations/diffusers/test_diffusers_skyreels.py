"""SkyReels-V2 in diffusers: blocks of frames, diffusion forcing and its pipelines, against the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError
from mlaconvert.families.classes import block_frames
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.model.load import load_model

diffusers = pytest.importorskip("diffusers")

from wan_diffusers import IMAGE, inputs, reference  # noqa: E402

from mlaconvert.integrations.diffusers import (  # noqa: E402
    SkyReelsV2MLATransformer3DModel,
    WanMLATransformer3DModel,
)

TOLERANCE = 1e-5
FRAMES = 6


def converted(root: Path, **changes: Any) -> tuple[Any, Path]:
    """A dense SkyReels-V2 model, and the folder that it is saved to."""
    model = reference("SkyReelsV2Transformer3DModel", **changes)
    model.save_pretrained(root / "source")
    return model, root / "source"


def lossless(source: Path, out: Path, **recipe: Any) -> Any:
    convert(source, out, ConvertRecipe(init="lossless", layers="0,2", **recipe))
    return WanMLATransformer3DModel.from_pretrained(out)


CALLS: dict[str, dict[str, Any]] = {
    "one timestep": {"timestep": torch.tensor([300.0, 500.0])},
    "diffusion forcing": {
        "timestep": torch.linspace(900, 20, 2 * FRAMES).reshape(2, FRAMES),
        "enable_diffusion_forcing": True,
        "fps": [0, 1],
    },
}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("changes", [{}, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("block", [1, 3])
@torch.no_grad()
def test_a_lossless_model_equals_the_dense_one(
    tmp_path: Path, block: int, changes: dict[str, Any], layout: str
) -> None:
    dense, source = converted(tmp_path, num_frame_per_block=block, **changes)
    model = lossless(source, tmp_path / "out", layout=layout)
    assert type(model) is SkyReelsV2MLATransformer3DModel
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["_class_name"] == type(model).__name__
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path / "out"))) is type(model)
    x, _, context = inputs(dense.config.in_channels, FRAMES, 512 if changes else 13)
    image = torch.randn(2, 257, 10) if changes else None
    for now in (block, 2):  # pipelines set another size
        for one in (dense, model):
            one._set_ar_attention(now)
        for call in CALLS.values():
            given = {"encoder_hidden_states": context, "encoder_hidden_states_image": image, **call}
            expected = dense(x, **given).sample
            assert relative(model(x, **given).sample, expected) < TOLERANCE
            assert relative(model(x, return_dict=False, **given)[0], expected) < TOLERANCE
    for one in (dense, model):
        one._set_ar_attention(1)
    assert relative(model(x, **given).sample, expected) > 1e-3  # blocks matter


@torch.no_grad()
def test_blocks_win_over_the_window_of_a_stream(tmp_path: Path) -> None:
    """The window is for mlaconvert's own runtime; diffusers' class sees all earlier blocks."""
    dense, source = converted(tmp_path, num_frame_per_block=3)
    window = StreamingConfig(chunk_frames=3, window_frames=3, sink_frames=0)
    model = lossless(source, tmp_path / "out", streaming=window)
    x, _, context = inputs(frames=FRAMES, text=13)
    for call in CALLS.values():
        expected = dense(x, encoder_hidden_states=context, **call).sample
        assert relative(model(x, encoder_hidden_states=context, **call).sample, expected) < TOLERANCE


@torch.no_grad()
def test_a_stream_of_single_frames_is_masked_as_our_runtime_masks_it(tmp_path: Path) -> None:
    _, source = converted(tmp_path)
    stream = StreamingConfig(chunk_frames=2, window_frames=5, sink_frames=1)
    model = lossless(source, tmp_path / "out", streaming=stream)
    x, t, context = inputs(frames=FRAMES)
    expected = load_model(tmp_path / "out")(x, t, context)
    assert relative(model(x, t, context).sample, expected) < TOLERANCE


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_saved_and_made_models_keep_their_blocks(tmp_path: Path, layout: Any) -> None:
    _, source = converted(tmp_path, num_frame_per_block=3)
    model = lossless(source, tmp_path / "out", layout=layout)
    model.save_pretrained(tmp_path / "saved")
    made = WanMLATransformer3DModel.from_config(model.config)
    assert type(made) is SkyReelsV2MLATransformer3DModel
    made.layout = layout
    made.load_state_dict(model.state_dict())
    made.save_pretrained(tmp_path / "made")
    raws = [json.loads((tmp_path / name / CONFIG_NAME).read_text()) for name in ("out", "saved", "made")]
    assert raws[1] == raws[0]
    for name, raw in zip(("out", "saved", "made"), raws, strict=True):
        assert block_frames(raw) == 3
        assert WanMLATransformer3DModel.from_pretrained(tmp_path / name).config.num_frame_per_block == 3


@pytest.mark.parametrize(
    ("raw", "frames"),
    [
        ({"num_frame_per_block": 3}, None),  # Self-Forcing's
        ({"_class_name": "CausalWanModel", "num_frame_per_block": 3}, None),
        ({"_class_name": "SkyReelsV2Transformer3DModel"}, 1),
        ({"_class_name": "SkyReelsV2Transformer3DModel", "num_frame_per_block": None}, 1),
        ({"_class_name": "SkyReelsV2Transformer3DModel", "num_frame_per_block": 5}, 5),
        ({"_class_name": "WanModel", "inject_sample_info": False, "num_frame_per_block": 5}, 5),
        ({"num_frame_per_block": 5, "flag_causal_attention": True}, 5),
        ({"num_frame_per_block": 5, "flag_causal_attention": False}, 1),
    ],
)
def test_what_a_config_says_of_blocks(raw: dict[str, Any], frames: int | None) -> None:
    assert block_frames(raw) == frames


@pytest.mark.parametrize("value", [0, -3, 2.5, "3", True])
def test_a_block_that_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_frame_per_block"):
        block_frames({"_class_name": "SkyReelsV2Transformer3DModel", "num_frame_per_block": value})


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@torch.no_grad()
def test_a_frame_rate_is_told(tmp_path: Path, layout: Any) -> None:
    """In diffusers by each call, in our own runtime by the model: 24 frames a second, or what its config.json says."""
    dense, source = converted(tmp_path, inject_sample_info=True)
    raw = json.loads((source / CONFIG_NAME).read_text())
    (source / CONFIG_NAME).write_text(json.dumps({k: v for k, v in raw.items() if k != "inject_sample_info"}))
    with open_checkpoint(source) as checkpoint:  # the weights show it
        assert not checkpoint.passengers
    model = lossless(source, tmp_path / "out", layout=layout)
    assert type(model) is SkyReelsV2MLATransformer3DModel
    model.save_pretrained(tmp_path / "saved")
    raws = [json.loads((tmp_path / name / CONFIG_NAME).read_text()) for name in ("out", "saved")]
    assert raws[0] == raws[1]
    assert raws[0]["inject_sample_info"] is True
    x, _, context = inputs(frames=FRAMES)
    call = CALLS["one timestep"] | {"encoder_hidden_states": context}
    expected = [dense(x, fps=[row, row], **call).sample for row in (0, 1)]
    assert relative(expected[0], expected[1]) > 1e-2
    for row in (0, 1):
        assert relative(model(x, fps=[row, row], **call).sample, expected[row]) < TOLERANCE
    forced = {name: value[:1] for name, value in call.items()} | {"enable_diffusion_forcing": True, "fps": [0]}
    forced["timestep"] = CALLS["diffusion forcing"]["timestep"][:1]  # diffusers adds frame rates to one clip at a time
    assert relative(model(x[:1], **forced).sample, dense(x[:1], **forced).sample) < TOLERANCE
    given = (x, call["timestep"], context)
    assert relative(load_model(tmp_path / "out")(*given), expected[1]) < TOLERANCE
    (tmp_path / "out" / CONFIG_NAME).write_text(json.dumps(raws[0] | {"fps": 16}))
    assert relative(load_model(tmp_path / "out")(*given), expected[0]) < TOLERANCE


@torch.no_grad()
def test_caches_are_those_of_the_dense_model(tmp_path: Path) -> None:
    """Attention is broadcast; what needs diffusers' register of blocks is refused by diffusers for both."""
    dense, source = converted(tmp_path, num_frame_per_block=3)
    model = lossless(source, tmp_path / "out")
    x, _, context = inputs(frames=FRAMES, text=13)
    found = []
    for one in (dense, model):
        with pytest.raises(ValueError, match="not registered"):
            one.enable_cache(diffusers.FirstBlockCacheConfig())
        settings = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        one.enable_cache(settings)
        found.append([one(noise, encoder_hidden_states=context, **CALLS["one timestep"]).sample for noise in (x, -x)])
    assert relative(found[1][1], found[0][1]) < TOLERANCE
    model.disable_cache()
    assert relative(model(-x, encoder_hidden_states=context, **CALLS["one timestep"]).sample, found[1][1]) > 1e-3


def shoot(pipe: Any, **options: Any) -> Tensor:
    shown: Tensor = pipe(
        prompt=None,
        prompt_embeds=torch.randn(1, 9, 14, generator=torch.Generator().manual_seed(1)),
        negative_prompt_embeds=torch.randn(1, 9, 14, generator=torch.Generator().manual_seed(2)),
        height=48,
        width=80,
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **options,
    ).frames
    return shown


FORCING: dict[str, dict[str, Any]] = {
    "all frames at once": {"num_frames": 21},
    "block after block": {"num_frames": 21, "ar_step": 2, "causal_block_size": 3},
    "long": {"num_frames": 33, "base_num_frames": 21, "overlap_history": 5, "addnoise_condition": 20},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["plain", *FORCING])
def test_pipelines_make_what_the_dense_model_makes(tmp_path: Path, way: str) -> None:
    dense, source = converted(tmp_path)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    kind = diffusers.SkyReelsV2Pipeline if way == "plain" else diffusers.SkyReelsV2DiffusionForcingPipeline
    videos = []
    for transformer in (dense, lossless(source, tmp_path / "out")):
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        pipe = kind(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(4)  # of the noise on frames that are kept
        videos.append(shoot(pipe, **({"num_frames": 21} if way == "plain" else FORCING[way])))
    assert relative(videos[1], videos[0]) < 1e-4
