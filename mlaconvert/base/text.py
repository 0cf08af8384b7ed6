"""Prompts to text embeddings, by the umT5 encoder of a base repository.

Wan's conventions: text is cleaned (ftfy, HTML entities, white space), at most 512 tokens, in bfloat16; the transformer
sees zeros after the last token.
"""

from __future__ import annotations

import gc
import html
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.base.repository import Base, damaged, require
from mlaconvert.errors import CheckpointError, MLAConvertError
from mlaconvert.files.find import open_store
from mlaconvert.files.store import TensorStore

TEXT_LEN = 512
_NATIVE_NAMES = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)


def clean(text: str) -> str:
    """Text as Wan's encoder is given it: mended Unicode, no HTML entities, single spaces."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def embed_texts(
    base: Base, texts: Sequence[str], *, device: str = "cpu", max_tokens: int = TEXT_LEN
) -> Iterator[Tensor]:
    """The embedding [tokens, text_dim] of each text, bfloat16 on the CPU, without padding; an end token counts.

    The encoder is loaded for the first one and freed with the iterator. Text beyond `max_tokens` is cut off. Raises
    InputError without the packages that it needs, CheckpointError for files that cannot be read.
    """
    require("transformers", "ftfy")
    if not texts:
        return
    path, folder = base.text()
    with _quiet():
        tokenizer = _load_tokenizer(folder)
        encoder = _load_encoder(path, device)
    try:
        for text in texts:
            tokens = tokenizer([clean(text)], truncation=True, max_length=max_tokens, return_tensors="pt")
            with torch.inference_mode():
                hidden = encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
            yield hidden[0].to("cpu", torch.bfloat16).clone()
    finally:
        del encoder
        free_memory()


def free_memory() -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and notes of a library's own on the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each kind of damage raises its own
        raise damaged(folder, "a tokenizer", error) from None


def _load_encoder(path: Path, device: str) -> Any:
    """The encoder in bfloat16, as Wan runs it, from a folder or from the native file."""
    from transformers import UMT5EncoderModel

    try:
        if path.is_file():
            encoder = _from_native(path)
        else:
            encoder = UMT5EncoderModel.from_pretrained(
                path, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
            )
        return encoder.eval().requires_grad_(False).to(device)
    except MLAConvertError:
        raise
    except torch.OutOfMemoryError:
        raise MLAConvertError(
            f"the text encoder does not fit on {device}; run it elsewhere with --text-device cpu"
        ) from None
    except Exception as error:
        raise damaged(path, "a umT5 text encoder", error) from None


def _from_native(path: Path) -> Any:
    """transformers' encoder with the weights of Wan's own file, its geometry from their shapes."""
    from transformers import UMT5Config, UMT5EncoderModel

    with open_store(path) as store:
        vocabulary, width = _shape(store, "token_embedding.weight")
        buckets, heads = _shape(store, "blocks.0.pos_embedding.embedding.weight")
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=_shape(store, "blocks.0.attn.q.weight")[0] // heads,
            d_ff=_shape(store, "blocks.0.ffn.fc1.weight")[0],
            num_layers=1 + max(int(n.split(".")[1]) for n in store.tensors if n.startswith("blocks.")),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
        with torch.device("meta"):
            encoder = UMT5EncoderModel(config)
        state = {_hf_name(name): store.read(name).to(torch.bfloat16) for name in store.tensors}
        encoder.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
        encoder.tie_weights()
    return encoder


def _hf_name(name: str) -> str:
    for native, ours in _NATIVE_NAMES:
        if re.fullmatch(native, name):
            return re.sub(native, ours, name)
    return name


def _shape(store: TensorStore, name: str) -> tuple[int, ...]:
    if name not in store.tensors:
        raise CheckpointError(f"{store.path}: no tensor {name!r}, so it is no umT5 encoder of Wan; get an intact copy")
    return store.tensors[name].shape
