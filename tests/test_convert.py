"""Conversion of whole checkpoints: small ones of odd sizes in every layout, and the golden model without loss."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.clips.tiny.clips import training_clips
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion import from_clips as calibrated
from mlaconvert.conversion import from_weights
from mlaconvert.conversion.calibration.store import MOMENTS_VERSION
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.conversion.from_weights import layer_modulation, time_modulation
from mlaconvert.conversion.plan import plan_conversion
from mlaconvert.conversion.recipe import ConvertRecipe, parse_layers
from mlaconvert.conversion.recipes import _format_layers, load_recipe
from mlaconvert.conversion.report import ConversionReport
from mlaconvert.conversion.run import convert
from mlaconvert.conversion.source import open_models
from mlaconvert.conversion.verify import verify_conversion
from mlaconvert.errors import CheckpointError, ConfigError, InputError, MLAConvertError, OutputError
from mlaconvert.evaluation.losses import evaluate
from mlaconvert.families.causal import STUDENT
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.files import writer
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.shipped import TINY
from mlaconvert.files.writer import ModelWriter, TensorSpec
from mlaconvert.model.cache import LatentCache
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import rollout
from mlaconvert.model.schedule import Sampler

State = dict[str, Tensor]
SaveFolder = Callable[..., Path]

# Heads of 20 are 10 rotary pairs, split (4, 3, 3). The default budget is 7 * 60 // 48 = 8 scalars: latent 4, rotary 4.
CONFIG = WanConfig(dim=60, num_heads=3, num_layers=3, ffn_dim=44, freq_dim=14, text_dim=18, in_dim=5, out_dim=5)
NATIVE = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": 60,
    "num_heads": 3,
    "num_layers": 3,
    "ffn_dim": 44,
    "freq_dim": 14,
    "text_dim": 18,
    "in_dim": 5,
    "out_dim": 5,
}
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "num_layers": 3,
    "ffn_dim": 44,
    "freq_dim": 14,
    "text_dim": 18,
    "in_channels": 5,
    "out_channels": 5,
    "patch_size": [1, 2, 2],
}
LOSSLESS = ConvertRecipe(init="lossless")
SVD = ConvertRecipe(init="svd")
EXACT = ConvertRecipe(init="svd", q_rank="none", key_norm="token")


@pytest.fixture(scope="module")
def state() -> State:
    """A random model in native names, with gains near one and biases that matter."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in WanFamily().expected_shapes(CONFIG).items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


@pytest.fixture
def source(state: State, save_folder: SaveFolder) -> Path:
    return save_folder(state, NATIVE)


