"""A converted model as a diffusers transformer: everything outside self-attention is diffusers' own.

    transformer = WanMLATransformer3DModel.from_pretrained("wan-mla", dtype=torch.bfloat16)
    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", transformer=transformer)

SkyReels-V2 has a class of its own in diffusers, and so here: `SkyReelsV2MLATransformer3DModel`. Once this module is
imported, diffusers' `AutoModel` knows both.

Modules outside the converted self-attentions keep diffusers' names, so that LoRAs, offloading, compilation and
quantisation of layers find what they look for. Needs the extra `diffusers`.
"""

from __future__ import annotations

import inspect
from typing import Any

try:
    import diffusers
except ImportError as error:
    raise ImportError(f"diffusers cannot be imported ({error}); pip install 'mlaconvert[diffusers]'") from None
from diffusers import ModelMixin, SkyReelsV2Transformer3DModel, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config

from mlaconvert.integrations.diffusers_attention import LatentSelfAttention
from mlaconvert.integrations.diffusers_model import LatentTransformer

# A saved pipeline names this module, and diffusers looks there for the base class as well.
__all__ = ["LatentSelfAttention", "ModelMixin", "SkyReelsV2MLATransformer3DModel", "WanMLATransformer3DModel"]


class WanMLATransformer3DModel(LatentTransformer, WanTransformer3DModel):  # type: ignore[misc]
    """diffusers' `WanTransformer3DModel` with latent attention in the layers that `mla` lists.

    Arguments are `WanTransformer3DModel`'s; `streaming` and `mla` are those sections of a converted model's
    config.json. A streaming model sees a whole clip in one pass that is masked between chunks, without a cache.

    Text of any length is read as it comes, as diffusers' class does; its pipelines fill it up with zeros to
    `max_sequence_length` tokens, 512 unless one says otherwise. `text_len`, the length that mlaconvert's own runtime
    fills up to, is only kept.

    Raises ConfigError for sections that are not valid, UnsupportedModelError for CLIP features with another text
    length than 512, which diffusers counts on.
    """

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
        super().__init__(**_arguments(WanTransformer3DModel, self.config))
        self._convert()

    @classmethod
    def _class_for(cls, skyreels: bool) -> type[LatentTransformer]:
        return SkyReelsV2MLATransformer3DModel if skyreels else cls


class SkyReelsV2MLATransformer3DModel(LatentTransformer, SkyReelsV2Transformer3DModel):  # type: ignore[misc]
    """diffusers' `SkyReelsV2Transformer3DModel` with latent attention in the layers that `mla` lists.

    As `WanMLATransformer3DModel`. Frames are masked by blocks of `num_frame_per_block` latent frames, as diffusers'
    class does it and as its diffusion-forcing pipelines set it (`causal_block_size`): all blocks before a frame's own
    are seen, whatever window `streaming` has. Where blocks are single frames, the mask is that of `streaming`.

    With `inject_sample_info`, a frame-rate embedding, calls take `fps` as diffusers' class does: rows of it, 0 for 16
    frames a second and 1 for 24.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8192,
        num_layers: int = 32,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        inject_sample_info: bool = False,
        num_frame_per_block: int = 1,
        text_len: int = 512,
        streaming: dict[str, Any] | None = None,
        mla: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(**_arguments(SkyReelsV2Transformer3DModel, self.config))
        self._convert()


def _arguments(base: type[Any], config: Any) -> dict[str, Any]:
    """The part of `config` that is for diffusers' own class."""
    return {name: config[name] for name in inspect.signature(base.__init__).parameters if name in config}


# diffusers looks up the class that a config.json names among its own, and has no register for others.
for _class in (WanMLATransformer3DModel, SkyReelsV2MLATransformer3DModel):
    setattr(diffusers, _class.__name__, _class)
