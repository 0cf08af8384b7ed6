"""What the classes of `mlaconvert.integrations.diffusers` share: loading, saving, LoRAs, and what is refused.

Needs the extra `diffusers`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import get_balanced_memory
from diffusers import ModelMixin, SkyReelsV2Transformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from torch import nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig
from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.records import read_record
from mlaconvert.errors import ConfigError, InputError, OutputError, UnsupportedModelError
from mlaconvert.families.classes import block_frames, converted_config, skyreels_fields
from mlaconvert.families.lora import refuse_converted
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.protocol import Layout
from mlaconvert.families.source import Source
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.inputs import refuse_foreign_links
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, HEALING_NAME
from mlaconvert.files.writer import ModelWriter, TensorSpec
from mlaconvert.integrations.contract import Contract
from mlaconvert.integrations.diffusers_attention import (
    ChunkCausalProcessor,
    ChunkRope,
    LatentSelfAttention,
    check_processor,
)

_FAMILY = WanFamily()
_RECORDS = (CONVERSION_NAME, HEALING_NAME)
_SHARD_BYTES = 5_000_000_000
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# Options of diffusers' loaders that change nothing here: files are mapped, in safetensors or pickles of tensors.
_IGNORED = ("low_cpu_mem_usage", "use_safetensors", "offload_state_dict", "disable_mmap")
_DOWNLOADS = (
    *("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download"),
    *("proxies", "token", "revision", "subfolder"),
)


class LatentTransformer(ModelMixin):  # type: ignore[misc]
    """A transformer of diffusers whose self-attentions are latent where its config has an `mla` section.

    Comes before diffusers' class among the bases.
    """

    _cp_plan = None  # latent attention is not split over devices

    def _convert(self) -> None:
        """Put latent attention where the config has it, and the mask of a streaming model.

        Raises ConfigError for sections that are not valid, UnsupportedModelError for CLIP features with another text
        length than 512, which diffusers counts on.
        """
        c, where = self.config, f"config of {type(self).__name__}"
        if c.image_dim is not None and c.text_len != 512:
            raise UnsupportedModelError(f"text_len is {c.text_len}; diffusers' image-to-video attention counts on 512")
        self.geometry = WanConfig(
            dim=c.num_attention_heads * c.attention_head_dim,
            num_heads=c.num_attention_heads,
            num_layers=c.num_layers,
            ffn_dim=c.ffn_dim,
            in_dim=c.in_channels,
            out_dim=c.out_channels or c.in_channels,
            freq_dim=c.freq_dim,
            text_dim=c.text_dim,
            text_len=c.text_len,
            image_dim=c.image_dim,
            patch_size=(c.patch_size[0], c.patch_size[1], c.patch_size[2]),
            eps=c.eps,
            cross_attn_norm=c.cross_attn_norm,
            fps=24 if getattr(c, "inject_sample_info", False) else None,  # pipelines say which one, pass by pass
            streaming=None if c.streaming is None else parse(StreamingConfig, c.streaming, f"{where}: streaming"),
            mla=None if c.mla is None else MLAConfig.from_json(c.mla, where),
        )
        self.layout: Layout = "diffusers"
        self.source_config: dict[str, Any] | None = None
        self.records: dict[str, bytes] = {}
        self.tensor_order = tuple(_FAMILY.expected_shapes(self.geometry))
        self.contract, latent = Contract.of(self.geometry), self.geometry.mla
        causal = self.contract.streaming is not None
        if causal:
            self.rope = ChunkRope(self.geometry, self.contract, c.rope_max_seq_len)
        for i, (block, cached) in enumerate(zip(self.blocks, self.contract.layers, strict=True)):
            layer = latent.layers[i] if latent is not None else None
            if latent is not None and layer is not None:
                block.attn1 = LatentSelfAttention(self.geometry, latent, layer, cached)
            elif causal:
                block.attn1.set_processor(ChunkCausalProcessor())

    @classmethod
    def _class_for(cls, skyreels: bool) -> type[LatentTransformer]:
        """The class that reads a model, SkyReels-V2 or not."""
        return cls

    @classmethod
    def from_config(cls, config: Any = None, *arguments: Any, **options: Any) -> Any:
        """A model with random weights, of the class that fits the config as `from_pretrained` chooses it."""
        chosen = cls._class_for(isinstance(config, Mapping) and block_frames(config) is not None)
        if chosen is not cls:
            return chosen.from_config(config, *arguments, **options)
        return super().from_config(config, *arguments, **options)

    def _made_config(self) -> dict[str, Any]:
        """config.json of a model that was not loaded."""
        raw = _FAMILY.raw_config(self.geometry, self.layout) | _sections(self.geometry)
        if isinstance(self, SkyReelsV2Transformer3DModel):
            raw |= skyreels_fields(dict(self.config), self.layout)
        return raw

    # --- what diffusers' models offer, where latent attention needs a word -------------------------------------------

    def enable_cache(self, config: Any) -> None:
        """Start one of diffusers' caches (Pyramid Attention Broadcast, ...), as its models do.

        Raises ConfigError for one that no layer of the model takes part in: it would do nothing.
        """
        before = _hooks(self)
        super().enable_cache(config)
        if _hooks(self) == before:
            self.disable_cache()
            raise ConfigError(
                f"{type(config).__name__}: no layer of the model takes part in this cache, with these settings; "
                "name the layers in its settings, or use another one"
            )

    def enable_parallelism(self, **options: Any) -> None:
        """Not offered: raises UnsupportedModelError, since latent attention is not split over devices."""
        raise UnsupportedModelError(
            "latent attention is not split over devices (no context or tensor parallelism); "
            "spread whole layers with device_map, or videos over processes"
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Set processors as diffusers' models do, all or none.

        Raises UnsupportedModelError for one of dense attention at a converted layer.
        """
        for name, module in self.named_modules():
            if isinstance(module, LatentSelfAttention):
                wanted = (
                    processor.get(f"{name}.processor", module.processor) if isinstance(processor, dict) else processor
                )
                check_processor(wanted)
        super().set_attn_processor(processor)

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_memory: dict[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        **options: Any,
    ) -> Any:
        """The model of anything that `open_checkpoint` reads: a folder or Hub id in native or diffusers' layout.

        `WanMLATransformer3DModel` gives a `SkyReelsV2MLATransformer3DModel` for such a model.

        `torch_dtype` (or `dtype`) None keeps the file's dtypes; a half precision leaves embeddings of time, norms and
        modulations in float32, as diffusers does. `device_map`, `max_memory` and `offload_folder` are diffusers'.

        Raises what `open_checkpoint` raises, and ConfigError for an option that has no meaning here.
        """
        unknown = [name for name, value in options.items() if value and name not in _IGNORED]
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not an option of {cls.__name__}.from_pretrained; leave it out "
                "(HF_TOKEN and HF_HOME say who you are on the Hub, and where its files are kept)"
            )
        wanted = dtype or torch_dtype
        with open_checkpoint(
            Source(pretrained_model_name_or_path, revision=revision, subfolder=subfolder)
        ) as checkpoint:
            checkpoint.check_runs()
            config = checkpoint.config
            skyreels = skyreels_fields(checkpoint.raw_config, "diffusers")
            raw = _FAMILY.raw_config(config, "diffusers") | skyreels | _sections(config)
            with init_empty_weights():
                model: Any = cls._class_for(bool(skyreels))(
                    **{name: value for name, value in raw.items() if not name.startswith("_")}
                )
            state = {
                name: checkpoint.read(canonical).to(_dtype_of(name, wanted, model._keep_in_fp32_modules))
                for canonical in checkpoint.names
                for name in (checkpoint.output_name(canonical, "diffusers"),)
            }
            model.load_state_dict(state, strict=True, assign=True)
            model.layout, model.source_config = checkpoint.layout, checkpoint.raw_config
            model.tensor_order = tuple(checkpoint.names)
            folder = checkpoint.store.path if checkpoint.store.path.is_dir() else checkpoint.store.path.parent
            refuse_foreign_links(folder, _RECORDS)  # save_pretrained writes them on
            found = [name for name in _RECORDS if read_record(folder / name) is not None]
            model.records = {name: (folder / name).read_bytes() for name in found}
        model.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        model.eval()
        return model if device_map is None else _place(model, device_map, max_memory, offload_folder)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = _SHARD_BYTES,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Write a model folder in the layout that the model came in, whole or not at all.

        config.json, and the records of its conversion and healing, are those that it came with; only the class that
        config.json names is brought up to date in folders of older versions. `max_shard_size` is in
        bytes or text such as "5GB". Raises OutputError for a folder that holds something already (without
        `overwrite`), InputError while a LoRA is loaded, ConfigError for diffusers' options that are not offered.
        """
        refused = [name for name, value in options.items() if value and name != "safe_serialization"]
        if refused or options.get("safe_serialization") is False:
            name = refused[0] if refused else "safe_serialization=False"
            raise ConfigError(f"save_pretrained has no {name}: it writes safetensors; `mlaconvert push` publishes them")
        if not is_main_process:
            return
        target = Path(save_directory)
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise OutputError(f"{target} holds something already; choose another folder, or pass overwrite=True")
        weights = {_canonical(name): weight for name, weight in self.named_parameters()}
        specs = {
            name: TensorSpec(_FAMILY.source(name, self.layout), tuple(weights[name].shape), weights[name].dtype)
            for name in self.tensor_order
        }
        raw = converted_config(self.source_config or self._made_config())
        target.parent.mkdir(parents=True, exist_ok=True)
        with ModelWriter(
            target,
            list(specs.values()),
            metadata={"format": "pt"},
            max_shard_bytes=_bytes_of(max_shard_size),
            overwrite=target.exists(),
        ) as writer:
            for prefix, module in self.named_modules():
                with _at_hand(module):
                    for name, weight in module.named_parameters(recurse=False):
                        writer.write(specs[_canonical(f"{prefix}.{name}".lstrip("."))].name, weight)
            writer.write_text(CONFIG_NAME, json.dumps(raw, indent=2) + "\n")
            for name, data in self.records.items():
                writer.write_bytes(name, data)
            writer.commit()

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **options: Any
    ) -> None:
        """Load a LoRA as `WanTransformer3DModel` does; it may change anything but converted self-attention.

        Raises UnsupportedModelError for one that does, because it was made for projections that are not there.
        """
        state = pretrained_model_name_or_path_or_dict
        if not isinstance(state, Mapping):
            found = {name: options.pop(name) for name in _DOWNLOADS if name in options}
            state = WanLoraLoaderMixin.lora_state_dict(state, **found)
        refuse_converted(state, self.geometry, "the LoRA")
        super().load_lora_adapter(state, prefix=prefix, **options)


def _hooks(model: nn.Module) -> set[tuple[str, str]]:
    """Module and name of diffusers' hooks below the model itself."""
    return {
        (module_name, hook)
        for module_name, module in model.named_modules()
        if module_name and hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks
    }


