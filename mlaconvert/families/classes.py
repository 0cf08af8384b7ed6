"""Which class config.json names, and what SkyReels-V2's says beside a Wan model's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import ConfigError
from mlaconvert.families.protocol import Layout

LATENT_CLASS, LATENT_SKYREELS_CLASS = "WanMLATransformer3DModel", "SkyReelsV2MLATransformer3DModel"
LATENT_HUNYUAN_CLASS = "HunyuanVideo_1_5_MLATransformer"  # which mlaconvert alone reads
_HOME = "mlaconvert.integrations.diffusers"


def converted_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the class that computes latent attention, if it has an `mla` section; otherwise as it is.

    A dense class that is given the folder would load the few tensors that it knows, and say nothing. Loaders built on
    diffusers ask `quantization_config` first whether they can read the weights, and refuse what they do not know.
    """
    if raw.get("mla") is None:
        return dict(raw)
    name = LATENT_CLASS if block_frames(raw) is None else LATENT_SKYREELS_CLASS
    loader = f"{_HOME}.{name}"
    if "mm_double_blocks_depth" in raw:
        name, loader = LATENT_HUNYUAN_CLASS, "mlaconvert.load_camera_model"
    method = f"mlaconvert's latent attention (load it with {loader})"
    return {**raw, "_class_name": name, "quantization_config": {"quant_method": method}}


def block_frames(raw: Mapping[str, Any]) -> int | None:
    """Latent frames of a block that SkyReels-V2 sees at once, 1 where it sees all; None for another model.

    Raises ConfigError for what is no count.
    """
    named = "SkyReels" in str(raw.get("_class_name", ""))
    if not named and raw.keys().isdisjoint(("inject_sample_info", "flag_causal_attention")):
        return None
    frames = 1 if raw.get("num_frame_per_block") is None else raw["num_frame_per_block"]
    if type(frames) is not int or frames < 1:
        raise ConfigError(f"num_frame_per_block is {frames!r}: it must be a positive number")
    return frames if raw.get("flag_causal_attention", True) else 1  # the flag is in native configs only


def with_frame_rates(raw: Mapping[str, Any], config: WanConfig) -> dict[str, Any]:
    """config.json, with the field for a frame-rate embedding that the weights show and it does not mention."""
    return {**raw, "inject_sample_info": True} if config.fps is not None else dict(raw)


def skyreels_fields(raw: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The fields of SkyReels-V2's config.json in `layout`; none for another model."""
    frames = block_frames(raw)
    if frames is None:
        return {}
    fields: dict[str, Any] = {
        "inject_sample_info": raw.get("inject_sample_info") is True,
        "num_frame_per_block": frames,
    }
    if layout == "native":
        return fields | {"flag_causal_attention": frames > 1}
    return fields | {"_class_name": "SkyReelsV2Transformer3DModel"}
