"""The model card of a converted model, written from what its folder records about itself.

A generated card ends in a comment with the hash of the text before it. Whoever changes a word changes the hash, and a
card that is not as generated is never replaced by a generated one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from mlaconvert import __version__
from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.readme import CONVERTED, UNTRAINED
from mlaconvert.evaluation import figures
from mlaconvert.evaluation.lines import has_clean_past
from mlaconvert.evaluation.verdict import judge
from mlaconvert.families.known import family_of
from mlaconvert.files.origin import origin_of
from mlaconvert.healing.readme import HEALED
from mlaconvert.reports.evaluation_tables import PASTS
from mlaconvert.reports.usage import usage_code

_SEAL = "<!-- mlaconvert wrote this card. Edit it freely: an edited card is kept. sha256: {} -->\n"
# The README.md that `convert` leaves in a folder, and what `heal` adds at each stage, whatever the figures.
_STUB = re.compile(f"{CONVERTED.pattern}(?:{re.escape(UNTRAINED)})?(?:{HEALED.pattern})*\n")
_TAGS = ("multi-head-latent-attention", "mla", "kv-cache", "video-diffusion")
_CONDITIONS = ("teacher", "data", "conditions", "versions")
_LONGEST_LIST = 16  # longer ones are curves, which the JSON files keep


@dataclass(frozen=True, kw_only=True)
class CardModel:
    """One model of a folder: its subfolder ("" for the only one), geometry, and JSON records ({} where missing).

    `evaluation` is evaluation.json with one entry under "models". `passengers` says what of the model the code here
    does not know, "" for one that it runs.
    """

    subfolder: str
    config: WanConfig
    description: str
    conversion: Mapping[str, Any]
    healing: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    passengers: str = ""

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """The healing stages, oldest first: each has its recipe, and its teacher and what was written where known."""
        before = self.healing.get("before")
        every = [*(before if isinstance(before, list) else ()), self.healing]
        return [stage for stage in every if isinstance(stage, Mapping) and isinstance(stage.get("recipe"), Mapping)]

    @property
    def figures(self) -> Mapping[str, Any]:
        """This model's entry in evaluation.json, {} without exactly one."""
        entries = figures.entries(self.evaluation)
        return entries[0] if len(entries) == 1 else {}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. `license` holds the Hub's fields: license, and license_name and license_link for others."""

    repo: str
    models: tuple[CardModel, ...]
    base_model: str | None
    license: Mapping[str, str]


def is_generated(text: str) -> bool:
    """Whether a README.md is one that mlaconvert wrote and nobody edited."""
    body, mark, _ = text.rpartition(_SEAL.split("{}", maxsplit=1)[0])
    return bool(mark and text == _sealed(body)) or _STUB.fullmatch(text) is not None


def write_card(facts: CardFacts) -> str:
    """The card as Markdown under YAML metadata. The same facts give the same text."""
    first = facts.models[0]
    metadata = ModelCardData(
        base_model=facts.base_model,
        # The Hub knows adapter, merge, quantized and finetune; new weights at full precision are the last.
        base_model_relation="finetune" if facts.base_model else None,
        library_name="mlaconvert",
        pipeline_tag="image-to-video" if first.config.model_type.startswith("i2v") else "text-to-video",
        tags=[*_TAGS, family_of(first.config).name],
        license=facts.license.get("license"),
        license_name=facts.license.get("license_name"),
        license_link=facts.license.get("license_link"),
    )
    sections = (
        f"---\n{metadata.to_yaml()}\n---",
        f"# {facts.repo.split('/')[-1]}",
        _introduction(facts),
        "## The model\n\n" + "\n\n".join(_geometry(model) for model in facts.models),
        "## Figures\n\n" + "\n\n".join(_figures(model) for model in facts.models),
        "## How it was made\n\n" + "\n\n".join(_making(model) for model in facts.models),
        "## Use it\n\n" + _usage(facts),
        "## Known limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(facts)),
    )
    return _sealed("\n\n".join(sections) + "\n\n")


def _sealed(body: str) -> str:
    return body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside a JSON record, {} when it is missing or something else."""
    section = data.get(name)
    return section if isinstance(section, Mapping) else {}


def _inline(value: Any) -> str:
    """`value` in one line of Markdown that shows it and nothing else."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(str(value).split()))


def _fenced(data: Any) -> str:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    return f"```yaml\n{text}```"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _family(model: CardModel) -> str:
    return family_of(model.config).title


