"""diffusers' caches, hooks and attention backends on a converted model: what they do to the dense one, or a refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative
from torch import Tensor

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

from diffusers import hooks  # noqa: E402
from diffusers.hooks import smoothed_energy_guidance_utils as energy  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanAttnProcessor  # noqa: E402
from wan_diffusers import inputs, reference  # noqa: E402

from mlaconvert.integrations.diffusers import (  # noqa: E402
    LatentSelfAttention,
    WanMLATransformer3DModel,
)

STEPS = (900.0, 700.0, 500.0, 400.0, 300.0, 200.0, 100.0)
NOW = [0.0]  # the timestep that the caches ask for
TOLERANCE = 1e-5


def now() -> float:
    return NOW[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Any, Any]]:
    """The dense model, and its lossless conversion with one layer left dense; fresh at each call."""
    root = tmp_path_factory.mktemp("caches")
    reference(num_layers=4).save_pretrained(root / "source")
    convert(root / "source", root / "lossless", ConvertRecipe(init="lossless", layers="0,1,3"))

    def load() -> tuple[Any, Any]:
        return (
            diffusers.WanTransformer3DModel.from_pretrained(root / "source"),
            WanMLATransformer3DModel.from_pretrained(root / "lossless"),
        )

    return load


@torch.no_grad()
def sample(model: Any) -> Tensor:
    """The velocities of a few steps from noise, [steps, B, C, F, H, W], as a pipeline asks for them."""
    x, _, context = inputs(text=21)
    found = []
    for i, t in enumerate(STEPS):
        NOW[0] = t
        with model.cache_context("cond", step_index=i, sigma=t / 1000, num_inference_steps=len(STEPS)):
            found.append(
                model(hidden_states=x, timestep=torch.full((2,), t), encoder_hidden_states=context, return_dict=False)[
                    0
                ]
            )
        x = x - 0.02 * found[-1]
    return torch.stack(found)


def cache(kind: str, **settings: Any) -> Callable[[Any], None]:
    return lambda model: model.enable_cache(getattr(hooks, kind)(**settings))


def skip(**settings: Any) -> Callable[[Any], None]:
    return lambda model: hooks.apply_layer_skip(model, hooks.LayerSkipConfig(indices=[1], fqn="blocks", **settings))


def smooth(model: Any) -> None:
    settings = hooks.SmoothedEnergyGuidanceConfig(indices=[1], fqn="blocks")
    energy._apply_smoothed_energy_guidance_hook(model, settings, 9.0)


ATTENTION = [r"blocks\.\d+\.attn1"]
TAYLOR: dict[str, Any] = {
    "cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32,
}  # fmt: skip
FASTER: dict[str, Any] = {"current_timestep_callback": now, "attention_weight_callback": lambda _: 0.3}
WORKING: dict[str, Callable[[Any], None]] = {
    "Pyramid Attention Broadcast": cache(
        "PyramidAttentionBroadcastConfig", spatial_attention_block_skip_range=2, current_timestep_callback=now
    ),
    "the same of cross-attention": cache(
        "PyramidAttentionBroadcastConfig", cross_attention_block_skip_range=2, current_timestep_callback=now
    ),
    "FasterCache": cache("FasterCacheConfig", is_guidance_distilled=True, **FASTER),
    "FasterCache with guidance": cache("FasterCacheConfig", unconditional_batch_skip_range=2, **FASTER),
    "First Block Cache": cache("FirstBlockCacheConfig", threshold=0.5),
    "MagCache": cache("MagCacheConfig", threshold=5.0, mag_ratios=torch.full((7,), 1.01), num_inference_steps=7),
    "SeaCache": cache("SeaCacheConfig", threshold=5.0),
    "TaylorSeer": cache("TaylorSeerCacheConfig", cache_identifiers=ATTENTION, **TAYLOR),
    "TaylorSeer lite": cache("TaylorSeerCacheConfig", use_lite_mode=True, **TAYLOR),
    "layers skipped": skip(),
    "feed-forwards skipped": skip(skip_attention=False),
    "Smoothed Energy Guidance": smooth,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WORKING)
def test_does_what_it_does_to_the_dense_model(models: Callable[[], tuple[Any, Any]], name: str) -> None:
    plain = sample(models()[1])
    dense, lossless = models()
    for model in (dense, lossless):
        WORKING[name](model)
    found, expected = sample(lossless), sample(dense)
    assert relative(found, expected) < TOLERANCE
    assert relative(found, plain) > 1e-3
    if lossless.is_cache_enabled:
        lossless.disable_cache()
        assert relative(sample(lossless), plain) == 0


@pytest.mark.parametrize("config", [hooks.TextKVCacheConfig(), hooks.TaylorSeerCacheConfig(**TAYLOR)])
def test_a_cache_that_would_do_nothing_is_refused(models: Callable[[], tuple[Any, Any]], config: Any) -> None:
    """Text caches are for other models; TaylorSeer's default names no layer of diffusers' Wan."""
    model = models()[1]
    with pytest.raises(ConfigError, match=f"{type(config).__name__}: no layer"):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    WORKING["Pyramid Attention Broadcast"](model)  # the next one may start
    assert model.is_cache_enabled


def test_another_cache_is_refused_while_one_runs(models: Callable[[], tuple[Any, Any]]) -> None:
    model = models()[1]
    WORKING["First Block Cache"](model)
    with pytest.raises(ValueError, match="already"):
        WORKING["TaylorSeer"](model)
    assert type(model._cache_config).__name__ == "FirstBlockCacheConfig"


def test_skipping_attention_alone_is_what_diffusers_refuses_for_wan(models: Callable[[], tuple[Any, Any]]) -> None:
    for model in models():
        with pytest.raises(ValueError, match="not registered"):
            skip(skip_ff=False)(model)


# --- processors and backends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_an_attention_backend_computes_latent_attention_too(
    models: Callable[[], tuple[Any, Any]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlaconvert.integrations import diffusers_attention

    dense, model = models()
    asked = []
    dispatch = diffusers_attention.dispatch_attention_fn
    monkeypatch.setattr(
        diffusers_attention,
        "dispatch_attention_fn",
        lambda *tensors, **options: asked.append(options["backend"].value) or dispatch(*tensors, **options),
    )
    model.set_attention_backend(backend)
    assert relative(sample(model), sample(dense)) < TOLERANCE
    assert asked == [backend] * 3 * len(STEPS)  # not by the layer that is left dense, whose processor asks elsewhere


@torch.no_grad()
def test_fused_projections_change_nothing(models: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    _, model = models()
    plain = sample(model)
    model.fuse_qkv_projections()
    assert model.blocks[2].attn1.fused_projections
    assert relative(sample(model), plain) < TOLERANCE
    with pytest.raises(Exception, match="unfuse_qkv_projections"):
        model.save_pretrained(tmp_path / "saved")
    model.unfuse_qkv_projections()
    model.save_pretrained(tmp_path / "saved")


def test_processors_of_dense_attention_are_refused_where_there_is_none(models: Callable[[], tuple[Any, Any]]) -> None:
    model = models()[1]
    plain, known = sample(model), model.attn_processors
    assert len(known) == 8
    with pytest.raises(UnsupportedModelError, match="WanAttnProcessor computes dense attention"):
        model.set_attn_processor(WanAttnProcessor())
    assert model.attn_processors == known  # all or none
    with pytest.raises(UnsupportedModelError, match="dense attention"):
        model.set_attn_processor({name: WanAttnProcessor() for name in known})
    mixed = {name: WanAttnProcessor() if "Wan" in type(one).__name__ else one for name, one in known.items()}
    assert len(set(map(type, mixed.values()))) == 2
    model.set_attn_processor(mixed)
    assert relative(sample(model), plain) == 0


def test_parallelism_is_refused(models: Callable[[], tuple[Any, Any]]) -> None:
    model = models()[1]
    for config in (diffusers.ContextParallelConfig(ulysses_degree=2), diffusers.TensorParallelConfig(tp_degree=2)):
        with pytest.raises(UnsupportedModelError, match="not split over devices"):
            model.enable_parallelism(config=config)
    assert model._parallel_config is None


def test_layerwise_casting_rounds_as_it_rounds_the_dense_model(models: Callable[[], tuple[Any, Any]]) -> None:
    """Weights are kept in half precision: both are as far from the full one."""
    plain = sample(models()[0])
    for model in models():
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        assert isinstance(model.blocks[1].attn1, LatentSelfAttention) or model.blocks[1].attn1.to_q
        assert model.blocks[1].ffn.net[2].weight.dtype == torch.float16
        assert 1e-5 < relative(sample(model), plain) < 1e-3


@torch.no_grad()
def test_the_lora_scale_reaches_the_layers(models: Callable[[], tuple[Any, Any]]) -> None:
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(2)
    lora = {
        "transformer.blocks.1.ffn.net.2.lora_A.weight": torch.randn(2, 44, generator=generator),
        "transformer.blocks.1.ffn.net.2.lora_B.weight": torch.randn(36, 2, generator=generator) * 0.2,
    }
    x, t, context = inputs(text=13)
    found = []
    for model in models():
        model.load_lora_adapter(dict(lora))
        found.append(model(x, t, context, attention_kwargs={"scale": 0.4}).sample)
        assert relative(found[-1], model(x, t, context).sample) > 1e-3
    assert relative(found[1], found[0]) < TOLERANCE


def test_gradients_with_checkpointing_are_the_dense_models(models: Callable[[], tuple[Any, Any]]) -> None:
    x, t, context = inputs(text=13)
    found = []
    for model in models():
        model.enable_gradient_checkpointing()
        with warnings.catch_warnings():
            model.train()(x, t, context).sample.square().mean().backward()
        found.append(model.blocks[1].ffn.net[2].weight.grad)
    assert relative(found[1], found[0]) < TOLERANCE
