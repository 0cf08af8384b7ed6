"""The configuration of a LoRA, which alone may know its alpha: PEFT's adapter_config.json, or a file's metadata.

Names of modules are those of the LoRA file, without the prefixes that PEFT puts before them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mlaconvert.errors import CheckpointError
from mlaconvert.files.inputs import is_file, parse_json, read_json
from mlaconvert.files.names import is_safetensors

PEFT_CONFIG = "adapter_config.json"
PEFT_STEM = "adapter_model"  # of the file that has one beside it
_ALPHA = {"LORA": "lora_alpha"}  # other kinds of adapters call it alpha
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the adapter's configuration in a safetensors header


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fields of a LoRA's configuration; none where nothing says any.

    `file` is the adapter_config.json that they are of, if they are of one, `misfit` why one that lies beside the LoRA
    was not taken.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    misfit: str | None = None
    kind: str = "LORA"

    def alpha(self, module: str) -> Any:
        """Alpha of `module`, as it stands there; None when it is not said."""
        return _of_module(self.fields, _ALPHA.get(self.kind, "alpha"), "alpha_pattern", module)

    def rank(self, module: str) -> int | None:
        """The rank of `module`'s factors; None when it is not said."""
        found = _of_module(self.fields, "r", "rank_pattern", module)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def stabilised(self) -> bool:
        """Whether changes are scaled by alpha / sqrt(r), as rsLoRA does (arXiv 2312.03732)."""
        return bool(self.fields.get("use_rslora"))


def find_config(file: Path, ranks: Mapping[str, int | None], kinds: Collection[str] = ("LORA",)) -> AdapterConfig:
    """The configuration of the LoRA in `file`, whose factors of each module have these `ranks`, None for none.

    `kinds` are PEFT's names of what it is; one that is several has no configuration of PEFT's.
    A file named by PEFT (adapter_model) has its adapter_config.json beside it. In one of another name the metadata
    counts, then an adapter_config.json beside it that fits: of the same rank and modules. Raises CheckpointError for a
    configuration whose patterns cannot be read, and for PEFT's own file without one, or with another's.
    """
    kind = next(iter(kinds)) if len(kinds) == 1 else "LORA"
    beside = file.parent / PEFT_CONFIG
    if not is_file(beside):  # a link is a name like any other: its own folder first, then the file's
        beside = file.resolve().parent / PEFT_CONFIG
    if file.stem == PEFT_STEM:
        if not is_file(beside):
            raise CheckpointError(f"{file}: {PEFT_CONFIG} is missing beside it, which has its alpha; get that file too")
        fields = read_json(beside)
        if reason := _misfit(fields, ranks, kind, own=True):
            raise CheckpointError(f"{beside}: {reason}; get the adapter's own file")
        return AdapterConfig(fields=fields, file=beside, kind=kind)
    fields = _metadata(file) if is_safetensors(file.name) else {}
    if "lora_alpha" in fields or not is_file(beside):
        return AdapterConfig(fields=fields)
    try:
        found = read_json(beside)
    except CheckpointError:
        return AdapterConfig(fields=fields, misfit="it is not readable")
    if reason := _misfit(found, ranks, kind, own=False):
        return AdapterConfig(fields=fields, misfit=reason)
    return AdapterConfig(fields=found, file=beside, kind=kind)


def _metadata(file: Path) -> dict[str, Any]:
    with safe_open(str(file), framework="pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        data = parse_json(text)
        return {name.removeprefix("transformer."): value for name, value in data.items()}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: its metadata {_METADATA} is not readable JSON; save the LoRA again") from None


def _misfit(fields: Mapping[str, Any], ranks: Mapping[str, int | None], kind: str, *, own: bool) -> str | None:
    """Why these fields are not those of factors of these ranks, None if they can be; `own` ones may say less."""
    if fields.get("peft_type", "LORA") != kind:
        return f"it is of {fields.get('peft_type', 'LORA')!r}, not of {'a LoRA' if kind == 'LORA' else kind}"
    if fields.get(_ALPHA.get(kind, "alpha")) is None:
        return f"it has no {_ALPHA.get(kind, 'alpha')}"
    targets = fields.get("target_modules")
    for module, rank in ranks.items():
        said = _of_module(fields, "r", "rank_pattern", module)
        if rank is not None and said != rank and not (own and said is None):
            return f"its r is {said!r}, and {module!r} has rank {rank}"
        # A text is a regular expression, which is not run here.
        if isinstance(targets, list) and not own and not any(_same_end(module, str(target)) for target in targets):
            return f"{module!r} is none of its target_modules"
    return None


def _of_module(fields: Mapping[str, Any], name: str, pattern: str, module: str) -> Any:
    """A field's value for a module: that of the first pattern which its name ends with, else that for all."""
    return next((value for key, value in _patterns(fields, pattern) if _ends_with(module, key)), fields.get(name))


def _same_end(one: str, other: str) -> bool:
    return _ends_with(one, other) or _ends_with(other, one)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _patterns(fields: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """A pattern field: modules with a value of their own, by the end of their names."""
    patterns = fields.get(name) or {}
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise CheckpointError(f"{PEFT_CONFIG}: {name} {key!r} is no module name; merge the LoRA with PEFT")
        yield plain.removeprefix("base_model.model."), value