def _titled(model: CardModel, text: str) -> str:
    return f"### {_inline(model.subfolder)}\n\n{text}" if model.subfolder else text


def _introduction(facts: CardFacts) -> str:
    first = facts.models[0]
    name = facts.base_model or _inline(origin_of(first.conversion).name or f"a {_family(first)}-family model")
    source = f"[{name}](https://huggingface.co/{name})" if facts.base_model else name
    healed = any(model.healing for model in facts.models)
    cached, dense = first.config.cache_words
    trained = "then healed by training" if healed else "not trained since"
    return (
        f"{source} with Multi-Head Latent Attention: a token caches {cached} instead of {dense} "
        f"({100 * (1 - first.config.cache_share):.1f}% less). Converted by "
        f"mlaconvert {_inline(first.conversion.get('mlaconvert', __version__))}, {trained}."
    )


def _geometry(model: CardModel) -> str:
    config, mla = model.config, model.config.mla
    layers = [layer for layer in mla.layers if layer is not None] if mla else []
    streaming = config.streaming
    sees = (
        f"streaming: chunks of {streaming.chunk_frames} latent frames, a window of {streaming.window_frames} "
        f"with {streaming.sink_frames} of them a sink"
        if streaming
        else "bidirectional: all frames at once"
    )

    def spread(values: Sequence[int]) -> str:
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low} to {high}"

    shared = f"one of {spread([layer.qk_rope_head_dim for layer in layers])} scalars for all heads of a layer"
    rotary = {
        "cached": f"{shared}, cached beside the latent",
        "latent": f"{shared}, read from the latent",
        "head": "each head's own content keys, turned by all rotary pairs",
    }
    presents = {
        "exact": "exact: a chunk sees itself through the source's own keys and values, and its past through latents",
        "latent": "latent: a chunk sees itself through its latents, as it is cached",
    }
    cached = f"{spread(config.cached_scalars())} scalars, dense {config.dense_scalars}"
    if mla and mla.counts_bits:
        bits = [bits for layer in layers for bits in layer.scalar_bits]
        cached = (
            f"{spread(config.cached_bytes(2))} bytes, {spread(bits)} bits a channel; dense {2 * config.dense_scalars} "
            "bytes in bfloat16"
        )
    norms = "one more scalar" if config.norms_per_key == 1 else f"{config.norms_per_key} more scalars"
    rows = [
        ("", ""),
        ("architecture", _inline(model.description)),
        ("converted layers", f"{len(layers)} of {config.num_layers}"),
        ("latent, a layer", f"{spread([layer.kv_lora_rank for layer in layers])} channels"),
        ("rotary key", rotary[mla.rope] if mla else ""),
        ("cached for a token, a layer", cached),
        ("queries", "exact" if mla and mla.q_lora_rank is None else f"latent of {mla.q_lora_rank if mla else 0}"),
        ("key norm", f"exact, {norms} a token" if mla and mla.key_norm == "token" else "RMSNorm on the latent"),
        ("present", presents[mla.present] if mla else ""),
        ("sees time", sees),
    ]
    return _titled(model, _table(rows))


def _figures(model: CardModel) -> str:
    if not model.figures:
        text = "None yet: the folder holds no results of `mlaconvert evaluate`, so nothing is known about its quality."
        return _titled(model, text)
    rows = [tuple(map(_inline, row.cells)) for row in figures.rows([model.figures], "card")]
    if not rows:
        return _titled(model, "`evaluation.json` has the results of `mlaconvert evaluate`.")
    conditions = {name: model.evaluation[name] for name in _CONDITIONS if model.evaluation.get(name)}
    verdict = judge(model.figures, model.conversion, model.healing)
    text = f"{_table([('', 'teacher', 'this model'), *rows])}\n\n{_inline(verdict.text)}\n\n"
    text += "The teacher is the model that this one was converted from. "
    if any("*" in teacher for _, teacher, *_ in rows):
        text += "\\* A rollout of the teacher from another noise: two rollouts part by chaos alone. "
    if has_clean_past(model.figures):
        text += " ".join(PASTS) + " "
    text += "`evaluation.json` has all results of `mlaconvert evaluate`"
    if conditions:
        text += f", which ran under these conditions:\n\n{_fenced(without_curves(conditions))}"
    else:
        text += "."
    return _titled(model, text)


