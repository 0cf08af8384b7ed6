"""Open a checkpoint and recognise its model: `open_checkpoint` is the one way in.

It reads names and shapes only; weights are read one at a time, by canonical name, whatever the file's layout.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mlaconvert.checkpoint import (
    EXPERT_FOLDERS,
    FLOATS,
    TINY,
    TensorInfo,
    TensorStore,
    check_finite,
    find_beside,
    open_store,
)
from mlaconvert.config import WanConfig
from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.base import AttentionWeights, Family, Layout
from mlaconvert.families.causal import Timing, is_causal_class, read_timing
from mlaconvert.families.classes import converted_config, skyreels_fields
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.wrappers import STREAMING_KEYS, unwrap
from mlaconvert.inputs import read_json, read_yaml

__all__ = [
    "AttentionWeights",
    "Checkpoint",
    "Family",
    "Layout",
    "WanFamily",
    "comes_from_tiny",
    "converted_config",
    "open_checkpoint",
]

_FAMILIES: tuple[Family, ...] = (WanFamily(),)

# (what it is, class name in its config, a tensor name that gives it away, why it is refused).
_REFUSED = (
    ("a LoRA", r"$^", r"lora_(A|B|down|up)\b|lora\.(down|up)\.", "merge it into its model first"),
    ("HunyuanVideo", r"H(unyuan|Y)_?Video", r"double_blocks\.\d+\.img_attn_qkv\.|context_embedder\.token_refiner\.",
     "text and video share one attention stream"),
    ("LTX-Video", r"LTX", r"patchify_proj\.|time_embed\.emb\.timestep_embedder\.",
     "its rotary embedding spans all heads, so heads cannot share a rotary key"),
    ("CogVideoX", r"CogVideo", r"patch_embed\.text_proj\.|mixins\.patch_embed\.",
     "text and video share one attention stream, with a LayerNorm per head"),
    ("Mochi", r"Mochi", r"pos_frequencies$", "its rotary frequencies are learned per head"),
    ("a text encoder", r"T5|CLIP|TextModel", r"(encoder\.)?block\.0\.layer\.0\.SelfAttention\.|blocks\.0\.attn\.q\.|"
     r"token_embedding\.|text_model\.|vision_model\.|visual\.", "give the transformer's weights instead"),
    ("a VAE", r"Autoencoder|VAE", r"(decoder|encoder)\.(conv_in|conv1|middle|mid_block)\.", "give the transformer's "
     "weights instead"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A recognised checkpoint. Tensors are read by canonical name; use it as a context manager.

    `raw_config` is the source's config.json, or one in native fields made from the shapes. `names` maps canonical
    names to those in the files. `state_key` is the chosen top-level key of a pickle, None for a bare state dict.
    `timing` is what the files say of time, as it is in `config`, and what they leave to be assumed.
    """

    store: TensorStore
    family: Family
    config: WanConfig
    raw_config: dict[str, Any]
    layout: Layout
    state_key: str | None
    names: Mapping[str, str]
    timing: Timing = field(default_factory=Timing)

    @property
    def is_tiny(self) -> bool:
        """Whether it is the built-in model."""
        return TINY.resolve() in self.store.path.resolve().parents

    def read(self, canonical: str) -> torch.Tensor:
        """One tensor, lazily. Raises CheckpointError for a name that this model has not."""
        return self.store.read(self.names.get(canonical, canonical))

    def is_stored(self, canonical: str) -> bool:
        """Whether `read` gives just what the files hold under the tensor's name."""
        return canonical in self.names

    def info(self, canonical: str) -> TensorInfo:
        """Shape, dtype and size of one tensor; `name` is the one in the file. Raises KeyError for an unknown name."""
        return self.store.tensors[self.names[canonical]]

    def attention(self, layer: int) -> AttentionWeights:
        """Self-attention of a dense layer, checked to be finite, in the file's dtypes.

        Raises UnsupportedModelError when the layer is converted already, CheckpointError for a NaN.
        """
        prefix = f"blocks.{layer}.self_attn."
        if prefix + "q.weight" not in self.names:
            raise UnsupportedModelError(
                f"{self.store.path}: layer {layer} has no dense self-attention (it is converted already, or not there)"
            )

        def read(name: str) -> torch.Tensor:
            tensor = self.read(prefix + name)
            check_finite(tensor, self.names[prefix + name], self.store.path)
            return tensor

        return AttentionWeights(
            q_weight=read("q.weight"),
            q_bias=read("q.bias"),
            k_weight=read("k.weight"),
            k_bias=read("k.bias"),
            v_weight=read("v.weight"),
            v_bias=read("v.bias"),
            o_weight=read("o.weight"),
            o_bias=read("o.bias"),
            norm_q=read("norm_q.weight"),
            norm_k=read("norm_k.weight"),
        )

    def output_name(self, canonical: str, layout: Layout | None = None) -> str:
        """The unwrapped name in `layout` (None: the source's), for tensors that it has and for converted ones alike."""
        return self.family.source(canonical, layout or self.layout)

    def output_config(self, layout: Layout | None = None) -> dict[str, Any]:
        """config.json in `layout`: the source's own as it is (None or its own layout), or in the other's fields."""
        if layout is None or layout == self.layout:
            return self.raw_config
        return self.family.raw_config(self.config, layout) | skyreels_fields(self.raw_config, layout)

    def describe(self) -> str:
        """One line: family, layout, geometry, dtypes, parameters, and what it was wrapped in."""
        infos = [self.info(name) for name in self.names]
        dtypes = "+".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
        parameters = sum(info.nbytes // info.dtype.itemsize for info in infos)
        c = self.config
        parts = [
            f"{self.family.name} {c.model_type}, {self.layout} layout",
            f"{c.num_layers} layers x {c.dim} wide x {c.num_heads} heads",
            f"{dtypes}, {parameters:,} parameters",
        ]
        if self.state_key:
            parts.append(f"state key {self.state_key}")
        if c.streaming is not None:
            parts.append("streaming")
        if c.mla is not None:
            parts.append(f"{sum(layer is not None for layer in c.mla.layers)} MLA layers")
        return ", ".join(parts)

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
) -> Checkpoint:
    """Open `source` (see `checkpoint.open_store`) and recognise its model, from names and shapes alone.

    `config` is a config.json to use instead of the one beside the weights, or a streaming codebase's YAML file, which
    says how the model sees time beside that one; `state_key` chooses among the state dicts of a pickle. Raises
    CheckpointError for files that cannot be trusted, UnsupportedModelError for models that are not converted,
    ConfigError for an impossible config.json; each names the file.
    """
    raw, settings = None, None
    if config is not None and config.suffix in (".yaml", ".yml"):
        settings = read_yaml(config)
        if not isinstance(settings, dict):
            raise ConfigError(f"{config}: it must hold a mapping of fields, such as num_frame_per_block")
    elif config is not None:
        raw = read_json(config)
    store = open_store(source, revision=revision, subfolder=subfolder)
    try:
        with _naming(store.path):
            return _recognise(store, store.config if raw is None else raw, state_key, settings)
    except BaseException:
        store.close()
        raise


