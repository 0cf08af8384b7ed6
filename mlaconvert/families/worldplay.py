"""HY-WorldPlay's autoregressive model: HunyuanVideo 1.5 with cameras, actions and a cache of the past.

Its files have one layout, "native" here: `double_blocks.{i}.img_attn_q.weight` and so on. The canonical names are the
house's where it has a word: `img_attn_*` is the self-attention that is converted, `img_attn_prope_proj` its second
output (`camera_o`). The latent attention's own tensors stand below `img_attn.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import CheckpointError, UnsupportedModelError
from mlaconvert.families.causal import SETTINGS, Timing
from mlaconvert.families.protocol import Layout, Signs
from mlaconvert.families.wan import LATENT_ATTENTION, parse_named, rename, sizes_of
from mlaconvert.families.worldplay_shapes import expected_shapes
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.store import View

# What its pipeline gives a chunk of 4 latent frames: 20 of the past, chosen by their cameras, counted from 0.
ROLLOUT = StreamingConfig(chunk_frames=4, window_frames=24, sink_frames=0, positions="window")
_ROPE = {128: (16, 56, 56)}  # of a head of that width, in the published models
_WHERE = "config.json"
_CAMERAS = re.compile(r"double_blocks\.\d+\.img_attn_prope_proj\.")
_ATTENTION = re.compile(r"double_blocks\.(\d+)\.img_attn[._](.+)")
_REFINER = "txt_in.individual_token_refiner."

# Their module -> ours, outside the blocks, inside one, and inside one of those that the text goes through first.
_OUTSIDE = {
    "img_in.proj": "patch_embedding",
    "cond_type_embedding": "type_embedding",
    "final_layer.linear": "head.head",
    "final_layer.adaLN_modulation.1": "head.modulation",
    "txt_in.input_embedder": "text_embedding.input_embedder",
    **{f"txt_in.c_embedder.linear_{i}": f"text_embedding.c_embedder.linear_{i}" for i in (1, 2)},
    **{f"{theirs}.mlp.{i}": f"{ours}.{i}" for i in (0, 2) for theirs, ours in (
        ("time_in", "time_embedding"), ("action_in", "action_embedding"), ("txt_in.t_embedder", "text_embedding.time")
    )},
    **{f"byt5_in.{part}": f"glyph_embedding.{part}" for part in ("layernorm", "fc1", "fc2", "fc3")},
    **{f"vision_in.proj.{i}": f"img_emb.proj.{i}" for i in (0, 1, 3, 4)},
}  # fmt: skip
_INSIDE = {
    "img_attn_prope_proj": "camera_o",
    "img_mod.linear": "modulation",
    "txt_mod.linear": "text_modulation",
    **{f"img_attn.{name}": f"self_attn.{name}" for name in LATENT_ATTENTION},
}
for _theirs, _attention, _ffn in (("img", "self_attn", "ffn"), ("txt", "text_attn", "text_ffn")):
    _INSIDE |= {f"{_theirs}_attn_{part}": f"{_attention}.{part}" for part in "qkv"}
    _INSIDE |= {f"{_theirs}_attn_{part}_norm": f"{_attention}.norm_{part}" for part in "qk"}
    _INSIDE |= {f"{_theirs}_attn_proj": f"{_attention}.o"}
    _INSIDE |= {f"{_theirs}_mlp.fc1": f"{_ffn}.0", f"{_theirs}_mlp.fc2": f"{_ffn}.2"}
_REFINING = {
    name: name for name in ("norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2",
                            "adaLN_modulation.1")
}  # fmt: skip
_OUTSIDE_BACK, _INSIDE_BACK = ({ours: theirs for theirs, ours in table.items()} for table in (_OUTSIDE, _INSIDE))
_UNREAD = ("guidance_in.", "time_r_in.", "vector_in.", "single_blocks.")
# CameraConfig's field -> theirs.
_FIELDS = {"dim": "hidden_size", "num_heads": "heads_num", "num_layers": "mm_double_blocks_depth"}
_FIELDS |= {"patch_size": "patch_size", "rope_dims": "rope_dim_list", "rope_theta": "rope_theta"}
_FIELDS |= {"out_dim": "out_channels"}
# Settings of their class that change what is computed: the one that is published, and converted.
_ONLY = {"qk_norm": True, "qk_norm_type": "rms", "qkv_bias": True, "text_projection": "single_refiner"}
_ONLY |= {"mlp_act_type": "gelu_tanh", "use_attention_mask": True}


class WorldPlayFamily:
    """See `mlaconvert.families.protocol.Family`."""

    name, title = "hy-worldplay", "HY-WorldPlay"
    layouts: tuple[Layout, ...] = ("native",)
    signs = Signs("img_in.proj.weight", re.compile(r"double_blocks\.\d+\.img_attn"))
    relative: str | None = "HunyuanVideo"

    def detect(self, raw_config: Mapping[str, Any] | None, names: Collection[str]) -> bool:
        """HunyuanVideo 1.5's blocks, with the output of an attention that turns by cameras."""
        return any(map(_CAMERAS.match, names))

    def layout(self, names: Collection[str]) -> Layout:
        """There is only one."""
        return "native"

    def canonical(self, name: str, layout: Layout) -> str | None:
        """The house's name of `name`; None when it is no tensor of such a model. Its attention's are never None."""
        if name.startswith("blocks."):
            return None
        if name.startswith(_REFINER):
            found = rename(name.removeprefix(_REFINER), {}, _REFINING)
            return None if found is None else f"text_embedding.{found}"
        if match := _ATTENTION.fullmatch(name):
            unknown = f"blocks.{match[1]}.self_attn.{match[2]}"
            return rename(name.removeprefix("double_"), {}, _INSIDE) or unknown
        return rename(name.removeprefix("double_"), _OUTSIDE, _INSIDE)

    def source(self, name: str, layout: Layout) -> str:
        """Their name of a canonical one."""
        if layout != "native":
            raise UnsupportedModelError(f"{self.title} has no {layout} layout; keep the source's")
        return _their_name(name)

    def reshaped(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> dict[str, View]:
        """None are."""
        return {}

    def timing(self, raw_config: Mapping[str, Any] | None) -> Timing | None:
        """That of its own pipeline; no file says it."""
        if raw_config is not None and "streaming" in raw_config:
            return None
        remark = (
            "taken for the autoregressive model: a bidirectional one has the same tensors, and no cache; so has "
            "minWM's with cameras and actions, whose cache holds no keys that cameras turned"
        )
        return Timing(streaming=ROLLOUT, assumed=frozenset(SETTINGS), remarks=(remark,))

    def parse_config(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> CameraConfig:
        """Fields of `raw_config` in their class's names, else what the shapes of `tensors` (canonical names) say.

        Raises UnsupportedModelError for a geometry that is not converted, ConfigError for an impossible field,
        CheckpointError when config.json and the weights disagree on the number of layers.
        """
        raw = dict(raw_config or {})
        for field, value in _ONLY.items():
            if raw.get(field, value) != value:
                raise UnsupportedModelError(f"{_WHERE} says {field} {raw[field]!r}; expected {value!r}")
        shown = _shape_fields(tensors)
        fields = shown | {ours: raw[theirs] for ours, theirs in _FIELDS.items() if raw.get(theirs) is not None}
        if "rope_dims" not in fields:
            raise UnsupportedModelError(
                "the weights do not say how many channels turn along time, height and width; put the model's "
                "config.json beside them or pass --config FILE"
            )
        config = parse_named(CameraConfig, fields, {ours: theirs for ours, theirs in _FIELDS.items() if theirs in raw})
        if config.num_layers != shown["num_layers"]:  # before a shape is expected of every layer it promises
            raise CheckpointError(
                f"{_WHERE} says mm_double_blocks_depth {config.num_layers}, the weights have {shown['num_layers']} "
                "layers"
            )
        mla = MLAConfig.from_json(raw["mla"], _WHERE) if raw.get("mla") is not None else None
        return replace(config, mla=mla)

    def reason_against(self, beyond: Collection[str], missing: Collection[str]) -> str | None:
        """What its class can have, and its autoregressive pass never reads, is carried along; nothing may be missing.

        minWM's models that turn by cameras have `action_in` only where they were trained with discrete actions.
        """
        if missing and all(name.startswith("action_embedding.") for name in missing):
            return (
                "models without discrete actions, such as minWM's, are not converted, since "
                "mlaconvert.load_camera_model gives every frame one; give a model with action_in"
            )
        if not missing and all(name.startswith(_UNREAD) for name in beyond):
            return None
        return "mlaconvert.load_camera_model could not run such a model, converted; give one with its own tensors alone"

    def check_attention(self, config: WanConfig, tensors: Mapping[str, TensorInfo]) -> None:
        """Nothing shows otherwise than by its shape."""

    def raw_config(self, config: WanConfig, layout: Layout = "native") -> dict[str, Any]:
        """config.json in the fields of their class."""
        assert isinstance(config, CameraConfig)
        return {
            "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
            "concat_condition": config.in_dim == 2 * config.out_dim + 1,
            "glyph_byT5_v2": config.glyph_dims is not None,
            "heads_num": config.num_heads,
            "hidden_size": config.dim,
            "in_channels": config.out_dim if config.in_dim == 2 * config.out_dim + 1 else config.in_dim,
            "mlp_width_ratio": config.ffn_dim / config.dim,
            "mm_double_blocks_depth": config.num_layers,
            "mm_single_blocks_depth": 0,
            "out_channels": config.out_dim,
            "patch_size": list(config.patch_size),
            "rope_dim_list": list(config.rope_dims),
            "rope_theta": config.rope_theta,
            "text_states_dim": config.text_dim,
            "use_cond_type_embedding": config.token_types,
            "vision_projection": "none" if config.image_dim is None else "linear",
            **({} if config.image_dim is None else {"vision_states_dim": config.image_dim}),
            **_ONLY,
        }

    def expected_shapes(self, config: WanConfig) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, in module order; latent attention where `config.mla` has it."""
        assert isinstance(config, CameraConfig)
        return expected_shapes(config)


def _their_name(name: str) -> str:
    """Their name of a canonical one."""
    if name.startswith("text_embedding.blocks."):
        return _REFINER + name.removeprefix("text_embedding.")
    found = rename(name, _OUTSIDE_BACK, _INSIDE_BACK)
    if found is None:
        raise UnsupportedModelError(f"{name!r} is not a tensor of {WorldPlayFamily.title}")
    return f"double_{found}" if found.startswith("blocks.") else found


def _shape_fields(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the shapes say. Raises UnsupportedModelError when a tensor that says it is missing or odd."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return sizes_of(tensors, name, ndim, _their_name(name))

    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    norm = "q_a_layernorm" if "blocks.0.self_attn.q_a_layernorm.weight" in tensors else "norm_q"
    (head_dim,) = shape(f"blocks.0.self_attn.{norm}.weight", 1)
    glyphs = (
        [shape(f"glyph_embedding.fc{i}.weight", 2)[1] for i in (1, 2, 3)] if _has(tensors, "glyph_embedding") else None
    )
    refiner = "text_embedding.blocks."
    fields = {
        "dim": dim,
        "num_heads": max(1, dim // head_dim),
        "num_layers": _count(tensors, "blocks."),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "model_type": "i2v",
        "in_dim": in_dim,
        "out_dim": shape("head.head.weight", 2)[0] // prod(patch),
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.input_embedder.weight", 2)[1],
        "image_dim": shape("img_emb.proj.1.weight", 2)[1] if _has(tensors, "img_emb") else None,
        "patch_size": patch,
        "refiner_layers": _count(tensors, refiner),
        "refiner_dim": shape(f"{refiner}0.mlp.fc1.weight", 2)[0],
        "glyph_dims": glyphs,
        "token_types": _has(tensors, "type_embedding"),
    }
    return fields | ({"rope_dims": list(_ROPE[head_dim])} if head_dim in _ROPE else {})


def _has(tensors: Mapping[str, TensorInfo], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in tensors)


def _count(tensors: Mapping[str, TensorInfo], prefix: str) -> int:
    """How many blocks there are below `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})
