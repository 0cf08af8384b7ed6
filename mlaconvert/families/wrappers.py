"""What training codebases wrap around a state dict's names, and how to take it off.

Streaming checkpoints nest the transformer under `generator_ema`, `generator` or `model`, beside a critic, others under
`net`, `pipe.dit` or a prefix of their own, beside a text encoder and a VAE. FSDP, DDP, torch.compile and activation
checkpointing each leave a marker in the names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from mlaconvert.errors import CheckpointError
from mlaconvert.families.known import FAMILIES

STATE_KEYS = ("generator_ema", "generator", "model", "")  # in order of preference; "" is a bare state dict
STREAMING_KEYS = ("generator_ema", "generator")
_ANYWHERE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LEADING = ("module.", "model.", "diffusion_model.")
# What all-in-one files hold beside a transformer, by the first part of its names.
_BESIDE = re.compile(
    r"(text_encoders?|vae|first_stage_model|cond_stage_model|conditioner|clip(_vision)?|image_encoder)\."
)
_LONGEST = 40  # characters of a name's first part that are shown


def unwrap(names: Iterable[str], state_key: str | None = None) -> tuple[str | None, dict[str, str]]:
    """Choose one state dict among `names` ("key/tensor", or with any prefix) and clean its names.

    A transformer is found under any prefix that has a patch embedding and a first block below it. Returns (what to
    choose it by, None for a bare state dict; {clean name: raw name}). Raises CheckpointError for an unknown
    `state_key`, for several without a choice, and when two names become the same.
    """
    plain = {raw: _unmarked(raw) for raw in names}
    found = _transformers(plain.values())
    prefix = _choose_transformer(found, state_key)
    if prefix is None:
        groups = {clean.rpartition("/")[0] for clean in plain.values()}
        key = _choose(groups | set(found.values()), state_key)
        prefix = f"{key}/" if key else ""
        label = key
        inside = {raw: clean for raw, clean in plain.items() if clean.rpartition("/")[0] == key}
    else:
        label = found[prefix]
        others = tuple(other for other in found if other != prefix and other.startswith(prefix))
        inside = {
            raw: clean
            for raw, clean in plain.items()
            if clean.startswith(prefix) and not clean.startswith(others) and not _BESIDE.match(clean, len(prefix))
        }
    cleaned: dict[str, str] = {}
    for raw, name in inside.items():
        clean = name[len(prefix) :] if prefix.endswith(".") else _clean(name[len(prefix) :])
        if clean in cleaned:
            raise CheckpointError(f"tensors {cleaned[clean]!r} and {raw!r} are both {clean!r} once unwrapped")
        cleaned[clean] = raw
    return label or None, cleaned


def left_out(names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """What lies beside the `chosen` raw names in their state dict: the first parts of its names, each once."""
    taken = set(chosen)
    groups = {name.rpartition("/")[0] for name in taken}
    beside = (name for name in names if name not in taken and name.rpartition("/")[0] in groups)
    return list(dict.fromkeys(_unmarked(name).rpartition("/")[2].split(".")[0][:_LONGEST] for name in beside))


def _transformers(names: Iterable[str]) -> dict[str, str]:
    """Prefixes of names below which a transformer of a known family lies -> what a user chooses it by."""
    listed = list(names)
    found = sorted(
        {
            prefix
            for signs in (family.signs for family in FAMILIES)
            for prefix in (name.removesuffix(signs.patches) for name in listed if name.endswith(signs.patches))
            if (not prefix or prefix[-1] in "./") and signs.below(prefix, listed)
        }
    )
    short = {prefix: _label(prefix) for prefix in found}
    count = Counter(short.values())
    return {prefix: label if count[label] == 1 else prefix.rstrip("./") for prefix, label in short.items()}


def _label(prefix: str) -> str:
    """A prefix without the wrappers at its end that are the same in many files."""
    while leading := next((one for one in _LEADING if prefix == one or prefix.endswith((f".{one}", f"/{one}"))), None):
        prefix = prefix.removesuffix(leading)
    return prefix.rstrip("./")


def _choose_transformer(found: Mapping[str, str], state_key: str | None) -> str | None:
    """The prefix to take; None when none of `found` is meant. Raises CheckpointError when several are."""
    if state_key is not None:
        exact = [prefix for prefix, label in found.items() if state_key and label == state_key]
        below = [p for p, label in found.items() if state_key and label.startswith((f"{state_key}/", f"{state_key}."))]
        left = exact or below
    else:
        ranks = {prefix: _rank(prefix) for prefix in found}
        left = [prefix for prefix, rank in ranks.items() if rank == min(ranks.values())]
    if len(left) > 1:
        labels = sorted(found[prefix] for prefix in left)
        raise CheckpointError(
            f"which state dict is the model? Choose with --state-key; there: {', '.join(map(repr, labels))}"
        )
    return left[0] if left else None


def _rank(prefix: str) -> int:
    """The order in which transformers are preferred: that of the pickles' keys, of joined names by the first part."""
    key = prefix.partition("/")[0] if "/" in prefix else prefix.partition(".")[0]
    known = STATE_KEYS if "/" in prefix or not prefix else STREAMING_KEYS
    return known.index(key) if key in known else len(STATE_KEYS)


def _choose(groups: Collection[str], state_key: str | None) -> str:
    found = ", ".join(repr(key) for key in sorted(groups) if key) or "none: its state dict is bare"
    if state_key is not None:
        if state_key not in groups or not state_key:
            raise CheckpointError(f"there is no state key {state_key!r}; there: {found}")
        return state_key
    chosen = next((key for key in STATE_KEYS if key in groups), None)
    if chosen is None and len(groups) == 1:
        chosen = next(iter(groups))
    if chosen is None:
        raise CheckpointError(f"which state dict is the model? Choose with --state-key; there: {found}")
    return chosen


def _unmarked(name: str) -> str:
    for marker in _ANYWHERE:
        name = name.replace(marker, "")
    return name


def _clean(name: str) -> str:
    for prefix in _LEADING:
        name = name.removeprefix(prefix)
    return name