def to_diffusers(state: State) -> State:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted: State = convert_wan_transformer_to_diffusers(dict(state))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def native(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save(state, NATIVE)


def diffusers(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save(to_diffusers(state), DIFFUSERS, "model/transformer").parent


def bfloat16(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    return save({name: tensor.bfloat16() for name, tensor in state.items()}, NATIVE)


def sharded(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    with ModelWriter(tmp_path / "model", specs, metadata={}, max_shard_bytes=100_000) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.write_text(CONFIG_NAME, json.dumps(NATIVE))
        writer.commit()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def wrapped(tmp_path: Path, state: State, save: SaveFolder) -> Path:
    """As streaming checkpoints are published: an FSDP average beside the generator."""
    average = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in state.items()}
    other = {f"model.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"generator": other, "generator_ema": average}, tmp_path / "model.pt")
    (tmp_path / CONFIG_NAME).write_text(json.dumps(NATIVE))
    return tmp_path / "model.pt"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [native, diffusers, bfloat16, sharded, wrapped])
def test_every_layout_converts_and_loads(
    tmp_path: Path, state: State, save_folder: SaveFolder, layout: Callable[..., Path]
) -> None:
    given = layout(tmp_path, state, save_folder)
    convert(given, tmp_path / "out", EXACT)
    model = load_model(tmp_path / "out")  # strict
    assert model.config.mla is not None
    assert model.config.few_step == (layout is wrapped)
    assert model.config.cached_scalars() == (9, 9, 9)
    assert model.config.streaming == (STUDENT if layout is wrapped else None)
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    if layout is diffusers:
        expected = to_diffusers(state)
        attention, outward = ".attn1.", "blocks.1.attn1.to_out.0.weight"
    else:
        expected = {n: t.bfloat16() for n, t in state.items()} if layout is bfloat16 else state
        attention, outward = ".self_attn.", "blocks.1.self_attn.o.weight"
    passed = {name for name in expected if attention not in name}
    assert len(passed) == len(state) - 3 * 10
    for name in passed:
        assert written[name].dtype == expected[name].dtype
        assert torch.equal(written[name], expected[name]), name
    assert f"blocks.2{attention}kv_a_proj_with_mqa.weight" in written
    assert torch.equal(written[outward], expected[outward])  # values stay as wide as the head
    assert {tensor.dtype for tensor in written.values()} == {expected[outward].dtype}


def test_names_and_shapes_are_the_documented_ones(source: Path, tmp_path: Path) -> None:
    """Latent 7, rotary 4 (2 pairs), unrotated 11, values 13 wide."""
    widths = {"kv_rank": 7, "rope_dim": 4, "nope_dim": 11, "v_dim": 13}
    common = {
        "q_a_proj.weight": (9, 60),
        "q_a_proj.bias": (9,),
        "q_a_layernorm.weight": (9,),
        "q_b_proj.weight": (3 * 15, 9),
        "kv_a_proj_with_mqa.weight": (7 + 4, 60),
        "kv_a_proj_with_mqa.bias": (7 + 4,),
        "kv_b_proj.weight": (3 * (11 + 13), 7),
        "kv_b_proj.bias": (3 * 11,),
        "o.weight": (60, 3 * 13),
        "o.bias": (60,),
    }
    latent = common | {"kv_a_layernorm.weight": (7,)}
    token = common | {"k_norm_proj.weight": (60, 60), "k_norm_proj.bias": (60,)}
    token |= {
        "q_a_proj.weight": (60, 60),
        "q_a_proj.bias": (60,),
        "q_a_layernorm.weight": (60,),
        "q_b_proj.weight": (3, 15, 20),
    }
    for name, recipe, expected in (
        ("latent", ConvertRecipe(init="svd", **widths, q_rank=9), latent),
        ("token", ConvertRecipe(init="svd", **widths, q_rank="none", key_norm="token"), token),
    ):
        convert(source, tmp_path / name, recipe)
        with safe_open(tmp_path / name / WEIGHTS_NAME, framework="pt") as opened:
            prefix = "blocks.1.self_attn."
            found = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys() if n.startswith(prefix)}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert found == {prefix + n: shape for n, shape in expected.items()}


def test_config_keeps_the_source_and_adds_mla(source: Path, tmp_path: Path) -> None:
    streaming = StreamingConfig(window_frames=5)
    convert(source, tmp_path / "out", ConvertRecipe(init="svd", layers="0,2", streaming=streaming))
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    kept = {name: value for name, value in NATIVE.items() if name != "_class_name"}
    assert {name: config[name] for name in kept} == kept
    assert config["_class_name"] == "WanMLATransformer3DModel"
    assert config["quantization_config"].keys() == {"quant_method"}
    assert config["streaming"] == {"chunk_frames": 3, "window_frames": 5, "sink_frames": 1, "positions": "window"}
    mla = config["mla"]
    layer = {"kv_lora_rank": 4, "qk_nope_head_dim": 16, "v_head_dim": 20, "rope_components": [[0, 1], [1, 1]]}
    assert mla["layers"] == [layer, {"dense": True}, layer]
    assert (mla["q_lora_rank"], mla["key_norm"]) == (30, "latent")
    assert mla["softmax_scale"] == pytest.approx(20**-0.5)
    assert mla["calibration"]["regime"] == "streaming"
    assert mla["calibration"]["frames"] == 5
    assert mla["calibration"]["tokens"] == [30, 52]
    assert mla["calibration"]["timesteps"] == pytest.approx([1000, 937.5, 833.333333, 625, 0])


def test_dense_layers_and_mixed_dtypes_stay(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 weights, as diffusers' repositories have them."""
    mixed = {n: t if "norm" in n or "modulation" in n else t.bfloat16() for n, t in state.items()}
    convert(save_folder(mixed, NATIVE), tmp_path / "out", ConvertRecipe(init="svd", layers="1"))
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    for name, tensor in mixed.items():
        if not name.startswith("blocks.1.self_attn."):
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor)
    made = {name.removeprefix("blocks.1.self_attn."): tensor.dtype for name, tensor in written.items()}
    assert made["kv_a_layernorm.weight"] == made["q_a_layernorm.weight"] == torch.float32
    assert made["kv_b_proj.weight"] == made["kv_a_proj_with_mqa.bias"] == made["o.bias"] == torch.bfloat16
    assert load_model(tmp_path / "out", dtype=torch.float32).config.cached_scalars() == (120, 8, 120)


def test_dtype_option_casts_everything(source: Path, state: State, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", ConvertRecipe(init="svd", dtype="bfloat16"), verify=True)
    written = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"].bfloat16())
    assert report.models[0].verification is not None


# --- without loss ------------------------------------------------------------------------------------------------


def test_lossless_conversion_is_the_golden_model(golden: Path, tmp_path: Path) -> None:
    """Identity 5 of the design, through files: what the reference code computes, with latent attention."""
    vectors = load_file(golden / "golden.safetensors")
    report = convert(golden, tmp_path / "out", LOSSLESS, verify=True)
    model = load_model(tmp_path / "out")
    out = model(vectors["x"], vectors["t"], vectors["context"])
    assert relative(out, vectors["wan21.out"]) < 1e-5
    verification = report.models[0].verification
    assert verification is not None
    assert sorted(verification.attention_errors) == [0, 1, 2]
    assert max(verification.attention_errors.values()) < 1e-5
    for latents, expected in (("x", "sf.chunks3.out"), ("x_long", "sf.window6_sink1.out")):
        streaming = StreamingConfig(window_frames=6, positions="absolute")
        model = load_model(tmp_path / "out", streaming=streaming)
        cache = LatentCache(model.config, batch=1, height=6, width=10)
        chunks = [
            model(chunk, vectors["t"], vectors["context"], cache=cache, start_frame=3 * i)
            for i, chunk in enumerate(vectors[latents].split(3, dim=2))
        ]
        assert relative(torch.cat(chunks, 2), vectors[expected]) < 1e-5


def test_lossy_conversion_is_worse_than_lossless_and_better_than_random(source: Path, tmp_path: Path) -> None:
    errors = {}
    for name, recipe in (
        ("wide", ConvertRecipe(init="svd", kv_rank=50, rope_dim=20, nope_dim=0, q_rank="none", key_norm="token")),
        ("narrow", EXACT),
        ("random", ConvertRecipe(init="random")),
    ):
        report = convert(source, tmp_path / name, recipe, verify=True)
        verification = report.models[0].verification
        assert verification is not None
        errors[name] = sum(verification.attention_errors.values())
    assert 1e-3 < errors["wide"] < errors["narrow"] < errors["random"]


# --- what it is computed from --------------------------------------------------------------------------------------


def test_modulation_is_what_the_blocks_apply(source: Path) -> None:
    timesteps = [1000.0, 625.0, 0.0]
    model = load_model(source)
    _, modulation = model.embed_time(torch.tensor(timesteps), 3, 1)
    with open_checkpoint(source) as checkpoint:
        time = time_modulation(checkpoint, timesteps)
        for layer, block in enumerate(model.blocks):
            expected = (modulation + block.modulation)[:, 0, :2]  # shift and scale of self-attention
            found = layer_modulation(checkpoint, layer, time)
            assert found.shape == (3, 2, 60)
            assert relative(found, expected) < 1e-6


def test_the_regime_decides_the_mean_rotation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []
    original = from_weights.mean_rotation

    def remember(split: tuple[int, int, int], **arguments: Any) -> Tensor:
        seen.append({"split": split, **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in arguments.items()}})
        return original(split, **arguments)

    monkeypatch.setattr(from_weights, "mean_rotation", remember)
    streaming = StreamingConfig(window_frames=9)
    convert(source, tmp_path / "a", ConvertRecipe(init="svd", streaming=streaming, layers="0"))
    convert(
        source, tmp_path / "b", ConvertRecipe(init="svd", frames=5, height=96, width=160, vae_stride=16, layers="0")
    )
    assert seen == [
        {"split": (4, 3, 3), "queries": [6, 7, 8], "keys": [*range(9)], "height": 30, "width": 52},
        {"split": (4, 3, 3), "queries": [*range(5)], "keys": [*range(5)], "height": 3, "width": 5},
    ]
    a, b = (load_file(tmp_path / name / WEIGHTS_NAME)["blocks.0.self_attn.kv_b_proj.weight"] for name in "ab")
    assert not torch.allclose(a, b)


# --- the record ----------------------------------------------------------------------------------------------------


def test_conversion_json_says_what_was_done(source: Path, state: State, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", ConvertRecipe(init="svd", layers="1-2", kv_rank=6))
    text = (tmp_path / "out" / "conversion.json").read_text()
    data = json.loads(text)
    assert data["source"]["name"] == "model"
    with open_checkpoint(source) as checkpoint:
        assert data["source"]["sha256"] == checkpoint.store.sha256() == report.models[0].sha256
    assert data["recipe"] | {"kv_rank": 6, "rope_dim": 4, "nope_dim": 16, "q_rank": 30} == data["recipe"]
    assert data["recipe"]["layers"] == "1-2"
    assert data["cache_scalars_per_token"] == {"dense": 360, "mla": 120 + 10 + 10}
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    for layer in data["layers"]:
        names = (f"blocks.{layer['layer']}.self_attn.{name}.weight" for name in "kv")
        singular = np.linalg.svd(np.concatenate([state[name].double().numpy() for name in names]), compute_uv=False)
        np.testing.assert_allclose(layer["singular_values"], singular, rtol=1e-5)
        energy = (singular**2).cumsum() / (singular**2).sum()
        assert layer["effective_rank"] == int((energy < 0.99).sum()) + 1
        assert layer["energy_at_kv_rank"] == pytest.approx(energy[5], rel=1e-5)
        assert {"rope", "latent", "query"} <= layer["errors"].keys()
        assert 0 < layer["errors"]["latent"] < 1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "layers 1-2" in readme
    assert str(tmp_path) not in text + readme
    assert listing(tmp_path / "out") == ["README.md", "config.json", "conversion.json", WEIGHTS_NAME]


@pytest.mark.parametrize("init", ["svd", "random", "lossless"])
def test_same_input_and_seed_give_the_same_bytes(
    state: State, save_folder: SaveFolder, tmp_path: Path, init: Any
) -> None:
    """From copies in two places, without touching torch's own generator."""
    recipe = ConvertRecipe(init=init)
    for place in ("here", "there"):
        torch.manual_seed(len(place))
        given = save_folder(state, NATIVE, f"{place}/model")
        before = torch.get_rng_state()
        convert(given, tmp_path / place / "out", recipe, verify=True)
        assert torch.equal(torch.get_rng_state(), before)
    assert files(tmp_path / "here" / "out") == files(tmp_path / "there" / "out")


@pytest.mark.parametrize("threads", [2, 5])
def test_layers_side_by_side_are_those_of_one_thread(source: Path, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            convert(source, tmp_path / str(count), SVD)
            assert torch.get_num_threads() == count
        convert(source, tmp_path / "alone", dataclasses.replace(SVD, layers="2"))
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / str(threads))
    together, alone = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("1", "alone"))
    names = [name for name in together if name.startswith("blocks.2.self_attn.")]
    assert len(names) > 8
    assert all(torch.equal(together[name], alone[name]) for name in names)


def test_random_init_follows_its_seed_layer_by_layer(source: Path, tmp_path: Path) -> None:
    weights = {}
    for name, recipe in (
        ("all", ConvertRecipe(init="random", seed=3)),
        ("one", ConvertRecipe(init="random", seed=3, layers="2")),
        ("other", ConvertRecipe(init="random", seed=4)),
    ):
        convert(source, tmp_path / name, recipe)
        weights[name] = load_file(tmp_path / name / WEIGHTS_NAME)
    key = "blocks.{}.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(weights["all"][key.format(2)], weights["one"][key.format(2)])
    assert not torch.equal(weights["all"][key.format(2)], weights["other"][key.format(2)])
    assert not torch.equal(weights["all"][key.format(1)], weights["all"][key.format(2)])


def test_large_outputs_are_sharded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's limit of 5 GB, made small."""
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 150_000)
    convert(source, tmp_path / "out", SVD)
    assert (tmp_path / "out" / f"{WEIGHTS_NAME}.index.json").is_file()
    assert len(list((tmp_path / "out").glob("*-of-*.safetensors"))) > 1
    load_model(tmp_path / "out")


# --- two experts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(state: State, save_folder: SaveFolder, tmp_path: Path) -> Path:
    save_folder(state, NATIVE, "pair/high_noise_model")
    return save_folder({n: t * 1.25 for n, t in state.items()}, NATIVE, "pair/low_noise_model").parent


def test_two_experts_keep_their_layout(pair: Path, state: State, tmp_path: Path) -> None:
    plans = []
    report = convert(pair, tmp_path / "out", EXACT, verify=True, on_plan=plans.append)
    assert [plan.subfolder for plan in plans] == ["high_noise_model", "low_noise_model"]
    assert [model.plan.subfolder for model in report.models] == ["high_noise_model", "low_noise_model"]
    assert all(model.verification is not None for model in report.models)
    for name, gain in (("high_noise_model", 1.0), ("low_noise_model", 1.25)):
        written = load_file(tmp_path / "out" / name / WEIGHTS_NAME)
        assert torch.equal(written["head.head.weight"], gain * state["head.head.weight"])
        load_model(tmp_path / "out", subfolder=name)
    assert listing(tmp_path / "out")[0] == "high_noise_model"
    convert(pair, tmp_path / "one", EXACT, subfolder="low_noise_model")
    assert files(tmp_path / "one") == files(tmp_path / "out" / "low_noise_model")


def test_an_expert_that_fails_takes_the_other_with_it(pair: Path, state: State, tmp_path: Path) -> None:
    bad = dict(state)
    bad["blocks.1.ffn.2.bias"] = bad["blocks.1.ffn.2.bias"].clone().index_fill_(0, torch.tensor(3), float("nan"))
    save_file(bad, pair / "low_noise_model" / WEIGHTS_NAME)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.2\.bias"):
        convert(pair, tmp_path / "out", SVD)
    assert listing(tmp_path) == before


def test_a_disk_that_fails_at_the_end_leaves_the_old_experts(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(pair, tmp_path / "out", SVD)
    before, rename = files(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "model" and target.name == "out":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match=r"writing failed \(No space left"):
        convert(pair, tmp_path / "out", EXACT, overwrite=True)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / ".out.partial")  # kept: everything was finished
    assert files(tmp_path) == before


def test_overwriting_two_experts(pair: Path, tmp_path: Path) -> None:
    convert(pair, tmp_path / "out", SVD)
    with pytest.raises(OutputError, match="exists"):
        convert(pair, tmp_path / "out", EXACT)
    convert(pair, tmp_path / "out", EXACT, overwrite=True)
    assert load_model(tmp_path / "out", subfolder="high_noise_model").config.cached_scalars() == (9, 9, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pair"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="not a model folder"):
        convert(pair, tmp_path / "mine", SVD, overwrite=True)


# --- bad input leaves nothing behind ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kv_rank": 61}, "kv_rank is 61, larger than the layer, which is 60 wide"),
        ({"q_rank": 61}, "q_rank is 61, larger than the layer"),
        ({"rope_dim": 22}, "rope_dim is 22, larger than the head, which is 20 wide"),
        ({"nope_dim": 21}, "nope_dim is 21, larger than the head"),
        ({"v_dim": 21}, "v_dim is 21, larger than the head"),
        ({"nope_dim": 18}, "nope_dim 18 and rope_dim 4 are 22 wide together, a head is 20"),
        ({"layers": "1-3"}, "layer 3 does not exist, the model has 0 to 2"),
        ({"height": 100}, "height is 100 pixels: give a multiple of 16"),
    ],
)
def test_budgets_larger_than_the_layer(source: Path, tmp_path: Path, recipe: Any, message: str) -> None:
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", **recipe))
    assert listing(tmp_path) == before


