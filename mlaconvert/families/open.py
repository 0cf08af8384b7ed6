"""Open a checkpoint and recognise its model: `open_checkpoint` is the one way in.

It reads names and shapes only; weights are read one at a time, by canonical name, whatever the file's layout.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlaconvert.errors import ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.causal import SETTINGS, Timing, is_causal_class, read_timing
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.classes import with_frame_rates
from mlaconvert.families.known import FAMILIES
from mlaconvert.families.merged import merge_loras
from mlaconvert.families.passengers import refuse_promises, some, sort_tensors
from mlaconvert.families.source import AnySource, Source, as_source
from mlaconvert.families.unknown import refuse_unknown_attention, refuse_unknown_blocks
from mlaconvert.families.wrappers import STREAMING_KEYS, left_out, unwrap
from mlaconvert.files.find import find_beside, open_store
from mlaconvert.files.inputs import read_json, read_yaml
from mlaconvert.files.names import EXPERT_FOLDERS
from mlaconvert.files.quantised import decode
from mlaconvert.files.store import TensorStore

# (what it is, class name in its config, a tensor name that gives it away, why it is refused).
_REFUSED = (
    ("a LoRA", r"$^", r"lora_(A|B|down|up)\b|lora\.(down|up)\.|[\w.]*\.(lokr|hada)_w", "merge it into its model first"),
    ("HunyuanVideo", r"H(unyuan|Y)_?Video", r"double_blocks\.\d+\.img_attn_(qkv|q)\.|context_embedder\.token_refiner\.|"
     r"txt_in\.individual_token_refiner\.", "its text and video see each other at every timestep, so it has no cache "
     "that could be made smaller (minWM's causal models of it have one, and are not converted); "
     "give HY-WorldPlay's autoregressive model"),
    ("LTX-Video", r"LTX", r"patchify_proj\.|time_embed\.emb\.timestep_embedder\.",
     "its rotary embedding spans all heads, so heads cannot share a rotary key"),
    ("CogVideoX", r"CogVideo", r"patch_embed\.text_proj\.|mixins\.patch_embed\.",
     "text and video share one attention stream, with a LayerNorm per head"),
    ("Mochi", r"Mochi", r"pos_frequencies$", "its rotary frequencies are learned per head"),
    ("a text encoder", r"T5|CLIP|TextModel", r"(encoder\.)?block\.0\.layer\.0\.SelfAttention\.|blocks\.0\.attn\.q\.|"
     r"token_embedding\.|text_model\.|vision_model\.|visual\.", "give the transformer's weights instead"),
    ("a VAE", r"Autoencoder|VAE", r"(decoder|encoder)\.(conv_in|conv1|middle|mid_block)\.", "give the transformer's "
     "weights instead"),
)  # fmt: skip


def open_checkpoint(source: AnySource) -> Checkpoint:
    """Open `source` (see `files.find.open_store`) and recognise its model, from names and shapes alone.

    with open_checkpoint("Wan-AI/Wan2.1-T2V-1.3B") as checkpoint:  # or a Source, which says more than a path
        print(checkpoint.describe(), checkpoint.config.num_layers)
        weight = checkpoint.read("blocks.0.self_attn.q.weight")  # [dim, dim], in the file's dtype

    A config.json that `source` names is used instead of the one beside the weights; of a YAML file it is how the model
    sees time. LoRAs are merged as weights are read. Raises CheckpointError for files that cannot be trusted or a LoRA
    that does not fit, UnsupportedModelError for models that are not converted, ConfigError for an impossible
    config.json; each names the file.
    """
    source = as_source(source)
    config, raw, settings = source.config, None, None
    if config is not None and config.suffix in (".yaml", ".yml"):
        settings = read_yaml(config)
        if not isinstance(settings, dict):
            raise ConfigError(f"{config}: it must hold a mapping of fields, such as num_frame_per_block")
    elif config is not None:
        raw = read_json(config)
    store = open_store(source.path, revision=source.revision, subfolder=source.subfolder)
    try:
        with _naming(store.path):
            checkpoint = _recognise(store, store.config if raw is None else raw, source.state_key, settings)
        return merge_loras(checkpoint, source.loras)
    except BaseException:
        store.close()
        raise


def opened(source: AnySource | Checkpoint) -> AbstractContextManager[Checkpoint]:
    """A checkpoint for the length of a `with`: `source` opened, or a checkpoint that is open already, and stays so."""
    return open_checkpoint(source) if isinstance(source, (Source, str, Path)) else nullcontext(source)


def _recognise(
    store: TensorStore, raw: dict[str, Any] | None, state_key: str | None, settings: dict[str, Any] | None
) -> Checkpoint:
    decode(store)
    key, cleaned = unwrap(store.tensors, state_key)
    beside = left_out(store.tensors, cleaned.values())
    family = next((family for family in FAMILIES if family.detect(raw, cleaned)), None)
    _refuse_known(raw or {}, cleaned, family.relative if family is not None else None)
    if family is None:
        refuse_unknown_blocks(store, cleaned, raw)
        raise UnsupportedModelError(
            f"its family is not known; found {some(cleaned)}; expected a transformer of "
            + " or ".join(f"{family.title} ({family.signs.patches}, ...)" for family in FAMILIES)
        )
    refuse_promises(str((raw or {}).get("model_type", "")), cleaned)
    layout = family.layout(cleaned)
    names: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for clean, raw_name in cleaned.items():
        canonical = family.canonical(clean, layout)
        if canonical is None:
            unknown[clean] = raw_name
        else:
            names[canonical] = raw_name
    refuse_unknown_attention(store, names, unknown, raw)
    tensors = {canonical: store.tensors[raw_name] for canonical, raw_name in names.items()}
    if views := family.reshaped(raw, tensors):
        store.present(views)
        tensors |= {name: store.tensors[info.name] for name, info in tensors.items() if info.name in views}
    parsed = family.parse_config(raw, tensors)
    own = family.timing(raw)
    timing = _timing(store, raw, key, settings) if own is None or settings else own
    timing = timing if own is None or timing is own else _filled(timing, own)
    parsed = replace(parsed, streaming=timing.streaming, few_step=timing.few_step)
    family.check_attention(parsed, tensors)
    passengers = sort_tensors(family, layout, family.expected_shapes(parsed), tensors, unknown, raw or {})
    if reason := family.reason_against(passengers.names, passengers.missing):
        raise UnsupportedModelError(f"{passengers.describe()}; {reason}")
    return Checkpoint(
        store=store,
        family=family,
        config=parsed,
        raw_config=with_frame_rates(raw, parsed) if raw is not None else family.raw_config(parsed),
        layout=layout,
        state_key=key,
        names=MappingProxyType(names | unknown),
        timing=timing,
        passengers=passengers,
        notes=(*_decoded(store), *([f"left out, beside the transformer: {', '.join(beside)}"] if beside else [])),
    )


def _decoded(store: TensorStore) -> list[str]:
    """The line on quantised weights; floats that a GGUF file holds as such stay what they are."""
    return [f"quantised weights ({store.decoded}): decoded to bfloat16 as they are read"] if store.decoded else []


def _timing(store: TensorStore, raw: dict[str, Any] | None, key: str | None, settings: dict[str, Any] | None) -> Timing:
    """What the files say of time: config.json, the key of the weights, a pipeline's class, a codebase's YAML."""
    student = re.split("[/.]", key or "")[0] in STREAMING_KEYS
    if settings is not None:
        own = {name: value for name, value in (raw or {}).items() if name in ("_class_name", "few_step")}
        return read_timing(own | settings, student=student, script=True, where="the YAML file of --config")
    index = find_beside(store, "model_index.json", above=EXPERT_FOLDERS[1]) if is_causal_class(raw) else None
    pipeline = ""
    with suppress(InputError):  # it is a hint only
        pipeline = str(read_json(index).get("_class_name", "")) if index is not None else ""
    return read_timing(raw, student=student, pipeline=pipeline)


def _filled(said: Timing, own: Timing) -> Timing:
    """What a YAML file says of time; what it leaves open is the family's `own`."""
    if said.streaming is None:
        return replace(own, few_step=said.few_step) if "streaming" in said.assumed else said
    left = {name: getattr(own.streaming, name) for name in said.assumed.intersection(SETTINGS)}
    return replace(said, streaming=replace(said.streaming, **left), remarks=(*said.remarks, *own.remarks))


def _refuse_known(raw: Mapping[str, Any], names: Collection[str], relative: str | None) -> None:
    """Raise UnsupportedModelError for a model that is known and not converted, by class name or telltale tensor.

    It is not taken for `relative`.
    """
    architectures = raw.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    classes = [str(name) for name in (raw.get("_class_name"), *listed) if name]
    for what, class_name, telltale, why in (row for row in _REFUSED if row[0] != relative):
        found = next((name for name in classes if re.search(class_name, name)), None)
        found = found or next((name for name in names if re.search(rf"(^|\.)({telltale})", name)), None)
        if found:
            expected = " or ".join(family.title for family in FAMILIES)
            raise UnsupportedModelError(
                f"this is {what} (found {found!r}), expected a transformer of {expected}; {why}"
            )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is wrong with its contents."""
    try:
        yield
    except InputError as error:
        named = type(error)(f"{path}: {error}")
        named.details = error.details
        raise named from None
