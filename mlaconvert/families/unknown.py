"""Wan models whose attention has names that are not known here, such as the checkpoints of VideoMLA's own code.

Its paper names matrices, not tensors, and shapes alone do not tell the order of rows. So nothing is read, and what is
there is listed, folded, to be sent on in one paste.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import mlaconvert
from mlaconvert.errors import UnknownLayoutError
from mlaconvert.families.passengers import some
from mlaconvert.files.headers import DTYPE_NAMES, TensorInfo
from mlaconvert.files.store import TensorStore

_SELF_ATTENTION = re.compile(r"blocks\.(\d+)\.(self_attn|attn1)\.")
_WANS_OWN = re.compile(r"blocks\.\d+\.self_attn\.([qkvo]|norm_[qk])\.(weight|bias)")
_NUMBERED = re.compile(r"(.*?\bblocks\.)([0-9]{1,6})(\..+)")
_MOST_LINES = 400


def refuse_unknown_attention(
    store: TensorStore, names: Collection[str], unknown: Collection[str], raw_config: Mapping[str, Any] | None
) -> None:
    """Raise UnknownLayoutError where no block has Wan's keys and values and each has something else in their place.

    `names` are canonical, `unknown` are those that mean nothing to the family. A config.json with a section `mla`
    says itself what its layers hold.
    """
    if (raw_config or {}).get("mla") is not None:
        return
    wans = [name for name in names if _WANS_OWN.fullmatch(name)]
    if any(re.search(r"\.[kv]\.weight$", name) for name in wans):
        return
    others = [name for name in (*unknown, *names) if _SELF_ATTENTION.match(name) and name not in wans]
    blocks = {match[1] for name in (*unknown, *names) if (match := re.match(r"blocks\.(\d+)\.", name))}
    if others and {match[1] for name in others if (match := _SELF_ATTENTION.match(name))} == blocks:
        _refuse(
            store,
            raw_config,
            "its self-attention differs from Wan's: no keys and values by Wan's names, and in their place "
            f"{len(others)} tensors that are not known ({some(others)})"
            + ("" if unknown else "; a model that mlaconvert converted needs the config.json of its folder"),
        )


def refuse_unknown_blocks(store: TensorStore, names: Collection[str], raw_config: Mapping[str, Any] | None) -> None:
    """Raise UnknownLayoutError for a model with Wan's patch embedding whose blocks hold no self-attention by name."""
    blocks = [name for name in names if re.match(r"blocks\.\d+\.", name)]
    if "patch_embedding.weight" in names and blocks:
        _refuse(
            store,
            raw_config,
            "its family is not known: Wan's patch embedding, and blocks without self-attention by name "
            f"({some(blocks)})",
        )


def _refuse(store: TensorStore, raw_config: Mapping[str, Any] | None, what: str) -> NoReturn:
    error = UnknownLayoutError(
        f"{what}; nothing was read. Please open an issue with the list that mlaconvert analyze prints of it, which has "
        "no weights in it, so that such files can be read; until then convert the dense model that it was made from"
    )
    sizes = {name: value for name, value in (raw_config or {}).items() if isinstance(value, (bool, int, float))}
    error.details = (
        f"mlaconvert {mlaconvert.__version__}: {len(store.tensors)} tensors in {store.path.name}; "
        f"numbers in its config.json: {sizes or 'none'}",
        *list_tensors(store.tensors.values()),
    )
    raise error


def list_tensors(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Name, dtype and shape of each tensor on a line, as safetensors names dtypes.

    What differs only in the number of its block is folded, "model.blocks.{0..29}.norm3.bias  BF16 [1536]", and then
    what differs only in the state dict that it is in, "{generator,generator_ema}/model. ...". At most 400 lines.
    """
    numbers: dict[tuple[str, str, str, str], list[int]] = {}  # state dict, before and after the number, the rest
    for info in tensors:
        key, slash, name = info.name.rpartition("/")
        match = _NUMBERED.fullmatch(name)
        before, number, after = match.groups() if match else (name, "0", "")
        rest = f"{DTYPE_NAMES.get(info.dtype, str(info.dtype))} {list(info.shape)}"
        numbers.setdefault((key + slash, before, after, rest), []).append(int(number))
    keys: dict[tuple[str, str, str], list[str]] = {}
    for (key, before, after, rest), found in numbers.items():
        name = f"{before}{_ranges(found)}{after}" if after else before
        keys.setdefault((name, rest, "/" if key else ""), []).append(key.removesuffix("/"))
    lines = [f"{_braced(found)}{slash}{name}  {rest}" for (name, rest, slash), found in keys.items()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"and {len(lines) - _MOST_LINES + 1} lines more"]
    return tuple(lines)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as "{0..13,15..29}"; one alone without braces."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return _braced([str(first) if first == last else f"{first}..{last}" for first, last in runs])


def _braced(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 and ".." not in parts[0] else "{" + ",".join(parts) + "}"