def spoil_nan(folder: Path, state: State) -> str:
    state["blocks.2.self_attn.v.weight"] = state["blocks.2.self_attn.v.weight"].clone()
    state["blocks.2.self_attn.v.weight"][4, 7] = float("nan")
    save_file(state, folder / WEIGHTS_NAME)
    return r"blocks\.2\.self_attn\.v\.weight"


def spoil_inf(folder: Path, state: State) -> str:
    state["head.head.bias"] = state["head.head.bias"] + float("inf")
    save_file(state, folder / WEIGHTS_NAME)
    return r"head\.head\.bias"


def spoil_zero(folder: Path, state: State) -> str:
    for name in ("k.weight", "k.bias"):
        state[f"blocks.1.self_attn.{name}"] = torch.zeros_like(state[f"blocks.1.self_attn.{name}"])
    save_file(state, folder / WEIGHTS_NAME)
    return "layer 1 are degenerate"


def spoil_shape(folder: Path, state: State) -> str:
    state["blocks.0.ffn.0.weight"] = torch.ones(44, 59)
    save_file(state, folder / WEIGHTS_NAME)
    return r"blocks\.0\.ffn\.0\.weight.*\[44, 59\]"


def spoil_truncated(folder: Path, state: State) -> str:
    data = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(data[:-100])
    return WEIGHTS_NAME


