"""Recipes: those that ship fit their models, and wrong ones are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke
from recipes_cases import TINY, WAN_1B, shapes_only

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.plan import plan_conversion
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import load_recipe, resolve_recipe, with_init
from mlaconvert.errors import ConfigError
from mlaconvert.families.wan import WanFamily
from mlaconvert.files import shipped
from mlaconvert.files.shipped import recipe_names

WAN_14B = WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
WAN_5B = WanConfig(dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_dim=48, out_dim=48, model_type="ti2v")
# Recipe -> its model, and what that model's layers cache for a token: 7/48 of the width, and the exact key norm.
SHIPPED = {
    "videomla": (WAN_1B, 192 + 32),
    "wan21-t2v-1.3b": (WAN_1B, 192 + 32 + 1),
    "self-forcing-1.3b": (WAN_1B, 192 + 32 + 1),
    "wan21-t2v-14b": (WAN_14B, 714 + 32 + 1),
    "krea-realtime-14b": (WAN_14B, 714 + 32 + 1),
    "wan22-ti2v-5b": (WAN_5B, 416 + 32 + 1),
    "longlive-2-5b": (WAN_5B, 416 + 32 + 1),
    "tiny": (TINY, 19 + 8 + 1),
}


def test_every_shipped_recipe_is_listed_here() -> None:
    assert recipe_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_fit_their_models(name: str) -> None:
    config, scalars = SHIPPED[name]
    recipe = load_recipe(name)
    plan = plan_conversion(shapes_only(config), recipe)
    assert plan.config.cached_scalars() == (scalars,) * config.num_layers
    less = 1 - plan.mla_scalars / plan.dense_scalars
    assert less > 0.926
    # Written out in the file, the widths are still those that the model would get by default.
    default = resolve_recipe(ConvertRecipe(), config)
    same = ("kv_rank", "rope_dim", "nope_dim", "v_dim", "vae_stride")
    expected = {n: getattr(default, n) for n in same}
    if name == "videomla":
        default = resolve_recipe(ConvertRecipe(init="svd"), config)
        expected = {n: getattr(default, n) for n in same}
    if name == "tiny":  # one channel less makes room for the key norm: 92.7%, as at real widths
        expected["kv_rank"] -= 1
    assert {n: getattr(plan.recipe, n) for n in same} == expected
    # Every tensor outside self-attention passes through; every planned shape is the family's.
    shapes = WanFamily().expected_shapes(plan.config)
    assert {o.canonical: o.spec.shape for o in plan.operations} == shapes
    passed = {o.canonical for o in plan.operations if o.layer is None}
    assert passed == {n for n in WanFamily().expected_shapes(config) if ".self_attn." not in n}


def test_the_papers_setting() -> None:
    """Section 'Architecture' and 'Streaming' of VideoMLA."""
    plan = plan_conversion(shapes_only(WAN_1B), load_recipe("videomla"))
    mla = plan.config.mla
    assert mla is not None
    assert (mla.q_lora_rank, mla.key_norm, mla.softmax_scale) == (768, "latent", 128**-0.5)
    (layer,) = set(mla.layers)
    assert layer is not None
    assert (layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim) == (192, 96, 32, 128)
    assert layer.component_pairs == (*range(6), *range(22, 27), *range(43, 48))
    assert plan.config.streaming == StreamingConfig(chunk_frames=3, window_frames=7, sink_frames=1, positions="window")
    assert (plan.dense_scalars, plan.mla_scalars) == (30 * 3072, 30 * 224)
    sizes = {o.canonical.removeprefix("blocks.7.self_attn."): o.spec.shape for o in plan.operations if o.layer == 7}
    assert sizes["q_b_proj.weight"] == (12 * 128, 768)
    assert sizes["kv_a_proj_with_mqa.weight"] == (224, 1536)
    assert sizes["kv_b_proj.weight"] == (12 * (96 + 128), 192)


def test_defaults_are_the_papers_at_other_widths_too() -> None:
    widths = {
        config.dim: (r.kv_rank, r.q_rank, r.nope_dim, r.rope_dim, r.v_dim, r.key_norm)
        for config in (WAN_1B, WAN_14B, TINY)
        for r in [resolve_recipe(ConvertRecipe(init="svd"), config)]
    }
    assert widths == {
        1536: (192, 768, 96, 32, 128, "latent"),
        5120: (714, 2560, 96, 32, 128, "latent"),
        192: (20, 96, 24, 8, 32, "latent"),
    }


def test_a_recipe_says_only_what_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("init: svd\nrope_dim: 64\nlayers: 0-3,7\nstreaming: {window_frames: 9}\nq_rank: none\n")
    recipe = load_recipe(path)
    assert recipe == ConvertRecipe(
        init="svd", rope_dim=64, layers="0-3,7", streaming=StreamingConfig(window_frames=9), q_rank="none"
    )
    resolved = resolve_recipe(recipe, WAN_1B)
    assert (resolved.nope_dim, resolved.kv_rank, resolved.q_rank) == (64, 192, "none")
    assert resolve_recipe(resolved, WAN_1B) == resolved


def test_the_default_is_calibrated() -> None:
    """The paper's cache, and one scalar for the exact key norm; heads keep their width and their own rotation."""
    for config, rank in ((WAN_1B, 224), (WAN_14B, 746), (TINY, 28)):
        mla = resolved_mla(ConvertRecipe(), config)
        assert (mla.q_lora_rank, mla.key_norm, mla.rope) == (None, "token", "head")
        assert {mla.cached_scalars(i, 0) for i in range(config.num_layers)} == {rank + 1}
    narrow = resolved_mla(ConvertRecipe(nope_dim=32, v_dim=64), WAN_1B)
    assert narrow.rope == "latent"
    assert narrow.layers[0] is not None
    assert (narrow.layers[0].kv_lora_rank, narrow.layers[0].v_head_dim) == (224, 64)
    with pytest.raises(ConfigError, match="rope head keeps whole heads"):
        resolve_recipe(ConvertRecipe(rope="head", nope_dim=32), WAN_1B)
    with pytest.raises(ConfigError, match="rope_selection energy needs measured inputs"):
        resolve_recipe(ConvertRecipe(init="svd", rope_selection="energy"), WAN_1B)


