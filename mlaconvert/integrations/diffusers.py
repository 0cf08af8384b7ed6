"""A converted model as a diffusers transformer: everything outside self-attention is diffusers' own.

    transformer = WanMLATransformer3DModel.from_pretrained("wan-mla", dtype=torch.bfloat16)
    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", transformer=transformer)

Modules outside the converted self-attentions keep diffusers' names, so that LoRAs, offloading, compilation and
quantisation of layers find what they look for. Needs the extra `diffusers`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import get_balanced_memory
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

from mlaconvert.attention import AttentionMode, AttentionPlan, LatentAttention
from mlaconvert.checkpoint import CONFIG_NAME
from mlaconvert.config import MLAConfig, MLALayer, StreamingConfig, WanConfig, parse
from mlaconvert.convert import CONVERSION_NAME
from mlaconvert.errors import ConfigError, InputError, OutputError, UnsupportedModelError
from mlaconvert.families import Layout, WanFamily, open_checkpoint
from mlaconvert.lora import refuse_converted
from mlaconvert.model import chunk_mask, default_chunks
from mlaconvert.records import HEALING_NAME
from mlaconvert.rope import Rotary
from mlaconvert.writer import ModelWriter, TensorSpec

# A saved pipeline names this module, and diffusers looks there for the base class as well.
__all__ = ["LatentSelfAttention", "ModelMixin", "WanMLATransformer3DModel"]

_FAMILY = WanFamily()
_WHERE = "config of WanMLATransformer3DModel"
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


class LatentSelfAttention(LatentAttention):
    """`LatentAttention` where diffusers' blocks have their `attn1`; its output projection is `to_out.0`."""

    mode: AttentionMode = "auto"

    def __init__(self, config: WanConfig, mla: MLAConfig, layer: MLALayer) -> None:
        super().__init__(config, mla, layer)
        self.to_out = nn.ModuleList((self.o,))
        del self.o

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `rotary_emb` is what `ChunkRope` makes."""
        cos, sin, *mask = rotary_emb
        turn = Rotary(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
        plan = AttentionPlan(query_rotary=turn, key_rotary=turn, mask=mask[0] if mask else None, mode=self.mode)
        return self.to_out[0](self.heads(hidden_states, plan))


class ChunkRope(WanRotaryPosEmbed):  # type: ignore[misc]
    """diffusers' rotary embedding, and behind it the mask of a model that is causal between chunks."""

    def __init__(self, config: WanConfig, max_frames: int) -> None:
        super().__init__(config.head_dim, config.patch_size, max_frames)
        self.streaming = config.streaming

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[B, C, F, H, W] -> cosines and sines [1, N, 1, D]; of a streaming model also its mask, bool [N, N]."""
        turn: tuple[Tensor, Tensor] = super().forward(hidden_states)
        if self.streaming is None:
            return turn
        frames = hidden_states.shape[2] // self.patch_size[0]
        tokens = turn[0].shape[1] // frames
        visible = chunk_mask(default_chunks(frames, self.streaming), self.streaming).to(hidden_states.device)
        return (*turn, visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1))


class ChunkCausalProcessor(WanAttnProcessor):  # type: ignore[misc]
    """diffusers' dense self-attention with the mask that `ChunkRope` hands over."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, ...] = (),
    ) -> Tensor:
        cos, sin, mask = rotary_emb
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, (cos, sin))


