"""What training codebases wrap around a state dict's names, and how to take it off.

Streaming checkpoints nest the transformer under `generator_ema`, `generator` or `model`, beside a critic, and
FSDP, DDP, torch.compile and activation checkpointing each leave a marker in the names.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlaconvert.errors import CheckpointError

STATE_KEYS = ("generator_ema", "generator", "model", "")  # in order of preference; "" is a bare state dict
STREAMING_KEYS = ("generator_ema", "generator")
_ANYWHERE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LEADING = ("module.", "model.", "diffusion_model.")


def unwrap(names: Iterable[str], state_key: str | None = None) -> tuple[str | None, dict[str, str]]:
    """Choose one state dict among `names` ("key/tensor") and clean its names.

    Returns (the chosen key, None for a bare state dict; {clean name: raw name}). Raises CheckpointError for an
    unknown `state_key`, for several unknown ones without a choice, and when two names become the same.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    key = _choose(groups, state_key)
    cleaned: dict[str, str] = {}
    for raw in groups[key]:
        clean = _clean(raw.rpartition("/")[2])
        if clean in cleaned:
            raise CheckpointError(f"tensors {cleaned[clean]!r} and {raw!r} are both {clean!r} once unwrapped")
        cleaned[clean] = raw
    return key or None, cleaned


def _choose(groups: dict[str, list[str]], state_key: str | None) -> str:
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


def _clean(name: str) -> str:
    for marker in _ANYWHERE:
        name = name.replace(marker, "")
    for prefix in _LEADING:
        name = name.removeprefix(prefix)
    return name