def spoil_empty(folder: Path, state: State) -> str:
    (folder / WEIGHTS_NAME).unlink()
    return "holds no weights"


def spoil_converted(folder: Path, state: State) -> str:
    convert(folder, folder.parent / "once", SVD)
    shutil.rmtree(folder)
    (folder.parent / "once").rename(folder)
    return "converted already"


@pytest.mark.parametrize(
    "spoil", [spoil_nan, spoil_inf, spoil_zero, spoil_shape, spoil_truncated, spoil_empty, spoil_converted]
)
def test_bad_sources(source: Path, state: State, tmp_path: Path, spoil: Callable[[Path, State], str]) -> None:
    pattern = spoil(source, dict(state))
    before = listing(tmp_path)
    with pytest.raises(InputError, match=pattern) as raised:
        convert(source, tmp_path / "out", SVD)
    assert raised.value.exit_code == 2
    assert str(source) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before


def test_outputs_that_are_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "out", SVD)
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "out", SVD, dry_run=True)
    with pytest.raises(OutputError, match="holds the source"):
        convert(source, source, SVD, overwrite=True)
    with pytest.raises(OutputError, match="holds the source"):
        convert(source, tmp_path, SVD, overwrite=True)
    convert(source, tmp_path / "out", SVD, overwrite=True)
    convert(source, tmp_path / "out", EXACT, overwrite=True)
    assert load_model(tmp_path / "out").config.cached_scalars() == (9, 9, 9)