def without_curves(value: Any) -> Any:
    """Plain data without its curves: lists of more than 16 items become their length."""
    if isinstance(value, Mapping):
        return {str(key): without_curves(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_curves(item) for item in value] if len(value) <= _LONGEST_LIST else f"{len(value)} values"
    return value


def _making(model: CardModel) -> str:
    origin, recipe = origin_of(model.conversion), _section(model.conversion, "recipe")
    if not recipe:
        return _titled(model, "The folder holds no conversion.json, so its recipe is not known.")
    # What is None took the model's own value, and takes it again.
    settings = {name: value for name, value in recipe.items() if value is not None}
    name, inside = origin.name or "CHECKPOINT", origin.subfolder
    where = f"`{name}`, folder `{inside}`" if inside else f"`{name}`"
    records = origin.loras if isinstance(origin.loras, list) else []
    loras = [record for record in records if isinstance(record, Mapping)]
    merged = "".join(f" --lora {lora.get('name')} --lora-scale {lora.get('scale')}" for lora in loras)
    parts = [
        f"Converted from {where} by `mlaconvert convert {name} -o DIR --recipe recipe.yaml"
        f"{f' --subfolder {inside}' if inside else ''}{merged}` with this recipe.yaml:",
        _fenced(settings),
    ]
    if origin.sha256:
        parts.append(f"SHA-256 of the source's weight files, in order of their names: `{origin.sha256}`")
    parts += [f"SHA-256 of the LoRA {_inline(lora.get('name'))}: `{lora.get('sha256')}`" for lora in loras]
    for stage in model.stages:
        settings = {name: value for name, value in stage["recipe"].items() if value is not None}
        written = _section(stage, "written")
        parts += [
            f"Then healed by `mlaconvert heal`, teacher {_inline(stage.get('teacher', 'not recorded'))}, the weights "
            f"of step {_inline(written.get('step', 'unknown'))}, with this recipe (`healing.json` has the curves):",
            _fenced(settings),
        ]
    return _titled(model, "\n\n".join(parts))


def _usage(facts: CardFacts) -> str:
    model = facts.models[0]
    if model.passengers and not isinstance(model.config, CameraConfig):
        return (
            f"It runs in its own code, which knows all of it ({model.passengers}), with mlaconvert {__version__} or "
            f"later beside it: load the dense model there, then\n\n```python\nfrom mlaconvert import swap_attention\n\n"
            f"swap_attention(pipeline, {facts.repo!r})\n```"
        )
    config = model.config
    python = usage_code(facts.repo, model.subfolder, config)
    others = [f"`{other.subfolder}`" for other in facts.models[1:]]
    again = ""
    if facts.base_model and config.in_dim == config.out_dim and config.image_dim is None:
        flag = f" --subfolder {model.subfolder}" if model.subfolder else ""
        again = f" `mlaconvert evaluate {facts.repo}{flag}` measures it again beside its teacher."
    both = f"\n\nThe other expert is the subfolder {', '.join(others)}." if others else ""
    return (
        f"With mlaconvert {__version__} or later installed:\n\n```python\n{python}\n```{both}\n\n"
        f"```bash\nmlaconvert analyze {facts.repo}\n```\n\nshows what its layers cache and how full their latents are."
        f"{again}"
    )


def _limits(facts: CardFacts) -> list[str]:
    first = facts.models[0]
    limits = []
    if not any(model.healing for model in facts.models):
        limits.append(
            "A conversion alone loses quality, and this one has not been trained since; see the figures above."
        )
    if not first.figures:
        limits.append("It has not been evaluated against its teacher.")
    limits.append("It maps latents and text embeddings to latents: VAE and text encoder are the base model's.")
    if first.config.streaming is None:
        limits.append(
            "It sees all frames at once, so the smaller cache only pays off once it is run chunk by chunk, which it "
            "has not been trained for."
        )
    elif isinstance(first.config, CameraConfig):
        limits.append("It generates causally, chunk by chunk, and sees of the past what it is given with each chunk.")
    else:
        limits.append(
            "It generates causally, chunk by chunk, and remembers what its window holds; what leaves the window is "
            "forgotten but for the sink."
        )
    limits.append(
        f"Libraries that do not know Multi-Head Latent Attention in {_family(first)} models cannot load its weights."
    )
    limits.append(
        "What the base model cannot do or does wrong, this one does too"
        + ("." if facts.license else "; no licence is known for it, so ask its authors before you use it.")
    )
    return limits