def resolved_mla(recipe: ConvertRecipe, config: WanConfig) -> MLAConfig:
    mla = plan_conversion(shapes_only(config), recipe).config.mla
    assert mla is not None
    return mla


def test_another_init_leaves_what_belonged_to_the_recipes_own() -> None:
    for name in recipe_names():
        for init in ("svd", "random", "calibrated", "lossless"):
            recipe = with_init(load_recipe(name), init)
            assert plan_conversion(shapes_only(SHIPPED[name][0]), recipe).recipe.init == init
    assert with_init(load_recipe("tiny"), "calibrated") == load_recipe("tiny")
    result = invoke("convert", "tiny", "--recipe", "tiny", "--init", "svd", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    recipe_json = json.loads(result.stdout)["models"][0]["recipe"]
    assert (recipe_json["kv_rank"], recipe_json["key_norm"], recipe_json["rope"]) == (27, "latent", "cached")


def test_a_recipe_of_the_lossless_setting() -> None:
    plan = plan_conversion(shapes_only(TINY), ConvertRecipe(init="lossless", layers="2"))
    mla = plan.config.mla
    assert mla is not None
    layer = mla.layers[2]
    assert layer is not None
    assert (mla.q_lora_rank, mla.key_norm) == (None, "token")
    assert (layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim) == (192, 0, 192, 32)
    assert plan.config.streaming == StreamingConfig()
    assert {"kv_rank", "rope_dim"} <= {name for name, value in asdict(plan.recipe).items() if value is None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_rnak: 3", "unknown field 'kv_rnak'; known fields: init, kv_rank"),
        ("streaming: {windows: 3}", "unknown field 'streaming.windows'"),
        ("kv_rank: '3'", 'kv_rank is "3": give a whole number'),
        ("kv_rank: 3.5", "kv_rank is 3.5: give a whole number"),
        ("bidirectional: maybe", 'bidirectional is "maybe": give true or false'),
        ("streaming: 3", "streaming is 3: give a mapping of fields"),
        ("kv_rank: 0", "kv_rank is 0"),
        ("q_rank: all", "q_rank is 'all'"),
        ("q_rank: -1", "q_rank is -1"),
        ("nope_dim: -1", "nope_dim is -1"),
        ("rope_dim: 31", "rope_dim is 31: give a multiple of 2"),
        ("init: magic", "init is 'magic': give svd, calibrated, random or lossless"),
        ("key_norm: both", "key_norm is 'both': give latent or token"),
        ("dtype: int8", "dtype is 'int8': give float32, bfloat16 or float16"),
        ("seed: -1", "seed is -1"),
        ("layers: 3-1", "the range 3-1 runs backwards"),
        ("layers: first", "layers is 'first'"),
        ("streaming: {window_frames: 2}", "window_frames is 2"),
        ("height: 0", "height is 0"),
        ("{init: lossless, kv_rank: 4}", "it fixes kv_rank"),
        ("- init", "a recipe is a mapping"),
        ("init: [svd", "not a readable YAML file"),
        ("init: !!python/name:os.system", "not a readable YAML file"),
        ("\x00", "not a readable YAML file"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_recipe(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    for name in ("nothing", "../recipes/tiny", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"no such recipe file; shipped recipes: .*tiny, videomla"):
            load_recipe(name)


def test_recipes_of_an_installed_wheel_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = tmp_path / "mlaconvert"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "house.yaml").write_text("kv_rank: 5")
    monkeypatch.setattr(shipped, "__file__", str(package / "files" / "shipped.py"))
    assert recipe_names() == ["house"]
    assert load_recipe("house") == ConvertRecipe(kv_rank=5)


def test_switched_off_parts_are_no_setting_of_a_recipe(tmp_path: Path) -> None:
    """A record's empty list is read as ever; one that names parts is refused, not passed over."""
    path = tmp_path / "recipe.yaml"
    path.write_text("init: calibrated\nkv_rank: 9\nwithout: []\n")
    assert load_recipe(path) == ConvertRecipe(init="calibrated", kv_rank=9)
    path.write_text("init: calibrated\nwithout: [rho]\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: without is \['rho'\], which is no setting of a recipe"):
        load_recipe(path)