def test_disk_space_is_checked_before_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    shown: list[Any] = []
    with pytest.raises(OutputError, match="free on its disk"):
        convert(source, tmp_path / "out", SVD, on_plan=shown.append)
    assert shown == []


def test_half_precision_overflow_is_an_error(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    large = dict(state)
    large["blocks.2.ffn.0.bias"] = large["blocks.2.ffn.0.bias"] + 1e6
    source = save_folder(large, NATIVE)
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=r"blocks\.2\.ffn\.0\.bias.*does not fit torch\.float16"):
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", dtype="float16"))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("bad", ["quantum", "cuda:99", "meta"])
def test_a_device_that_is_not_there(source: Path, tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match=bad):
        convert(source, tmp_path / "out", SVD, device=bad)


def test_dry_run_plans_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    report = convert(source, tmp_path / "out", SVD, dry_run=True)
    assert files(tmp_path) == before
    plan = report.models[0].plan
    assert (plan.dense_scalars, plan.mla_scalars) == (360, 24)
    convert(source, tmp_path / "out", SVD)
    with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as opened:
        written = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert plan.output_bytes == sum(tensor.nbytes for tensor in written.values())
    planned = plan.to_json()["tensors"]
    assert {t["name"]: t["shape"] for t in planned} == {n: list(t.shape) for n, t in written.items()}
    assert sum(t["converted"] for t in planned) == 3 * 11


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> ConversionReport:
    return convert(source, tmp_path / "out", LOSSLESS)


def tamper(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS_NAME)


def check(source: Path, report: ConversionReport) -> dict[int, float]:
    with open_checkpoint(source) as checkpoint:
        plan = report.models[0].plan
        found = verify_conversion(checkpoint, report.output, plan, device=torch.device("cpu"))
    assert found.passed_through == 66
    return dict(found.attention_errors)