def _sections(config: WanConfig) -> dict[str, Any]:
    """What a converted model's config.json has beside the geometry."""
    return {
        "text_len": config.text_len,
        "streaming": None if config.streaming is None else dataclasses.asdict(config.streaming),
        "mla": None if config.mla is None else config.mla.to_json(),
    }


def _dtype_of(name: str, wanted: torch.dtype | None, in_float32: Sequence[str]) -> torch.dtype | None:
    """The dtype to load a tensor in; None is the file's."""
    keep = not set(name.split(".")).isdisjoint(in_float32)
    return torch.float32 if keep and wanted in (torch.float16, torch.bfloat16) else wanted


def _canonical(name: str) -> str:
    """Our name of a tensor of the model. Raises InputError for one that a LoRA brought."""
    canonical = _FAMILY.canonical(name, "diffusers")
    if canonical is None:
        raise InputError(
            f"{name!r} is not part of the model; fuse a loaded LoRA (fuse_lora) or drop it, then unload it "
            "(unload_lora_weights), take fused projections apart (unfuse_qkv_projections), and save again"
        )
    return canonical


@contextmanager
def _at_hand(module: nn.Module) -> Iterator[None]:
    """A module's own weights in memory, if accelerate's hooks keep them elsewhere."""
    outer = getattr(module, "_hf_hook", None)
    hooks = outer.hooks if isinstance(outer, SequentialHook) else (outer,)
    with ExitStack() as stack:
        for hook in hooks:
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def _bytes_of(size: int | str) -> int:
    """5 GB and the like in bytes."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)", size.upper())
    if match is None:
        raise ConfigError(f"max_shard_size is {size!r}; give bytes, or a number and a unit such as 5GB")
    return int(match[1]) * _UNITS[match[2]]


def _place(
    model: Any,
    device_map: str | int | torch.device | Mapping[str, Any],
    max_memory: dict[int | str, int | str] | None,
    offload_folder: str | Path | None,
) -> Any:
    """The model on its devices, by accelerate."""
    if isinstance(device_map, str) and device_map in _SPREAD:
        blocks = model._no_split_modules
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=blocks, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=blocks)
    places = dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}
    return dispatch_model(model, places, offload_dir=offload_folder)
