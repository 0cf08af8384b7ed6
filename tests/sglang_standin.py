"""What mlaconvert uses of SGLang's diffusion engine, as its release 0.5.23 states it, without SGLang.

Names, arguments and what is called when are SGLang's; the code is ours and does no more than these tests need.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PIPELINES: dict[str, tuple[Any, Any, Any]] = {}
OURS = "mlaconvert.integrations.sglang"


class ComposedPipelineBase:
    component_loaders: ClassVar[dict[str, Any]] = {}
    pipeline_name: str

    def __init__(self, model_path: str, server_args: Any) -> None:
        self.model_path, self.server_args = model_path, server_args
        self.modules: dict[str, Any] = {}
        self.stages: list[Any] = []
        assert "transformer" in self._load_config()
        for name, loader in self.component_loaders.items():
            path = server_args.component_paths.get(name, f"{self.model_path}/{name}")
            self.modules[name], _ = loader().load(path, server_args, name, "diffusers")
        self.initialize_pipeline(server_args)
        self.create_pipeline_stages(server_args)

    def _load_config(self) -> dict[str, Any]:
        path = Path(self.model_path) / "model_index.json"
        if not path.is_file():
            raise ValueError(f"Model directory {self.model_path} does not contain model_index.json")
        index: dict[str, Any] = json.loads(path.read_text())
        return index

    def get_module(self, name: str, default: Any = None) -> Any:
        return self.modules.get(name, default)

    def add_stage(self, stage: Any) -> None:
        self.stages.append(stage)

    def add_standard_text_encoding_stage(self) -> None:
        self.add_stage("text")

    def add_standard_latent_preparation_stage(self) -> None:
        self.add_stage("latents")

    def add_standard_decoding_stage(self) -> None:
        self.add_stage("decoding")


class PipelineConfig:
    def update_config_from_dict(self, args: dict[str, Any], prefix: str = "") -> None:
        """SGLang takes its own fields out of the arguments."""
        self.model_path = args.pop("model_path")


class DiTConfig:
    """`arch_config` takes the fields of a model's config.json."""

    def __init__(self) -> None:
        self.arch_config, self.prefix = SimpleNamespace(num_frames_per_block=3), ""

    def update_model_arch(self, fields: dict[str, Any]) -> None:
        vars(self.arch_config).update(fields)


@dataclasses.dataclass
class SelfForcingWanT2V480PConfig(PipelineConfig):
    dit_config: Any = dataclasses.field(default_factory=DiTConfig)
    vae_config: Any = dataclasses.field(
        default_factory=lambda: SimpleNamespace(arch_config=SimpleNamespace(scale_factor_temporal=4))
    )
    dit_precision: str = "bf16"
    flow_shift: float | None = 5.0
    dmd_denoising_steps: list[int] | None = dataclasses.field(default_factory=lambda: [1000, 750, 500, 250])
    warp_denoising_step: bool = True
    text_len: int = 512


@dataclasses.dataclass
class WanT2V_1_3B_SamplingParams:  # noqa: N801
    num_frames: int = 81
    guidance_scale: float = 3.0
    num_inference_steps: int = 50


def register_pipeline(
    pipeline_cls: Any,
    *,
    sampling_param_cls: Any,
    pipeline_config_cls: Any,
    hf_model_paths: list[str] | None = None,
    model_detectors: list[Any] | None = None,
    overwrite: bool = False,
) -> None:
    if not issubclass(pipeline_cls, ComposedPipelineBase) or not issubclass(pipeline_config_cls, PipelineConfig):
        raise TypeError("pipeline_cls must inherit from ComposedPipelineBase, pipeline_config_cls from PipelineConfig")
    if pipeline_cls.pipeline_name in PIPELINES and not overwrite:
        raise ValueError(f"Pipeline '{pipeline_cls.pipeline_name}' is already registered")
    PIPELINES[pipeline_cls.pipeline_name] = (pipeline_cls, sampling_param_cls, pipeline_config_cls)


class ComponentCheckpointUnsupportedError(ValueError):
    pass


class ComponentLoader:
    expected_library: str | tuple[str, ...] = ""

    def load(self, path: str, server_args: Any, name: str, library: str) -> tuple[Any, float]:
        assert library in self.expected_library
        try:
            component = self.load_customized(path, server_args, name)
        except (ComponentCheckpointUnsupportedError, OSError):
            raise
        except Exception as error:
            if self.should_raise_customized_load_error(server_args, name):
                raise RuntimeError(f"Failed to load customized {name}") from error
            raise NotImplementedError("SGLang falls back to diffusers' class here") from error
        return component.eval(), 0.0


