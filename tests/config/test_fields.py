"""Every field of a config says below it what it is, and its range is its annotation's, for files and for Python."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from typing import Any

import pytest

from mlaconvert.clips.encode import Encoding
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.bench.setting import BenchSetting
from mlaconvert.evaluation.cells import SweepRecipe
from mlaconvert.evaluation.request import Request
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.healing.recipe import HealRecipe

CONFIGS: tuple[type, ...] = (
    WanConfig,
    StreamingConfig,
    MLAConfig,
    MLALayer,
    ConvertRecipe,
    HealRecipe,
    SweepRecipe,
    Generation,
    Runtime,
    Encoding,
    BenchSetting,
    Request,
)
GEOMETRY: dict[str, Any] = {"dim": 36, "num_heads": 3, "num_layers": 2, "ffn_dim": 20}
LAYER: dict[str, Any] = {"kv_lora_rank": 5, "qk_nope_head_dim": 6, "v_head_dim": 7, "rope_components": ()}
SECTION: dict[str, Any] = {"q_lora_rank": None, "key_norm": "token", "softmax_scale": 0.3, "layers": ()}
NAN, INF = math.nan, math.inf

# What is given beside the field, and values of it that are refused with what the message must say.
RANGES: list[tuple[type, dict[str, Any], str, Any, str]] = [
    *((WanConfig, GEOMETRY, name, 0, "give 1 or more") for name in ("dim", "num_heads", "num_layers", "ffn_dim")),
    *((WanConfig, GEOMETRY, name, 2**31, f"give at most {2**31 - 1}") for name in ("in_dim", "out_dim", "text_dim")),
    (WanConfig, GEOMETRY, "text_len", 2**14 + 1, "give at most 16384"),
    (WanConfig, GEOMETRY, "freq_dim", 7, "give a multiple of 2"),
    (WanConfig, GEOMETRY, "image_dim", 0, "give 1 or more"),
    (WanConfig, GEOMETRY, "eps", 1.0, "give less than 1"),
    (WanConfig, GEOMETRY, "eps", 0.0, "give more than 0"),
    (StreamingConfig, {}, "chunk_frames", 0, "give 1 or more"),
    (StreamingConfig, {}, "window_frames", 10_001, "give at most 10000"),
    (StreamingConfig, {}, "sink_frames", -1, "give 0 or more"),
    (StreamingConfig, {}, "positions", "first", "give window or absolute"),
    (MLALayer, LAYER, "kv_lora_rank", 0, "give 1 or more"),
    (MLALayer, LAYER, "qk_nope_head_dim", -1, "give 0 or more"),
    (MLALayer, LAYER, "v_head_dim", 2**31, f"give at most {2**31 - 1}"),
    (MLAConfig, SECTION, "q_lora_rank", 0, "give 1 or more"),
    (MLAConfig, SECTION, "key_norm", "rms", "give latent or token"),
    (MLAConfig, SECTION, "rope", "none", "give cached, latent or head"),
    (MLAConfig, SECTION, "softmax_scale", 0.0, "give more than 0"),
    (MLAConfig, SECTION, "softmax_scale", INF, "finite number"),
    (ConvertRecipe, {}, "kv_rank", 0, "give 1 or more"),
    (ConvertRecipe, {}, "q_rank", 0, "give 1 or more"),
    (ConvertRecipe, {}, "q_rank", "all", "give a rank, or none"),
    (ConvertRecipe, {}, "nope_dim", -1, "give 0 or more"),
    (ConvertRecipe, {}, "rope_dim", 31, "give a multiple of 2"),
    (ConvertRecipe, {}, "clips", 10_001, "give at most 10000"),
    (ConvertRecipe, {}, "frames", 10_001, "give at most 10000"),
    (ConvertRecipe, {}, "height", 2**14 + 1, "give at most 16384"),
    (ConvertRecipe, {}, "seed", 2**32, f"give less than {2**32}"),
    (ConvertRecipe, {}, "init", "magic", "give svd, calibrated, random or lossless"),
    *((HealRecipe, {"stage": "dmd"}, name, 0, "give 1 or more") for name in ("steps", "batch", "frames", "save_every")),
    *((HealRecipe, {"stage": "dmd"}, name, 10**6 + 1, "give at most 1000000") for name in ("clips", "accumulate")),
    *((HealRecipe, {"stage": "dmd"}, name, 0.0, "give more than 0") for name in ("lr", "critic_lr", "clip")),
    *((HealRecipe, {"stage": "dmd"}, name, NAN, "finite number") for name in ("lr", "guidance", "weight_decay")),
    *((HealRecipe, {"stage": "dmd"}, name, INF, "finite number") for name in ("clip", "max_loss_ratio")),
    (HealRecipe, {"stage": "dmd"}, "max_loss_ratio", 1.0, "give more than 1"),
    (HealRecipe, {"stage": "dmd"}, "ema", 1.0, "give less than 1"),
    (HealRecipe, {"stage": "dmd"}, "warmup", -1, "give 0 or more"),
    (HealRecipe, {"stage": "dmd"}, "attention_steps", -1, "give 0 or more"),
    (HealRecipe, {"stage": "dmd"}, "solver_steps", 10, "give a multiple of 4"),
    (SweepRecipe, {}, "inits", ("magic",), "give svd, calibrated, random or lossless"),
    (Generation, {}, "frames", 10**6 + 1, "give at most 1000000"),
    (Generation, {}, "seconds", 0.0, "give more than 0"),
    (Generation, {}, "seconds", NAN, "finite number"),
    (Generation, {}, "shift", 1001.0, "give at most 1000"),
    (Generation, {}, "guidance", INF, "finite number"),
    (Generation, {}, "samples", 10_001, "give at most 10000"),
    (Generation, {}, "steps", 1001, "give at most 1000"),
    (Generation, {}, "width", 2**14 + 1, "give at most 16384"),
    (Generation, {}, "seed", 2**32, "give 0 to"),
    (Generation, {}, "positions", "first", "give window or absolute"),
    (Runtime, {}, "attention", "magic", "give auto, expanded or absorbed"),
    (Runtime, {}, "slice_size", 0, "give 1 or more"),
    (Encoding, {}, "frames", 0, "give 1 or more"),
    (Encoding, {}, "fps", 0.0, "give more than 0"),
    (Encoding, {}, "fps", NAN, "finite number"),
]


def class_body(cls: type) -> ast.ClassDef:
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    return node


def undocumented(body: ast.ClassDef) -> list[str]:
    """Fields without a text right below them."""
    found = []
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            text = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.strip()):
                found.append(ast.unparse(node.target))
    return found


def hand_checked(body: ast.ClassDef) -> list[str]:
    """Fields that are compared with a number where the class is made, which its annotation could do."""
    names = {ast.unparse(node.target) for node in body.body if isinstance(node, ast.AnnAssign)}
    checks = [node for node in body.body if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
    found = []
    for comparison in (node for check in checks for node in ast.walk(check) if isinstance(node, ast.Compare)):
        sides = [comparison.left, *comparison.comparators]
        numbers = [side for side in sides if isinstance(side, ast.Constant) and type(side.value) in (int, float)]
        fields = [side.attr for side in sides if isinstance(side, ast.Attribute) and side.attr in names]
        found += fields if numbers else []
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_says_what_it_is(config: type) -> None:
    assert dataclasses.is_dataclass(config)
    assert undocumented(class_body(config)) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_ranges_are_annotated(config: type) -> None:
    assert hand_checked(class_body(config)) == []


def test_what_is_missing_shows() -> None:
    code = 'class A:\n a: int\n b: int\n "Said."\n c: int = 3\n def __post_init__(self):\n  assert 0 < self.c'
    (node,) = ast.parse(code).body
    assert isinstance(node, ast.ClassDef)
    assert (undocumented(node), hand_checked(node)) == (["a", "c"], ["c"])


@pytest.mark.parametrize(("config", "beside", "field", "value", "says"), RANGES)
def test_values_out_of_range_are_refused_by_name(
    config: type, beside: dict[str, Any], field: str, value: Any, says: str
) -> None:
    """In Python, and in a file where there is one."""
    config(**beside, **({"inits": ("svd",)} if config is SweepRecipe else {}))
    with pytest.raises(ConfigError, match=rf"^{field}(\.0)?(:| is) .*{says}") as direct:
        config(**{**beside, field: value})
    if config in (WanConfig, StreamingConfig, MLALayer, MLAConfig, ConvertRecipe, HealRecipe):
        with pytest.raises(ConfigError) as read:
            parse(config, {**beside, field: value}, "model/config.json")
        assert str(read.value) == f"model/config.json: {direct.value}"


def test_a_field_inside_a_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^switch\.1 is -2\.0: give more than 0$"):
        Generation(switch=(1.0, -2.0))
    with pytest.raises(ConfigError, match=r"^betas\.1 is 1\.0: give less than 1$"):
        HealRecipe(stage="dmd", betas=(0.5, 1.0))
    with pytest.raises(ConfigError, match=r"^rope_components\.1\.1 is 0: give 1 or more$"):
        MLALayer(**{**LAYER, "rope_components": ((0, 1), (2, 0))})
    with pytest.raises(ConfigError, match=r"^patch_size\.0 is 0: give 1 or more$"):
        WanConfig(**GEOMETRY, patch_size=(0, 2, 2))


def test_a_union_is_not_named() -> None:
    with pytest.raises(ConfigError, match=r"^recipe: q_rank is 0: give 1 or more$"):
        parse(ConvertRecipe, {"q_rank": 0}, "recipe")
