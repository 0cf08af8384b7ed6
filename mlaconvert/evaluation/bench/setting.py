"""What a benchmark of speed is asked to compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from mlaconvert.config.cache_dtype import CacheDtype
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import KeyNorm, Present, RopeMode
from mlaconvert.config.parsing import Count, check_fields
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe
from mlaconvert.families.open import open_checkpoint
from mlaconvert.model.attention.kernel import AttentionMode
from mlaconvert.model.wan import WanModel

GEOMETRIES = {
    "1.3b": WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
    "14b": WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
}


@dataclass(frozen=True, kw_only=True)
class BenchSetting:
    """What both sides share. Raises ConfigError naming the field."""

    geometry: str = "1.3b"
    """A name in `GEOMETRIES`, or a checkpoint."""
    height: Count | None = None
    """Video pixels; None is what such a model is usually run at."""
    width: Count | None = None
    """Video pixels; None is what such a model is usually run at."""
    batch: Count = 1
    """Videos that are generated together."""
    streaming: StreamingConfig | None = None
    """How both sides see time; None is the checkpoint's own, or the default."""
    steps: Count = 4
    """Passes before the clean one."""
    rounds: Count = 5
    """Chunks of each side that are timed, with a full window, after as many as fill it."""
    device: str = "cpu"
    """Torch's name."""
    dtype: torch.dtype | None = None
    """None is float32 on a CPU and bfloat16 elsewhere."""
    attention: AttentionMode = "auto"
    """How latent attention computes: absorbed, expanded, or whatever is cheaper."""
    compile: bool = False
    """Compile every block of both sides."""
    slice_size: Count | None = None
    """Videos of the batch that go through a model at a time; None is all of them."""
    keeps_text: bool = True
    """Whether the cache keeps the prompt's keys and values, too."""
    kv_ranks: tuple[int, ...] = ()
    """Latent sides to compare, by the rank of keys and values; none is the default of `ConvertRecipe`."""
    heads: tuple[tuple[int | None, int | None], ...] = ()
    """Latent sides to compare, by a head's unrotated and value channels; None is the default of `ConvertRecipe`."""
    rope_dim: int | None = None
    """As in `ConvertRecipe`, as are the next four."""
    rope: RopeMode | None = None
    """Where rotary keys come from."""
    q_rank: int | str | None = None
    """The query latent, or "none"."""
    key_norm: KeyNorm | None = None
    """What of a key is normalised."""
    present: Present | None = None
    """What a chunk sees of itself."""
    cache_dtypes: tuple[CacheDtype, ...] = ()
    """Each side once more with its cache narrowed to each of these, but for one whose cache has bits of its own."""
    search_batch: bool = True
    """Whether the largest batch that fits into memory is searched for."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side's figures: times in seconds, memory in bytes, FLOPs (two a multiplication and addition).

    `speedup` is the median over rounds of dense time / own time. `flops` are those of a chunk with a full window, by
    part, and `profile` seconds of the same chunk by part. `plan_cache_bytes` and `plan_weight_bytes` are what
    `analyze` would have said. Batches are None where they are not measured.
    """

    name: str
    mode: str
    frames_per_second: float
    first_chunk: float
    next_chunk: float
    next_chunk_spread: tuple[float, float]
    speedup: float
    cache_bytes: int
    text_bytes: int
    weight_bytes: int
    plan_cache_bytes: int
    plan_weight_bytes: int
    peak_bytes: int
    largest_batch: int | None
    largest_batch_sliced: int | None
    flops: dict[str, int]
    profile: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All sides, dense first, and the ceilings: measured rates of matrix products and attention, FLOPs a second."""

    device: str
    dtype: str
    torch_version: str
    setting: dict[str, Any]
    matmul_rate: float
    attention_rate: float
    sides: tuple[Side, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def base_geometry(name: str) -> WanConfig:
    """The geometry of that name in `GEOMETRIES`, or of a checkpoint. Raises what `open_checkpoint` raises."""
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    with open_checkpoint(name) as checkpoint:
        return checkpoint.config


def side_configs(setting: BenchSetting) -> dict[str, WanConfig]:
    """The geometries that are compared: dense, then one for each latent rank and pair of head widths.

    A checkpoint that is converted already is its own only latent side. With `cache_dtypes`, every side is followed by
    itself with a narrowed cache. Raises what `open_checkpoint` raises, and ConfigError for widths that do not fit.
    """
    sides = {}
    for name, config in _plain_sides(setting).items():
        sides[name] = config
        if config.mla is None or not config.mla.counts_bits:
            for dtype in setting.cache_dtypes:
                sides[f"{name}, {dtype} cache"] = dataclasses.replace(config, cache_dtype=dtype)
    return sides


def _plain_sides(setting: BenchSetting) -> dict[str, WanConfig]:
    config = base_geometry(setting.geometry)
    streaming = setting.streaming or config.streaming or StreamingConfig()
    dense = dataclasses.replace(config, streaming=streaming, mla=None)
    sides = {"dense": dense}
    if config.mla is not None and not setting.kv_ranks and not setting.heads:
        return sides | {"MLA": dataclasses.replace(config, streaming=streaming)}
    for rank, heads in product(setting.kv_ranks or (None,), setting.heads or ((None, None),)):
        recipe = ConvertRecipe(
            init="svd",
            kv_rank=rank,
            nope_dim=heads[0],
            v_dim=heads[1],
            rope_dim=setting.rope_dim,
            rope=setting.rope,
            q_rank=setting.q_rank,
            key_norm=setting.key_norm,
            present=setting.present,
            height=setting.height,
            width=setting.width,
            streaming=streaming,
        )
        mla = mla_config(resolve_recipe(recipe, dense), dense)
        layer = mla.layers[0]
        assert layer is not None
        name = (
            f"MLA {layer.kv_lora_rank}+{layer.qk_rope_head_dim}, "
            f"heads {layer.qk_nope_head_dim}+{layer.qk_rope_head_dim}/{layer.v_head_dim}"
        )
        name += ", exact present" if mla.present == "exact" else ""
        sides[name] = dataclasses.replace(dense, mla=mla)
    return sides


def random_model(config: WanConfig, device: torch.device, dtype: torch.dtype) -> WanModel:
    """A frozen model with random weights, made on the device."""
    with torch.device("meta"):
        model = WanModel(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".kv_quantizer." in name or ("norm" in name and name.endswith("weight") and parameter.ndim == 1):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return model
