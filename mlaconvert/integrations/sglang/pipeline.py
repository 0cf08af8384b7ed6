"""SGLang's causal Wan pipeline around a converted transformer and its latent cache."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.multimodal_gen.configs.pipeline_configs.wan import SelfForcingWanT2V480PConfig
from sglang.multimodal_gen.configs.sample.wan import WanT2V_1_3B_SamplingParams
from sglang.multimodal_gen.runtime.models.schedulers.scheduling_self_forcing_flow_match import (
    SelfForcingFlowMatchScheduler,
)
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.stages import CausalDMDDenoisingStage, InputValidationStage

from mlaconvert.base.repository import find_base
from mlaconvert.config.streaming import FEW_STEPS, SHIFT
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.integrations.contract import Contract
from mlaconvert.integrations.sglang.cache import LayerKVCache, TextKVCache, allocate
from mlaconvert.integrations.sglang.transformer import ConvertedTransformerLoader
from mlaconvert.units import format_bytes


@dataclasses.dataclass
class WanMLAPipelineConfig(SelfForcingWanT2V480PConfig):  # type: ignore[misc]
    """SGLang's settings of a few-step causal Wan model."""

    def update_config_from_dict(self, args: dict[str, Any], prefix: str = "") -> None:
        """Take SGLang's options, and a local folder's chunks: frames are adjusted where its model is not loaded."""
        folder = (args.get("component_paths") or {}).get("transformer") or args.get("model_path") or ""
        super().update_config_from_dict(args, prefix)
        if (Path(folder) / CONFIG_NAME).is_file():
            with suppress(InputError), open_checkpoint(folder) as checkpoint:  # the loader says what is wrong with it
                self.dit_config.arch_config.num_frames_per_block = Contract.of(checkpoint.config).window.chunk_frames

    def adjust_num_frames(self, num_frames: int, *, log_adjustment: bool = True) -> int:
        """Video frames of whole chunks, as SGLang's causal stage needs them: as many as fit, and one chunk at least."""
        stride = self.vae_config.arch_config.scale_factor_temporal
        chunk = self.dit_config.arch_config.num_frames_per_block
        latent = (num_frames - 1) // stride + 1
        whole = max(latent // chunk, 1) * chunk
        adjusted = num_frames if whole == latent else (whole - 1) * stride + 1
        if log_adjustment and adjusted != num_frames:
            warnings.warn(
                f"num_frames is {num_frames}, which is not whole chunks of {chunk} latent frames; {adjusted} are made",
                stacklevel=2,
            )
        return adjusted


@dataclasses.dataclass
class WanMLASamplingParams(WanT2V_1_3B_SamplingParams):  # type: ignore[misc]
    """SGLang's defaults of a request: the student's four steps, without guidance."""

    guidance_scale: float = 1.0
    num_inference_steps: int = len(FEW_STEPS)


class LatentCausalDenoisingStage(CausalDMDDenoisingStage):  # type: ignore[misc]
    """SGLang's causal stage with a latent cache: its loop over chunks and steps, our memory."""

    causal_kv_cache: list[LayerKVCache] | None
    crossattn_cache: list[TextKVCache] | None
    _latent_size: tuple[int, int] = (0, 0)
    _made_for: tuple[int, int, int] | None = None

    def _maybe_torch_compile(self, module: Any) -> None:
        """Block by block: the cache's bookkeeping between them is Python."""
        if self.server_args.enable_torch_compile:
            module.model.compile_blocks()

    def _target_dtype(self) -> torch.dtype:
        return self.transformer.model.dtype

    def _autocast_enabled(self, target_dtype: torch.dtype, server_args: Any) -> bool:
        return False  # rotations and norms choose their own precision

    def _prepare_frame_seq_length(self, h: int, w: int) -> int:
        self._latent_size = (h, w)
        return super()._prepare_frame_seq_length(h, w)

    def _num_causal_cache_attention_heads(self, *, sequence_shard_enabled: bool) -> int:
        return LayerKVCache.num_cache_heads

    def forward(self, batch: Any, server_args: Any) -> Any:
        """Denoise `batch.latents` chunk by chunk, as SGLang does; a request of another size gets another cache."""
        if batch.do_classifier_free_guidance:
            self.log_warning("guidance_scale is not used: a few-step student was distilled with its guidance")
        videos, _, _, height, width = batch.latents.shape
        if self._made_for != (videos, height, width):
            self.causal_kv_cache = self.crossattn_cache = None
        return super().forward(batch, server_args)

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device, **options: Any) -> None:
        asked = [name for name, value in options.items() if value]
        if asked:
            raise UnsupportedModelError(f"{asked[0]} is not an option of a latent cache; leave it out")
        model, contract = self.transformer.model, self.transformer.contract
        streaming = dataclasses.replace(
            contract.window, window_frames=self.sliding_window_num_frames, sink_frames=self.sink_size
        )
        self._made_for = (batch_size, *self._latent_size)
        layers = allocate(model.config, streaming, self._made_for, dtype, device)
        self.causal_kv_cache, size = layers, sum(layer.nbytes for layer in layers)
        self.log_info("latent KV cache of %d latent frames: %s", streaming.window_frames, format_bytes(size))

    def _initialize_crossattn_cache(
        self, batch_size: int, max_text_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.crossattn_cache = [TextKVCache(layer.cache) for layer in self.causal_kv_cache or ()]


def base_of(folder: str) -> str:
    """The repository of diffusers' with the text encoder and the VAE of a converted folder. Raises InputError."""
    instead = f"give it as --model-path, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, and {folder} as --transformer-path"
    try:
        base = find_base(folder)
    except InputError:
        raise InputError(f"{folder}: the repository with its text encoder and VAE is not known; {instead}") from None
    if base.is_native:
        raise InputError(f"{base.source} is not in the layout of diffusers, which SGLang reads; {instead}")
    return base.source


class WanMLAPipeline(ComposedPipelineBase):  # type: ignore[misc]
    """Text encoder and VAE of a Wan repository of diffusers', and a converted transformer between them."""

    model_path: str
    pipeline_name = "WanMLAPipeline"
    is_video_pipeline = True
    _required_config_modules: ClassVar[list[str]] = ["text_encoder", "tokenizer", "vae", "transformer", "scheduler"]
    component_loaders: ClassVar[dict[str, Any]] = {"transformer": ConvertedTransformerLoader}

    def _load_config(self) -> dict[str, Any]:
        """The base's model_index.json. Given a converted folder, the base is the one that `find_base` knows of it."""
        folder = Path(self.model_path)
        if (folder / CONFIG_NAME).is_file() and not (folder / "model_index.json").is_file():
            self.server_args.component_paths.setdefault("transformer", self.model_path)
            self.model_path = base_of(self.model_path)
        index: dict[str, Any] = super()._load_config()
        return index

    def initialize_pipeline(self, server_args: Any) -> None:
        """Sample as few-step students do, where the repository's settings say nothing of it."""
        config = server_args.pipeline_config
        if not config.dmd_denoising_steps:
            config.dmd_denoising_steps = [int(step) for step in FEW_STEPS]
            config.flow_shift, config.warp_denoising_step = SHIFT, True
        if not self.get_module("transformer").model.config.few_step:
            warnings.warn(
                "the converted folder does not say that it is a few-step student, and SGLang's causal stage samples it "
                f"in {len(config.dmd_denoising_steps)} steps; a many-step model needs mlaconvert generate --steps",
                stacklevel=2,
            )
        self.modules["scheduler"] = SelfForcingFlowMatchScheduler(
            num_inference_steps=1000, shift=config.flow_shift, sigma_min=0.0, extra_one_step=True
        )

    def create_pipeline_stages(self, server_args: Any) -> None:
        """SGLang's stages of a causal Wan pipeline."""
        self.add_stage(InputValidationStage())
        self.add_standard_text_encoding_stage()
        self.add_standard_latent_preparation_stage()
        self.add_stage(
            LatentCausalDenoisingStage(
                transformer=self.get_module("transformer"), scheduler=self.get_module("scheduler")
            )
        )
        self.add_standard_decoding_stage()
