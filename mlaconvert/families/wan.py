"""The Wan family (2.1, 2.2, and the streaming models distilled from them), in native and diffusers layouts.

Canonical names are those of the native release. A converted model keeps its source's layout; the latent
attention's own tensors have the same names in both, below `self_attn.` or `attn1.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

from mlaconvert.config.geometry import FPS_CHOICES, WanConfig
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.parsing import parse
from mlaconvert.errors import CheckpointError, ConfigError, UnsupportedModelError
from mlaconvert.families.causal import Timing, read_timing
from mlaconvert.families.protocol import Layout, Signs
from mlaconvert.families.wan_shapes import QUANTIZER, expected_shapes
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.store import View

HEAD_DIM = 128  # of every published Wan model
Config = TypeVar("Config", bound=WanConfig)
_WHERE = "config.json"
_RATES = {"fps_projection.0.weight", "fps_projection.2.weight"}
_BLOCK = re.compile(r"(blocks\.(\d+)\.)(.+)")

# Native module (or bare parameter) -> diffusers, outside the blocks.
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "fps_embedding": "fps_embedding",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
    "ref_conv": "ref_conv",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
LATENT_ATTENTION = (
    "q_a_proj",
    "q_a_layernorm",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "k_norm_proj",
    "k_norm",
    "k_rope_proj",
    "kv_quantizer",
    "kv_b_proj",
    "v_proj",
    "past_out_proj",
)
# The same inside a block. diffusers numbers the norms in the order of use, so native norm3 is its norm2.
_INSIDE = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"self_attn.{name}": f"attn1.{name}" for name in LATENT_ATTENTION},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in (_ATTENTION | _IMAGE_ATTENTION).items()},
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in _INSIDE.items()}

# diffusers' config field -> ours; `dim` is num_attention_heads * attention_head_dim.
_FIELDS = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
_SAME_FIELDS = (
    *("dim", "num_heads", "num_layers", "ffn_dim", "model_type", "in_dim", "out_dim", "freq_dim"),
    *("text_dim", "text_len", "image_dim", "patch_size", "eps", "cross_attn_norm"),
)


class WanFamily:
    """See `mlaconvert.families.protocol.Family`."""

    name, title = "wan", "Wan"
    layouts: tuple[Layout, ...] = ("native", "diffusers")
    signs = Signs("patch_embedding.weight", re.compile(r"blocks\.0\.(self_attn|attn1)\."))
    relative: str | None = None

    def detect(self, raw_config: Mapping[str, Any] | None, names: Collection[str]) -> bool:
        """A patch embedding, and blocks with a self-attention in either layout's naming."""
        return self.signs.patches in names and self.signs.below("", names)

    def layout(self, names: Collection[str]) -> Layout:
        """diffusers' when the blocks name their self-attention `attn1`."""
        return "diffusers" if any(name.startswith("blocks.0.attn1.") for name in names) else "native"

    def canonical(self, name: str, layout: Layout) -> str | None:
        """Native name of `name`; None when it is no tensor of a Wan model."""
        if layout == "diffusers":
            return rename(name, _OUTSIDE_BACK, _INSIDE_BACK)
        return name if rename(name, _OUTSIDE, _INSIDE) else None

    def source(self, name: str, layout: Layout) -> str:
        """The name that `layout` gives to native `name`."""
        renamed = name if layout == "native" else rename(name, _OUTSIDE, _INSIDE)
        if renamed is None:
            raise UnsupportedModelError(f"{name!r} is not a tensor of a Wan model")
        return renamed

    def reshaped(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> dict[str, View]:
        """A patch embedding that is a linear layer of patches flattened by (channel, frame, row, column).

        Also modulations without their first dimension of one, which GGUF's quantiser drops.
        """
        patch = (raw_config or {}).get("patch_size", WanConfig.patch_size)
        sizes = tuple(patch) if isinstance(patch, (list, tuple)) else ()
        shapes: dict[str, tuple[int, ...]] = {
            name: (1, *info.shape)
            for name, info in tensors.items()
            if name.rpartition(".")[2] == "modulation" and len(info.shape) == 2
        }
        info = tensors.get("patch_embedding.weight")
        if info is not None and len(info.shape) == 2 and len(sizes) == 3:
            span = prod(sizes) if all(type(n) is int and n > 0 for n in sizes) else 0
            if span and info.shape[1] and not info.shape[1] % span:
                shapes["patch_embedding.weight"] = (info.shape[0], info.shape[1] // span, *sizes)
        return {tensors[name].name: _reshaped(tensors[name], shape) for name, shape in shapes.items()}

    def timing(self, raw_config: Mapping[str, Any] | None) -> Timing | None:
        """Its files say it, or nobody."""
        return None

    def parse_config(self, raw_config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> WanConfig:
        """Fields of `raw_config` (native or diffusers'), else what the shapes of `tensors` (canonical names) say.

        Raises UnsupportedModelError for a geometry that is not converted, ConfigError for an impossible field,
        CheckpointError when config.json and the weights disagree on the number of layers.
        """
        raw = dict(raw_config or {})
        _refuse_attention(raw)
        shown = _shape_fields(tensors)
        fields = shown | _raw_fields(raw) | _part_fields(raw, tensors, shown)
        if "num_heads" not in fields:
            if shown["dim"] % HEAD_DIM:
                raise UnsupportedModelError(
                    f"the weights do not say how many heads a width of {shown['dim']} has; "
                    "put the model's config.json beside them or pass --config FILE"
                )
            fields["num_heads"] = shown["dim"] // HEAD_DIM
        theirs = {"dim": f"{_FIELDS['num_heads']} * attention_head_dim"} if "attention_head_dim" in raw else {}
        theirs |= {ours: name for ours, name in _FIELDS.items() if name in raw}
        config = parse_named(WanConfig, fields, {ours: name for ours, name in theirs.items() if ours not in raw})
        if config.num_layers != shown["num_layers"]:  # before a shape is expected of every layer it promises
            raise CheckpointError(
                f"{_WHERE} says num_layers {config.num_layers}, the weights have {shown['num_layers']} layers"
            )
        mla = MLAConfig.from_json(raw["mla"], _WHERE) if raw.get("mla") is not None else None
        return replace(config, streaming=read_timing(raw, where=_WHERE).streaming, mla=mla)

    def reason_against(self, beyond: Collection[str], missing: Collection[str]) -> str | None:
        """There is none: it then runs in its own code, with `swap_attention`."""
        return None

    def check_attention(self, config: WanConfig, tensors: Mapping[str, TensorInfo]) -> None:
        """Name two kinds of attention that would otherwise show as wrong shapes: grouped queries, norms per head.

        Raises UnsupportedModelError.
        """
        for i in range(config.num_layers):
            prefix = f"blocks.{i}.self_attn."
            norm, query = tensors.get(prefix + "norm_q.weight"), tensors.get(prefix + "q.weight")
            if norm is not None and norm.shape == (config.head_dim,) != (config.dim,):
                raise UnsupportedModelError(
                    f"{norm.name!r} norms each head ({config.head_dim} channels); "
                    f"expected one norm over all {config.dim}"
                )
            for name in ("k.weight", "v.weight"):
                found = tensors.get(prefix + name)
                if query is not None and found is not None and found.shape[:1] < query.shape[:1]:
                    raise UnsupportedModelError(
                        f"{found.name!r} has {found.shape[0]} rows for {query.shape[0]} of the queries (grouped-query "
                        "attention); expected as many key and value heads as query heads"
                    )

    def raw_config(self, config: WanConfig, layout: Layout = "native") -> dict[str, Any]:
        """config.json in native fields or in diffusers', as the published models have it.

        diffusers' class knows no length that texts are padded to; another one than 512 is kept beside its fields.
        Raises UnsupportedModelError for a reference image, which none of diffusers' classes reads.
        """
        if layout == "diffusers":
            if config.reference_dim is not None:
                raise UnsupportedModelError(
                    "the model reads a reference image (ref_conv), which no class of diffusers does; keep it native"
                )
            return {
                "_class_name": "WanTransformer3DModel",
                "added_kv_proj_dim": config.dim if config.image_dim is not None else None,
                "attention_head_dim": config.head_dim,
                "cross_attn_norm": config.cross_attn_norm,
                "eps": config.eps,
                "ffn_dim": config.ffn_dim,
                "freq_dim": config.freq_dim,
                "image_dim": config.image_dim,
                "in_channels": config.in_dim,
                "num_attention_heads": config.num_heads,
                "num_layers": config.num_layers,
                "out_channels": config.out_dim,
                "patch_size": list(config.patch_size),
                "pos_embed_seq_len": None,
                "qk_norm": "rms_norm_across_heads",
                "rope_max_seq_len": 1024,
                "text_dim": config.text_dim,
            } | ({} if config.text_len == 512 else {"text_len": config.text_len})
        name = "WanModel" if config.streaming is None else "CausalWanModel"
        raw: dict[str, Any] = {"_class_name": name}
        raw |= {field: getattr(config, field) for field in _SAME_FIELDS}
        raw["patch_size"] = list(config.patch_size)
        if config.fps is not None:
            raw |= {"inject_sample_info": True, "fps": config.fps}
        if config.reference_dim is not None:
            raw |= {"add_ref_conv": True, "in_dim_ref_conv": config.reference_dim}
        return raw

    def expected_shapes(self, config: WanConfig) -> dict[str, tuple[int, ...]]:
        """Native name -> shape, in module order; latent attention where `config.mla` has it."""
        return expected_shapes(config)


def parse_named(cls: type[Config], fields: Mapping[str, Any], theirs: Mapping[str, str]) -> Config:
    """The geometry of `fields`. Raises ConfigError with the names that config.json has for them: ours -> `theirs`."""
    try:
        return parse(cls, fields, _WHERE)
    except ConfigError as error:
        named = re.sub(r"\b[a-z_]+\b", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ConfigError(named) from None


def rename(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    """`name` with its module replaced by the table's, that for all blocks inside one; None when the table lacks it."""
    match = _BLOCK.fullmatch(name)
    block, rest, table = (match[1], match[3], inside) if match else ("", name, outside)
    if rest in table:  # a bare parameter, such as modulation
        return block + table[rest]
    module, _, leaf = rest.rpartition(".")
    leaves = QUANTIZER if module.endswith("kv_quantizer") else ("weight", "bias")
    return f"{block}{table[module]}.{leaf}" if module in table and leaf in leaves else None


def _refuse_attention(raw: Mapping[str, Any]) -> None:
    """Attention that Wan's classes can be configured to, and that no published model has."""
    if raw.get("qk_norm", True) not in (True, "rms_norm_across_heads"):
        raise UnsupportedModelError(
            f"{_WHERE} says qk_norm {raw['qk_norm']!r}; expected RMSNorm across all heads (rms_norm_across_heads)"
        )
    if raw.get("window_size") not in (None, -1, [-1, -1]):
        raise UnsupportedModelError(
            f"{_WHERE} says window_size {raw['window_size']}; expected [-1, -1], no local window"
        )


def _raw_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, in WanConfig's names; a null field counts as absent."""
    fields = {ours: raw.get(ours, raw.get(theirs)) for ours, theirs in _FIELDS.items()}
    fields |= {name: raw.get(name) for name in (*_SAME_FIELDS, "few_step") if name not in _FIELDS}
    heads, head_dim = fields["num_heads"], raw.get("attention_head_dim")
    if fields["dim"] is None and isinstance(heads, int) and isinstance(head_dim, int):
        fields["dim"] = heads * head_dim
    return {name: value for name, value in fields.items() if value is not None}


def _part_fields(raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that some models have: config.json says it, or tensors of the right shapes show it."""
    fields: dict[str, Any] = {}
    rates, convolution = tensors.get("fps_embedding.weight"), tensors.get("ref_conv.weight")
    has_rates = raw.get("inject_sample_info")  # SkyReels-V2's field
    if has_rates is None:
        has_rates = rates is not None and rates.shape == (FPS_CHOICES, shown["dim"]) and tensors.keys() >= _RATES
    if has_rates:
        fields["fps"] = raw.get("fps", 24)
    has_reference = raw.get("add_ref_conv", raw.get("has_ref_conv"))  # Wan Fun's fields
    if has_reference:
        fields["reference_dim"] = raw.get("in_dim_ref_conv", shown["out_dim"])
    elif has_reference is None and convolution is not None and len(convolution.shape) == 4:
        rows, channels, *patch = convolution.shape
        if rows == shown["dim"] and patch == shown["patch_size"][1:]:
            fields["reference_dim"] = channels
    return fields


def sizes_of(tensors: Mapping[str, TensorInfo], name: str, ndim: int, called: str | None = None) -> tuple[int, ...]:
    """The `ndim` sizes of a tensor. Raises UnsupportedModelError, which calls it `called`, when it has others."""
    found = tensors[name].shape if name in tensors else None
    if found is None or len(found) != ndim or min(found) < 1:
        what = "missing" if found is None else list(found)
        raise UnsupportedModelError(f"tensor {(called or name)!r} is {what}; expected {ndim} dimensions")
    return found


def _shape_fields(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the shapes say. Raises UnsupportedModelError when a tensor that says it is missing or odd."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return sizes_of(tensors, name, ndim)

    def of_part(name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a matrix, or `otherwise` for a model that is built without the whole part that it is of."""
        module = re.split(r"(?:\d+|head)\.weight$", name)[0]
        return shape(name, 2) if any(other.startswith(module) for other in tensors) else otherwise

    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    out_dim = of_part("head.head.weight", (in_dim * prod(patch), dim))[0] // prod(patch)
    image_dim = shape("img_emb.proj.1.weight", 2)[1] if "img_emb.proj.1.weight" in tensors else None
    return {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": out_dim,
        "patch_size": patch,
        "num_layers": len({match[2] for name in tensors if (match := _BLOCK.fullmatch(name))}),
        "ffn_dim": of_part("blocks.0.ffn.0.weight", (4 * dim, dim))[0],
        "freq_dim": of_part("time_embedding.0.weight", (dim, WanConfig.freq_dim))[1],
        "text_dim": of_part("text_embedding.0.weight", (dim, WanConfig.text_dim))[1],
        "image_dim": image_dim,
        "cross_attn_norm": "blocks.0.norm3.weight" in tensors,
        "model_type": "ti2v" if in_dim == out_dim == 48 else "t2v" if in_dim == out_dim else "i2v",
    }


def _reshaped(info: TensorInfo, shape: tuple[int, ...]) -> View:
    return View(replace(info, shape=shape), lambda read: read(info.name).reshape(shape))
