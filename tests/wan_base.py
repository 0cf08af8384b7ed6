"""Small base repositories in the published layouts, with random weights: umT5 encoder, tokenizer, Wan VAE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "cat", "and", "dog", "in", "the", "snow", "&", "walks", "slowly", "red", "blue", "sea", "at", "night"]
TEXT_DIM = 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and single letters, with T5's end token after every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS] + [(c, -9.0) for c in "▁abcdefghijklmnopqrstuvwxyzé!"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_encoder(text_dim: int = TEXT_DIM) -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=64, d_model=text_dim, d_kv=6, d_ff=28, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.2 if p.ndim == 2 else 0.1) + ("norm" in name))
    return encoder


def make_vae(**config: Any) -> Any:
    """A VAE of random weights, whose output fills [-1, 1]."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(2)
    vae = AutoencoderKLWan(**{"base_dim": 3, "z_dim": 16} | config).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if "decoder.conv_out" in name:
            p.mul_(3)
    return vae


def save_base(folder: Path, *, text_dim: int = TEXT_DIM, **vae: Any) -> Path:
    """A base repository in diffusers layout."""
    make_tokenizer().save_pretrained(folder / "tokenizer")
    make_encoder(text_dim).save_pretrained(folder / "text_encoder")
    make_vae(**vae).save_pretrained(folder / "vae")
    return folder


def native_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' umT5 state in the names of Wan's own file."""
    names = {
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "encoder.final_layer_norm": "norm",
        "shared": "token_embedding",
    }
    found = {}
    for name, tensor in state.items():
        if name == "encoder.embed_tokens.weight":
            continue
        new = re.sub(r"^encoder\.block\.", "blocks.", name)
        for old, other in names.items():
            new = new.replace(old, other)
        found[new] = tensor
    return found


def native_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' state of a Wan2.1 VAE in the names of Wan's own file."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    ends = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
    found = {}
    for name, tensor in state.items():
        new = {"quant_conv": "conv1", "post_quant_conv": "conv2"}.get(name.split(".")[0])
        if new is not None:
            found[f"{new}.{name.split('.')[1]}"] = tensor
            continue
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
        new = new.replace("mid_block.attentions.0", "middle.1").replace("encoder.down_blocks", "encoder.downsamples")
        # Three residual blocks and a resampler a level, one after the other.
        new = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", new)
        parts = new.split(".")
        parts = [residual.get(part, ends.get(part, "shortcut" if part == "conv_shortcut" else part)) for part in parts]
        found[".".join(parts)] = tensor
    return found