class BaseDiT(nn.Module):
    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        assert all(hasattr(cls, name) for name in ("_fsdp_shard_conditions", "param_names_mapping"))

    def __init__(self, config: Any, hf_config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.hf_config = config.arch_config, hf_config

    def __post_init__(self) -> None:
        assert all(hasattr(self, name) for name in ("hidden_size", "num_attention_heads", "num_channels_latents"))


class SelfForcingFlowMatchScheduler:
    def __init__(self, num_inference_steps: int, shift: float, sigma_min: float, extra_one_step: bool) -> None:
        sigmas = torch.linspace(1, sigma_min, num_inference_steps + extra_one_step)[:num_inference_steps]
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = 1000 * self.sigmas

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.sigmas[(self.timesteps - timestep).abs().argmin()]


class InputValidationStage:
    pass


class CausalDMDDenoisingStage:
    """SGLang's loop: chunks, steps, fresh noise after each, and a last pass over the clean chunk at timestep 0."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        self.server_args = SERVER_ARGS[-1]
        self.transformer, self.scheduler = transformer, scheduler
        self.causal_kv_cache: Any = None
        self.crossattn_cache: Any = None
        self.said: list[str] = []
        self.num_frames_per_block = transformer.config.num_frames_per_block
        self.sliding_window_num_frames = transformer.config.sliding_window_num_frames
        self.sink_size = transformer.config.sink_size
        self._maybe_torch_compile(transformer)

    def log_info(self, message: str, *arguments: Any) -> None:
        self.said.append(message % arguments)

    log_warning = log_info

    def _prepare_frame_seq_length(self, h: int, w: int) -> int:
        patch = self.transformer.config.patch_size
        self.num_token_per_frame = h * w // (patch[-1] * patch[-2])
        return self.num_token_per_frame

    @torch.no_grad()
    def forward(self, batch: Any, server_args: Any) -> Any:
        latents, config = batch.latents, server_args.pipeline_config
        videos, _, frames, height, width = latents.shape
        assert videos == 1, "SGLang's causal stage takes one video a request"
        self._prepare_frame_seq_length(height, width)
        steps = torch.tensor(config.dmd_denoising_steps)
        if config.warp_denoising_step:
            steps = torch.cat((self.scheduler.timesteps, torch.zeros(1)))[1000 - steps]
        dtype = self._target_dtype()
        assert not self._autocast_enabled(dtype, server_args)
        if self.causal_kv_cache is None:
            self._initialize_kv_cache(batch_size=videos, dtype=dtype, device=latents.device)
            self._initialize_crossattn_cache(
                batch_size=videos, max_text_len=config.text_len, dtype=dtype, device=latents.device
            )
        else:
            for cache in (*self.crossattn_cache, *self.causal_kv_cache):
                (cache.reset_indices if hasattr(cache, "reset_indices") else cache.reset)()
        size = self.num_frames_per_block
        if frames % size:
            raise ValueError("num_frames must be divisible by num_frames_per_block for causal DMD denoising")
        for start in range(0, frames, size):
            noisy = latents[:, :, start : start + size]
            for i, step in enumerate(steps):
                velocity = self._pass(batch, noisy.to(dtype), step.expand(videos), start)
                clean = (noisy.double() - self.scheduler.sigma(step).double() * velocity.double()).to(velocity.dtype)
                if i + 1 < len(steps):
                    # SGLang draws noise with frames before channels.
                    fresh = torch.randn(clean.transpose(1, 2).shape, generator=batch.generator).transpose(1, 2)
                    sigma = self.scheduler.sigma(steps[i + 1])
                    noisy = (1 - sigma) * clean + sigma * fresh
            self._pass(batch, clean.to(dtype), torch.zeros(videos, dtype=torch.long), start)
            latents[:, :, start : start + size] = clean
        return batch

    def _pass(self, batch: Any, latents: Tensor, timestep: Tensor, start: int) -> Tensor:
        velocity: Tensor = self.transformer(
            latents,
            batch.prompt_embeds,
            timestep.unsqueeze(1),
            kv_cache=self.causal_kv_cache,
            crossattn_cache=self.crossattn_cache,
            current_start=start * self.num_token_per_frame,
            start_frame=start,
        )
        return velocity


def resolve_precision(server_args: Any, name: str, *, precision_attr: str) -> torch.dtype:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return names[getattr(server_args.pipeline_config, precision_attr)]


SERVER_ARGS: list[Any] = [SimpleNamespace(enable_torch_compile=False)]
_MODULES = {
    "registry": [register_pipeline],
    "configs.pipeline_configs.wan": [SelfForcingWanT2V480PConfig],
    "configs.sample.wan": [WanT2V_1_3B_SamplingParams],
    "runtime.loader.component_loaders.component_loader": [ComponentLoader, ComponentCheckpointUnsupportedError],
    "runtime.models.dits.base": [BaseDiT],
    "runtime.models.schedulers.scheduling_self_forcing_flow_match": [SelfForcingFlowMatchScheduler],
    "runtime.pipelines_core.composed_pipeline_base": [ComposedPipelineBase],
    "runtime.pipelines_core.stages": [CausalDMDDenoisingStage, InputValidationStage],
    "runtime.utils.precision": [resolve_precision],
}


@contextmanager
def standing_in() -> Iterator[None]:
    """`sglang` can be imported, and is this; what imported it is forgotten afterwards."""
    before = dict(sys.modules)
    for name in [name for name in before if name.split(".")[0] == "sglang" or name.startswith(OURS)]:
        del sys.modules[name]
    for path, things in _MODULES.items():
        parts = f"sglang.multimodal_gen.{path}".split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(sys.modules[".".join(parts)]).update({thing.__name__: thing for thing in things})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang" or name.startswith(OURS)]:
            del sys.modules[name]
        sys.modules.update({name: m for name, m in before.items() if name.split(".")[0] == "sglang"})


def server_args(**changes: Any) -> Any:
    """SGLang's `ServerArgs`, as far as it is read."""
    defaults: dict[str, Any] = {
        "component_paths": {},
        "pipeline_config": SelfForcingWanT2V480PConfig(dit_precision="fp32"),
        "kv_cache_quant_config": SimpleNamespace(enabled=False),
        "enable_torch_compile": False,
        **dict.fromkeys(("tp_size", "sp_degree", "ulysses_degree", "ring_degree", "kv_gather_degree"), 1),
        **dict.fromkeys(("lora_path", "quantization", "transformer_weights_path")),
    }
    return SimpleNamespace(**defaults | changes)