class WanMLATransformer3DModel(WanTransformer3DModel):  # type: ignore[misc]
    """diffusers' `WanTransformer3DModel` with latent attention in the layers that `mla` lists.

    Arguments are `WanTransformer3DModel`'s; `text_len` is the number of text tokens, which shorter texts are padded to
    with zeros as Wan's own code does; `streaming` and `mla` are those sections of a converted model's config.json. A
    streaming model sees a whole clip in one pass that is masked between chunks, without a cache.

    Raises ConfigError for sections that are not valid, UnsupportedModelError for CLIP features with another text
    length than 512, which diffusers counts on.
    """

    _cp_plan = None  # latent attention is not split over devices

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        text_len: int = 512,
        streaming: dict[str, Any] | None = None,
        mla: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        if image_dim is not None and text_len != 512:
            raise UnsupportedModelError(f"text_len is {text_len}; diffusers' image-to-video attention counts on 512")
        self.geometry = WanConfig(
            dim=num_attention_heads * attention_head_dim,
            num_heads=num_attention_heads,
            num_layers=num_layers,
            ffn_dim=ffn_dim,
            in_dim=in_channels,
            out_dim=out_channels or in_channels,
            freq_dim=freq_dim,
            text_dim=text_dim,
            text_len=text_len,
            image_dim=image_dim,
            patch_size=(patch_size[0], patch_size[1], patch_size[2]),
            eps=eps,
            cross_attn_norm=cross_attn_norm,
            streaming=None if streaming is None else parse(StreamingConfig, streaming, f"{_WHERE}: streaming"),
            mla=None if mla is None else MLAConfig.from_json(mla, _WHERE),
        )
        self.layout: Layout = "diffusers"
        self.source_config: dict[str, Any] | None = None
        self.records: dict[str, str] = {}
        self.tensor_order = tuple(_FAMILY.expected_shapes(self.geometry))
        latent = self.geometry.mla
        if self.geometry.streaming is not None:
            self.rope = ChunkRope(self.geometry, rope_max_seq_len)
        for i, block in enumerate(self.blocks):
            layer = latent.layers[i] if latent is not None else None
            if latent is not None and layer is not None:
                block.attn1 = LatentSelfAttention(self.geometry, latent, layer)
            elif self.geometry.streaming is not None:
                block.attn1.set_processor(ChunkCausalProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Velocity [B, out, F, H, W] of latents [B, in, F, H, W], as `WanTransformer3DModel.forward` gives it.

        `timestep` [B], or one for each token [B, N]; text [B, up to text_len, text_dim] is padded with zeros.
        """
        missing = self.geometry.text_len - encoder_hidden_states.shape[1]
        return super().forward(
            hidden_states,
            timestep,
            F.pad(encoder_hidden_states, (0, 0, 0, max(missing, 0))),
            encoder_hidden_states_image,
            return_dict,
            attention_kwargs,
        )

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
    ) -> WanMLATransformer3DModel:
        """The model of anything that `open_checkpoint` reads: a folder or Hub id in native or diffusers' layout.

        `torch_dtype` (or `dtype`) None keeps the file's dtypes; a half precision leaves embeddings of time, norms and
        modulations in float32, as diffusers does. `device_map`, `max_memory` and `offload_folder` are diffusers'.

        Raises what `open_checkpoint` raises, and ConfigError for an option that has no meaning here.
        """
        unknown = [name for name, value in options.items() if value and name not in _IGNORED]
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not an option of WanMLATransformer3DModel.from_pretrained; leave it out "
                "(HF_TOKEN and HF_HOME say who you are on the Hub, and where its files are kept)"
            )
        wanted = dtype or torch_dtype
        with open_checkpoint(pretrained_model_name_or_path, revision=revision, subfolder=subfolder) as checkpoint:
            config = checkpoint.config
            raw = _FAMILY.raw_config(config, "diffusers") | _sections(config)
            with init_empty_weights():
                model = cls(**{name: value for name, value in raw.items() if not name.startswith("_")})
            state = {
                name: checkpoint.read(canonical).to(_dtype_of(name, wanted))
                for canonical in checkpoint.names
                for name in (checkpoint.output_name(canonical, "diffusers"),)
            }
            model.load_state_dict(state, strict=True, assign=True)
            model.layout, model.source_config = checkpoint.layout, checkpoint.raw_config
            model.tensor_order = tuple(checkpoint.names)
            folder = checkpoint.store.path if checkpoint.store.path.is_dir() else checkpoint.store.path.parent
            model.records = {name: (folder / name).read_text("utf-8") for name in _RECORDS if (folder / name).is_file()}
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

        config.json, and the records of its conversion and healing, are those that it came with. `max_shard_size` is in
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
        raw = self.source_config or _FAMILY.raw_config(self.geometry, self.layout) | _sections(self.geometry)
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
            for name, text in self.records.items():
                writer.write_text(name, text)
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


def _sections(config: WanConfig) -> dict[str, Any]:
    """What a converted model's config.json has beside the geometry."""
    return {
        "text_len": config.text_len,
        "streaming": None if config.streaming is None else dataclasses.asdict(config.streaming),
        "mla": None if config.mla is None else config.mla.to_json(),
    }


def _dtype_of(name: str, wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype to load a tensor in; None is the file's."""
    keep = not set(name.split(".")).isdisjoint(WanTransformer3DModel._keep_in_fp32_modules)
    return torch.float32 if keep and wanted in (torch.float16, torch.bfloat16) else wanted


def _canonical(name: str) -> str:
    """Our name of a tensor of the model. Raises InputError for one that a LoRA brought."""
    canonical = _FAMILY.canonical(name, "diffusers")
    if canonical is None:
        raise InputError(
            f"{name!r} is not part of the model; fuse a loaded LoRA (fuse_lora) or drop it, then unload it "
            "(unload_lora_weights), and save again"
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
    model: WanMLATransformer3DModel,
    device_map: str | int | torch.device | Mapping[str, Any],
    max_memory: dict[int | str, int | str] | None,
    offload_folder: str | Path | None,
) -> WanMLATransformer3DModel:
    """The model on its devices, by accelerate."""
    if isinstance(device_map, str) and device_map in _SPREAD:
        blocks = model._no_split_modules
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=blocks, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=blocks)
    places = dict(device_map) if isinstance(device_map, Mapping) else {"": device_map}
    return dispatch_model(model, places, offload_dir=offload_folder)