def comes_from_tiny(conversion: Mapping[str, Any] | None) -> bool:
    """Whether the model with this conversion.json was made from the built-in one, and so knows its drawn clips."""
    recorded = (conversion or {}).get("source") or {}
    return recorded.get("sha256") == _tiny_sha256()


@functools.cache
def _tiny_sha256() -> str:
    with open_checkpoint(TINY) as tiny:
        return tiny.store.sha256()


def _recognise(
    store: TensorStore, raw: dict[str, Any] | None, state_key: str | None, settings: dict[str, Any] | None
) -> Checkpoint:
    key, cleaned = unwrap(store.tensors, state_key)
    _refuse_known(raw or {}, cleaned)
    family = next((family for family in _FAMILIES if family.detect(raw, cleaned)), None)
    if family is None:
        raise UnsupportedModelError(
            f"its family is not known; found {_some(cleaned)}; expected a Wan transformer (patch_embedding.weight, ...)"
        )
    family.refuse_relatives(raw or {}, cleaned)
    layout = family.layout(cleaned)
    names: dict[str, str] = {}
    unexpected = []
    for clean, raw_name in cleaned.items():
        canonical = family.canonical(clean, layout)
        if canonical is None:
            unexpected.append(clean)
        else:
            names[canonical] = raw_name
    tensors = {canonical: store.tensors[raw_name] for canonical, raw_name in names.items()}
    parsed = family.parse_config(raw, tensors)
    timing = _timing(store, raw, key, settings)
    parsed = replace(parsed, streaming=timing.streaming, few_step=timing.few_step)
    family.check_attention(parsed, tensors)
    _check_tensors(family.expected_shapes(parsed), tensors, unexpected)
    return Checkpoint(
        store=store,
        family=family,
        config=parsed,
        raw_config=raw if raw is not None else family.raw_config(parsed),
        layout=layout,
        state_key=key,
        names=MappingProxyType(names),
        timing=timing,
    )


def _timing(store: TensorStore, raw: dict[str, Any] | None, key: str | None, settings: dict[str, Any] | None) -> Timing:
    """What the files say of time: config.json, the key of the weights, a pipeline's class, a codebase's YAML."""
    student = (key or "").split("/")[0] in STREAMING_KEYS
    if settings is not None:
        own = {name: value for name, value in (raw or {}).items() if name in ("_class_name", "few_step")}
        return read_timing(own | settings, student=student, script=True, where="the YAML file of --config")
    index = find_beside(store, "model_index.json", above=EXPERT_FOLDERS[1]) if is_causal_class(raw) else None
    pipeline = ""
    with suppress(InputError):  # it is a hint only
        pipeline = str(read_json(index).get("_class_name", "")) if index is not None else ""
    return read_timing(raw, student=student, pipeline=pipeline)


def _refuse_known(raw: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise UnsupportedModelError for a model that is known and not converted, by class name or telltale tensor."""
    architectures = raw.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    classes = [str(name) for name in (raw.get("_class_name"), *listed) if name]
    for what, class_name, telltale, why in _REFUSED:
        found = next((name for name in classes if re.search(class_name, name)), None)
        found = found or next((name for name in names if re.search(rf"(^|\.)({telltale})", name)), None)
        if found:
            raise UnsupportedModelError(f"this is {what} (found {found!r}), expected a Wan transformer; {why}")


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], unexpected: Collection[str]
) -> None:
    """Every tensor that the geometry asks for, with its shape and a floating dtype, and no other."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UnsupportedModelError(f"{len(missing)} tensors of a Wan model are missing: {_some(missing)}")
    extra = [*unexpected, *(info.name for name, info in tensors.items() if name not in expected)]
    if extra:
        raise UnsupportedModelError(f"{len(extra)} tensors are not part of a Wan model: {_some(extra)}")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise UnsupportedModelError(f"tensor {info.name!r} has shape {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"tensor {info.name!r} is {info.dtype}, expected float32, bfloat16, float16 or float64; "
                "use the unquantised weights"
            )


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is wrong with its contents."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