def test_verification_sees_one_flipped_bit(source: Path, converted: ConversionReport) -> None:
    check(source, converted)

    def flip(tensor: Tensor) -> Tensor:
        tensor.view(torch.int32)[5] ^= 1
        return tensor

    tamper(converted.output, "blocks.1.cross_attn.q.bias", flip)
    with pytest.raises(MLAConvertError, match=r"blocks\.1\.cross_attn\.q\.bias") as raised:
        check(source, converted)
    assert raised.value.exit_code == 1


def test_verification_measures_attention(source: Path, converted: ConversionReport) -> None:
    """Doubling W_O and its bias doubles the output: an error of one, in that layer only."""
    for leaf in ("weight", "bias"):
        tamper(converted.output, f"blocks.1.self_attn.o.{leaf}", lambda t: 2 * t)
    errors = check(source, converted)
    assert errors[1] == pytest.approx(1, abs=1e-4)
    assert max(errors[0], errors[2]) < 1e-5
    tamper(converted.output, "blocks.1.self_attn.o.bias", lambda t: t * float("inf"))
    with pytest.raises(MLAConvertError, match="layer 1 is not finite"):
        check(source, converted)


# --- memory ----------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The most anonymous memory taken inside the block, beyond what there was at its start."""
    start, highest, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tensors_pass_through_one_at_a_time(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Six tensors of 24 MB: one at a time needs a few copies of one (the check for NaN), not all of them."""
    width = 100_000
    wide = dict(state)
    for i in range(3):
        wide[f"blocks.{i}.ffn.0.weight"] = torch.ones(width, 60)
        wide[f"blocks.{i}.ffn.0.bias"] = torch.ones(width)
        wide[f"blocks.{i}.ffn.2.weight"] = torch.ones(60, width)
    source = save_folder(wide, NATIVE | {"ffn_dim": width})
    del wide
    with peak_memory() as peak:
        convert(source, tmp_path / "out", SVD)
    assert 0 < peak() < 100e6


# --- small parts -----------------------------------------------------------------------------------------------------


def test_layer_lists() -> None:
    assert parse_layers("0-2, 7,5", 8) == (0, 1, 2, 5, 7)
    assert _format_layers((0, 1, 2, 5, 7)) == "0-2,5,7"
    assert _format_layers((3,)) == "3"
    for text in ("", "a", "1-", "-1", "1,,2", "3-1", "8"):
        with pytest.raises(ConfigError, match="layers is"):
            parse_layers(text, 8)


def test_default_videos() -> None:
    assert default_video(CONFIG)[:2] == (480, 832)
    assert default_video(CONFIG).vae_stride == 8
    wan22 = WanConfig(dim=60, num_heads=3, num_layers=1, ffn_dim=4, in_dim=48, out_dim=48)
    assert default_video(wan22).vae_stride == 16
    pixels = WanConfig(dim=60, num_heads=3, num_layers=1, ffn_dim=4, in_dim=3, out_dim=3)
    assert default_video(pixels) == (24, 32, 1, 1)


def test_open_models_opens_what_is_there(source: Path, pair: Path) -> None:
    experts = ["high_noise_model", "low_noise_model"]
    for given, subfolder, expected in (
        (source, None, [""]),
        (pair, None, experts),
        (pair, experts[1], [""]),
        (source.parent, "pair/low_noise_model", [""]),
    ):
        with open_models(given, subfolder=subfolder) as models:
            assert list(models) == expected


def losses_by_hand(source: Path, output: Path, clips: Clips, recipe: ConvertRecipe) -> tuple[float, float]:
    """Mean squared velocity errors of two whole models on the newest chunk of every window, but of clean passes."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=5)
    sums, count = [0.0, 0.0], 0
    for window in windows(clips, Regime.of(streaming, recipe.seed)):
        rows = window.timestep[:, -1] > 0
        for i, model in enumerate((load_model(source), load_model(output))):
            velocity = model(window.latents, window.timestep, window.context, chunks=window.chunks)
            sums[i] += float((velocity[:, :, -window.queries :] - window.target)[rows].double().square().sum())
        count += window.target[rows].numel()
    return sums[0] / count, sums[1] / count


def test_without_data_the_teacher_supplies_the_clips(
    state: State, save_folder: SaveFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rollouts of twenty steps, each clip from its own seed, whether made together or one at a time."""
    streaming = {"chunk_frames": 3, "window_frames": 7, "sink_frames": 1}
    source = save_folder(state, NATIVE | {"streaming": streaming})
    recipe = ConvertRecipe(kv_rank=9, clips=3, seed=5, height=32, width=48)
    steps: list[tuple[str, int, int]] = []
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, recipe)
        together = calibrated.calibration_clips(checkpoint, plan, None, progress=lambda *step: steps.append(step))
        monkeypatch.setattr(calibrated, "BATCH_TOKENS", 1)
        alone = calibrated.calibration_clips(checkpoint, plan, None)
        kept = calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path / "kept")
        monkeypatch.setattr(calibrated.OwnClips, "make", None)
        again = calibrated.calibration_clips(checkpoint, plan, None, kept=tmp_path / "kept")
    assert together.latents.shape == (3, CONFIG.out_dim, 9, 4, 6)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert torch.equal(kept.latents, alone.latents)
    torch.testing.assert_close(alone.latents, together.latents, rtol=1e-4, atol=1e-4)
    assert steps[-1][:3] == ("generate clips", 63, 63)  # three chunks of twenty steps and a clean pass
    model, sampler = load_model(source), Sampler.many_step(20)
    context = torch.zeros(1, 1, CONFIG.text_dim)
    chunks = rollout(model, context, frames=9, height=4, width=6, sampler=sampler, seed=5 + 2)
    torch.testing.assert_close(torch.cat(list(chunks), 2), together.latents[2:], rtol=1e-4, atol=1e-4)


def test_fewer_clips_than_asked_are_said(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    source, data, lines = save_folder(state, NATIVE), tmp_path / "clips", []
    data.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 2, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    recipe = ConvertRecipe(kv_rank=9, clips=5, height=32, width=48, allocation="uniform", layers="0")
    convert(source, tmp_path / "out", recipe, data=data, say=lines.append)
    assert lines == [f"{data} has 3 clips, fewer than the 5 of the recipe (--clips); all of them are used"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record.pop("version"), "another version of the method; it is measured anew"),
        (lambda record: record.update(version=record["version"] + 1), "another version of the method; it is"),
        (lambda record: record.update(clips=4), "another number of clips; it is measured anew"),
        (lambda record: record.update(tokens=[9, 9], loras=[{}]), "another size of frames and LoRA; it is"),
        (lambda record: record.update(more=1), "another calibration; it is measured anew"),
        (lambda record: None, ""),
    ],
)
def test_moments_of_another_version_are_measured_anew(
    state: State, save_folder: SaveFolder, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    """Whichever part of the record differs, one line says so; moments that were tampered with show what is reused."""
    source, data = save_folder(state, NATIVE), tmp_path / "clips"
    data.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 2, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    recipe = ConvertRecipe(kv_rank=9, clips=3, height=32, width=48, allocation="uniform")
    lines: list[str] = []
    convert(source, tmp_path / "out", recipe, data=data, say=lines.append)
    assert lines == []
    kept = tmp_path / "out.moments"
    record, first = kept / "calibration.json", kept / "layer-000.safetensors"
    measured = load_file(first)
    save_file({name: tensor * 2 if name == "mean" else tensor for name, tensor in measured.items()}, first)
    noted = json.loads(record.read_text())
    assert noted["version"] == MOMENTS_VERSION
    changed = json.loads(record.read_text())
    change(changed)
    record.write_text(json.dumps(changed))
    convert(source, tmp_path / "again", recipe, data=data, moments=kept, say=lines.append)
    assert lines == ([] if not says else [line for line in lines if line.startswith(f"{kept}: ") and says in line][:1])
    assert torch.equal(load_file(first)["mean"], measured["mean"]) == bool(says)
    assert json.loads(record.read_text()) == noted


def test_moments_are_kept_and_reused(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Beside the output; the same model, regime and clips take them up, others make their own."""
    source = save_folder(state, NATIVE | {"streaming": {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1}})
    data = tmp_path / "clips"
    data.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {"latents": torch.randn(3, CONFIG.out_dim, 4, 4, 6, generator=g)}
    save_file(tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    recipe = ConvertRecipe(kv_rank=9, clips=3, height=32, width=48, allocation="uniform")
    convert(source, tmp_path / "out", recipe, data=data)
    kept = tmp_path / "out.moments"
    assert listing(kept) == ["calibration.json", *(f"layer-{i:03d}.safetensors" for i in range(3))]
    first = kept / "layer-000.safetensors"
    # Reuse is seen by what it does: moments that were tampered with change the conversion.
    tampered = {name: tensor * 2 if name == "mean" else tensor for name, tensor in load_file(first).items()}
    save_file(tampered, first)
    convert(source, tmp_path / "again", recipe, data=data, moments=kept)
    weights = [load_file(tmp_path / name / WEIGHTS_NAME) for name in ("out", "again")]
    name = "blocks.0.self_attn.kv_a_proj_with_mqa.bias"
    assert not torch.allclose(weights[0][name], weights[1][name])
    # Another regime: thrown away and made anew.
    other = dataclasses.replace(recipe, seed=1)
    convert(source, tmp_path / "other", other, data=data, moments=kept)
    assert not torch.equal(load_file(first)["mean"], tampered["mean"])
    # Other clips under the same name and of the same size: the same.
    before = load_file(first)["mean"]
    other_tensors = {"latents": torch.randn(3, CONFIG.out_dim, 4, 4, 6, generator=g)}
    save_file(other_tensors | {"context": torch.randn(3, 2, CONFIG.text_dim, generator=g)}, data / "a.safetensors")
    convert(source, tmp_path / "fresh", other, data=data, moments=kept)
    assert not torch.allclose(load_file(first)["mean"], before, rtol=1e-3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(OutputError, match="not a folder of moments"):
        convert(source, tmp_path / "none", recipe, data=data, moments=tmp_path / "mine")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_calibrated_conversion_end_to_end(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """From clips in a folder: the total is kept, layers differ, and the result is closer than from weights alone."""
    streaming = {"chunk_frames": 2, "window_frames": 5, "sink_frames": 1, "positions": "window"}
    source = save_folder(state, NATIVE | {"streaming": streaming})
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(10, CONFIG.out_dim, 6, 4, 6, generator=generator)
    context = torch.randn(10, 2, CONFIG.text_dim, generator=generator)
    data = tmp_path / "clips"
    data.mkdir()
    save_file({"latents": latents, "context": context}, data / "a.safetensors")
    common = {"key_norm": "token", "q_rank": "none", "height": 32, "width": 48}
    calibrated = {"init": "calibrated", "kv_rank": 16, "clips": 10, **common}
    recipes = {
        "svd": ConvertRecipe(init="svd", kv_rank=10, rope_dim=6, **common),
        "uniform": ConvertRecipe(allocation="uniform", **calibrated),
        "adaptive": ConvertRecipe(**calibrated),
        "again": ConvertRecipe(**calibrated),
        "shared": ConvertRecipe(rope="latent", **calibrated),
        "cached": ConvertRecipe(rope="cached", **calibrated | {"kv_rank": 10, "rope_dim": 6}),
        "fixed": ConvertRecipe(
            rope="cached",
            allocation="fixed",
            without=("components",),
            **calibrated | {"kv_rank": 10, "rope_dim": 6},
        ),
        "narrow": ConvertRecipe(nope_dim=6, v_dim=9, **calibrated),
    }
    reports = {
        name: convert(source, tmp_path / name, recipe, data=data if recipe.init == "calibrated" else None)
        for name, recipe in recipes.items()
    }
    teacher = load_model(source)
    held = Clips(torch.randn(8, CONFIG.out_dim, 5, 4, 6, generator=generator), context[:8])
    students = {name: load_model(tmp_path / name) for name in recipes}
    errors = {name: evaluate(teacher, student, held).velocity_error for name, student in students.items()}
    assert all(errors[name] < errors["svd"] for name in ("uniform", "adaptive", "shared", "cached"))
    for name, rope, components in (("adaptive", "head", False), ("shared", "latent", True), ("cached", "cached", True)):
        mla = students[name].config.mla
        assert mla is not None
        assert mla.rope == rope
        assert sum(mla.cached_scalars(i, 0) for i in range(3)) == 3 * (16 + 1)
        for layer in mla.layers:
            assert layer is not None
            assert bool(layer.rope_components) == components
            assert layer.qk_nope_head_dim + layer.qk_rope_head_dim <= CONFIG.head_dim
    fixed = students["fixed"].config.mla
    assert fixed is not None
    assert {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in fixed.layers if layer} == {(10, 6)}
    assert all(count == 1 for layer in fixed.layers if layer for _, count in layer.rope_components)
    assert students["cached"].config.mla != fixed
    narrow = students["narrow"].config.mla
    assert narrow is not None
    assert {(layer.qk_nope_head_dim, layer.v_head_dim) for layer in narrow.layers if layer} == {(6, 9)}
    for file in sorted(p.name for p in (tmp_path / "adaptive").iterdir()):
        assert (tmp_path / "adaptive" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    # The account: every step with a loss of its own, the last step's being that of the model that was written.
    steps = ["dense", "rotations dropped", "rotary key shared", "heads narrowed", "low rank", "output refitted"]
    assert list(reports["narrow"].models[0].losses) == [*steps, "queries refitted"]
    record = json.loads((tmp_path / "adaptive" / "conversion.json").read_text())
    assert list(record["losses"]) == ["dense", "low rank", "output refitted", "queries refitted"]
    assert list(record["layers"][0]["errors"]) == list(record["losses"])[1:]
    found = losses_by_hand(source, tmp_path / "adaptive", Clips(latents[8:], context[8:]), recipes["adaptive"])
    assert found == pytest.approx((record["losses"]["dense"], record["losses"]["queries refitted"]), rel=1e-5)
    with pytest.raises(InputError, match="shards"):
        convert(source, tmp_path / "none", ConvertRecipe(init="calibrated"), data=tmp_path / "svd" / "missing")
    with pytest.raises(ConfigError, match="init calibrated"):
        convert(source, tmp_path / "none", ConvertRecipe(init="svd"), data=data)
    assert not (tmp_path / "none").exists()


def test_a_disk_too_small_for_the_activations_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(load_recipe("tiny"), init="calibrated", clips=1)
    monkeypatch.setattr(calibrated, "scratch_bytes", lambda *_, **__: 10**17)
    with pytest.raises(OutputError, match=r"activations take about 100000000\.0 GB .* --moments"):
        convert("tiny", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_only_the_built_in_model_draws_its_clips(tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(TINY, copied, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with open_checkpoint("tiny") as own, open_checkpoint(copied) as other:
        assert own.is_tiny
        assert not other.is_tiny
        plan = plan_conversion(own, load_recipe("tiny"))
        found, expected = calibrated.calibration_clips(own, plan, None), training_clips(plan.recipe.clips or 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
