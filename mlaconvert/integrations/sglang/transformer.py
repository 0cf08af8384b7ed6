"""A converted model as SGLang's stages call a causal Wan transformer, and how SGLang loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import (
    ComponentCheckpointUnsupportedError,
    ComponentLoader,
)
from sglang.multimodal_gen.runtime.models.dits.base import BaseDiT
from sglang.multimodal_gen.runtime.utils.precision import resolve_precision
from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.families.wan import WanFamily
from mlaconvert.integrations.contract import Contract
from mlaconvert.integrations.sglang.cache import LayerKVCache
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel

# What splits one model over devices in SGLang; replicas (dp_size) do not.
_SPLITS = ("tp_size", "sp_degree", "ulysses_degree", "ring_degree", "kv_gather_degree")
# What SGLang's own transformers act on and this one would leave out in silence, and what to do instead.
_ELSEWHERE = {
    "lora_path": "merge the LoRA before: mlaconvert convert --lora FILE",
    "quantization": "leave it out, and narrow the cache instead: mlaconvert convert --bytes-per-token N",
    "transformer_weights_path": "give the converted folder itself: --transformer-path FOLDER",
}


class CausalWanMLATransformer3DModel(BaseDiT):  # type: ignore[misc]
    """`WanModel` called as SGLang's `CausalWanTransformer3DModel`; `contract` says what its cache holds.

    Raises UnsupportedModelError for a model that has no latents to cache, or that SGLang's causal stage cannot feed.
    """

    _fsdp_shard_conditions: list[Any] = []  # noqa: RUF012
    _compile_conditions: list[Any] = []  # noqa: RUF012
    param_names_mapping: dict[str, str] = {}  # noqa: RUF012
    reverse_param_names_mapping: dict[str, str] = {}  # noqa: RUF012
    independent_first_frame = False

    def __init__(self, model: WanModel, dit_config: Any) -> None:
        config, contract = model.config, Contract.of(model.config)
        check_runs(config, contract)
        fields = sglang_fields(config, contract)
        dit_config.update_model_arch(fields)
        super().__init__(config=dit_config, hf_config=fields)
        self.model, self.contract = model, contract
        self.hidden_size, self.num_attention_heads = config.dim, config.num_heads
        self.attention_head_dim, self.num_channels_latents = config.head_dim, config.out_dim
        self.__post_init__()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        timestep: Tensor,
        *,
        kv_cache: Sequence[LayerKVCache],
        crossattn_cache: Any = None,
        current_start: int = 0,
        cache_start: int = 0,
        start_frame: int = 0,
    ) -> Tensor:
        """Velocity [B, C, f, H, W] of one chunk, in its dtype, which is written into the cache.

        `timestep` is [B], [B, 1] or [B, f], `encoder_hidden_states` the prompt [B, T, text_dim] or a list that begins
        with it, `current_start` the chunk's first token from the start of the video. What else SGLang passes is in the
        cache already, or counted from there.
        """
        text = encoder_hidden_states if isinstance(encoder_hidden_states, Tensor) else encoder_hidden_states[0]
        cache = kv_cache[0].cache
        start = current_start // cache.tokens_per_frame
        velocity: Tensor = self.model(hidden_states, timestep, text, cache=cache, start_frame=start)
        return velocity.to(hidden_states.dtype)


class ConvertedTransformerLoader(ComponentLoader):  # type: ignore[misc]
    """Loads the `transformer` of a pipeline from anything that mlaconvert reads, in SGLang's `dit_precision`."""

    expected_library = ("diffusers", "mlaconvert.integrations.diffusers")

    def should_raise_customized_load_error(self, server_args: Any, component_name: str) -> bool:
        """diffusers' class, which SGLang would fall back to, has no cache."""
        return True

    def load_customized(self, component_model_path: str, server_args: Any, component_name: str) -> Any:
        """The transformer. Raises ComponentCheckpointUnsupportedError for what cannot be loaded or run."""
        try:
            check_options(server_args)
            dtype = resolve_precision(server_args, component_name, precision_attr="dit_precision")
            model = load_model(component_model_path, dtype=dtype)
            return CausalWanMLATransformer3DModel(model, server_args.pipeline_config.dit_config)
        except InputError as error:
            raise ComponentCheckpointUnsupportedError(f"{component_model_path}: {error}") from error


def check_options(server_args: Any) -> None:
    """Raise UnsupportedModelError for options of SGLang's that a converted transformer does not act on."""
    for name in _SPLITS:
        if (getattr(server_args, name, None) or 1) > 1:
            raise UnsupportedModelError(
                f"{name} is {getattr(server_args, name)}: latent attention is not split over devices; "
                "run whole replicas instead (--num-gpus N --dp-size N)"
            )
    for name, instead in _ELSEWHERE.items():
        if getattr(server_args, name, None):
            raise UnsupportedModelError(f"{name} is not for a converted model; {instead}")
    if server_args.kv_cache_quant_config.enabled:
        raise UnsupportedModelError(
            "kv_cache_quant is for dense caches; a latent cache is narrowed by mlaconvert convert --bytes-per-token N"
        )


def check_runs(config: WanConfig, contract: Contract) -> None:
    """Raise UnsupportedModelError for a model that SGLang's causal stage cannot run."""
    if not contract.latent_layers:
        raise UnsupportedModelError("the model is not converted; run mlaconvert convert, or SGLang's own pipelines")
    if contract.streaming is None:
        raise UnsupportedModelError(
            "the model sees a whole clip at once and has no cache; convert it to stream (--window-frames), and train it"
        )
    if config.in_dim != config.out_dim or config.image_dim is not None:
        raise UnsupportedModelError("image-to-video models do not run in SGLang yet; use mlaconvert generate")


def sglang_fields(config: WanConfig, contract: Contract) -> dict[str, Any]:
    """The fields of SGLang's arch config, which its stages read sizes and window from."""
    window = contract.window
    return {
        **{name: value for name, value in WanFamily().raw_config(config, "diffusers").items() if name[0] != "_"},
        "patch_size": config.patch_size,
        "num_frames_per_block": window.chunk_frames,
        "sliding_window_num_frames": window.window_frames,
        "sink_size": window.sink_frames,
        "local_attn_size": -1,
    }
