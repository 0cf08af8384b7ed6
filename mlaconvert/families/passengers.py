"""What a Wan-family model has beside or instead of a Wan transformer's tensors, as world models and control models do.

A conversion replaces self-attention alone. Where that is Wan's, all else can be anything: it is carried along.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlaconvert.errors import UnsupportedModelError
from mlaconvert.families.protocol import Family, Layout
from mlaconvert.files.headers import FLOATS, TensorInfo

_BLOCK = re.compile(r"^(?:double_)?blocks\.(\d+)\.")
_ATTENTION = re.compile(r"blocks\.[^.]*\.(self_attn|attn1)([._]|$)")
_CROSS_ATTENTION = re.compile(r"blocks\.\d+\.cross_attn\.")
# Of attention that is not Wan's: (in a tensor's name, what it is).
_OTHER_ATTENTION = (
    (r"\.to_gate_compress\.", "a model with sparse attention and a gate (FastWan, VSA)"),
    (r"\.proj_l\.", "a model with sparse-linear attention (SLA, TurboDiffusion)"),
    (r"_mot_|\.mot\.", "a model whose attention is joint with a second set of blocks (Video-As-Prompt)"),
    (r"prope(_|\b)", "a model whose attention also turns by cameras (PRoPE)"),
    (r"\.(self_attn|attn1)\.(add_[qkv]_proj|norm_added_[qk]|to_add_out)\.", "a model with joint attention to the text"),
    (r"\.(self_attn|attn1)\.(gate|to_gate)", "a model with gated attention"),
)
# (in a tensor's name, what it is of), for the line that tells what is carried along.
_KNOWN = (
    (r"(^|\.)vace_", "VACE's control blocks"),
    (r"^img_emb\.emb_pos|image_embedder\.pos_embed", "the positions of a first and a last frame (FLF2V)"),
    (r"^fps_(embedding|projection)", "a frame-rate embedding (SkyReels-V2)"),
    (r"^(motion_encoder|face_encoder|face_adapter|pose_patch_embedding)", "Animate's motion and face branches"),
    (r"^(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask|frame_packer)", "S2V's audio branch"),
    (r"^control_adapter", "camera control (Wan Fun)"),
    (r"^ref_conv", "a reference image (Wan Fun)"),
    (r"^audio_proj|\.audio_cross_attn", "an audio branch"),
    (r"\.action_model", "action modules"),
    (r"(^|\.)(action|state)_(encoder|decoder|embed)", "actions and states of a robot"),
    (r"\.(cam_encoder|projector)\.", "a camera encoder (ReCamMaster)"),
    (r"(^|\.)(cam_|camera_|c2ws_|patch_embedding_wancamctrl)", "camera injectors"),
    (r"delta_embedder", "the embedding of a second time (AnyFlow)"),
)
# model_type of a config.json -> the name that one of its tensors has.
_PROMISED = {"vace": r"vace_", "flf2v": r"emb_pos|pos_embed", "animate": r"^motion_encoder", "s2v": r"audio"}
# Fields of a config.json that say whether there are modules of these names.
_STATED = {"cross_attn_norm": ("norm3",), "image_dim": ("img_emb", "k_img", "v_img", "norm_k_img")}
# Fields that promise modules; what a field denies is a passenger.
_PROMISING = {"inject_sample_info": ("fps_embedding", "fps_projection"), "add_ref_conv": ("ref_conv",)}
_LONGEST = 40  # characters of a module's name that are shown
_TIME = re.compile(r"time_embedding\.|time_projection\.|blocks\.\d+\.modulation$")


@dataclass(frozen=True, kw_only=True)
class Passengers:
    """What a model has beyond a Wan transformer.

    `names` are tensors that are carried along: unknown ones, by their unwrapped name in the file, and known ones of
    another shape, by their canonical name. `parts` says what they are of. `missing` are a Wan transformer's tensors
    that the model is built without, by canonical name, and `lacking` says what those are of, as its files call it.
    `whose` says what the family's models are called.
    """

    whose: str = "Wan"
    names: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.missing)

    @property
    def times_itself(self) -> bool:
        """Whether the time modulates self-attention in another way than in a Wan transformer."""
        return any(_TIME.match(name) for name in self.missing)

    def describe(self) -> str:
        """What there is and what there is not, in a few words; "" for a plain Wan transformer."""
        said = [self._beyond] if self.names else []
        return "; ".join(said + ([self._without] if self.missing else []))

    def remarks(self) -> list[str]:
        """What a user should know of them, a line each."""
        lines = [f"{self._beyond}: carried along"] if self.names else []
        lines += [f"{self._without}: converted as it is"] if self.missing else []
        if self.times_itself:
            lines.append(
                f"init svd takes what self-attention reads for a plain LayerNorm's outputs: time is not {self.whose}'s"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """Plain data for conversion.json."""
        return {"tensors": len(self.names), "parts": list(self.parts), "missing": len(self.missing)}

    @property
    def _beyond(self) -> str:
        return f"{_tensors(len(self.names))} beyond {self.whose}'s, of {' and '.join(self.parts)}"

    @property
    def _without(self) -> str:
        return f"without {len(self.missing)} of {self.whose}'s own tensors, of {' and '.join(self.lacking)}"


def sort_tensors(
    family: Family,
    layout: Layout,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
    unknown: Collection[str],
    raw_config: Mapping[str, Any],
) -> Passengers:
    """What is left when the tensors that a Wan transformer of this geometry has are taken away.

    `tensors` have canonical names, `unknown` are names in `layout` that mean nothing to the family. Raises
    UnsupportedModelError for self-attention that is not Wan's, and for a file that is damaged: a tensor that only some
    of the blocks have, one that has another shape than the others, or one that is against the config.json.
    """
    _refuse_other_attention(unknown)
    missing = [name for name in expected if name not in tensors]
    blocks = 1 + max((int(match[1]) for name in expected if (match := _BLOCK.match(name))), default=0)
    stated = tuple(part for field, parts in _STATED.items() if raw_config.get(field) is not None for part in parts)
    stated += tuple(part for field, parts in _PROMISING.items() if raw_config.get(field) for part in parts)
    absent = {name for name in _throughout(missing, blocks, expected) if not _has_part(name, stated)}
    leaves = Counter(name.split(".", 2)[2] for name in missing if _ATTENTION.match(name))
    differs = f"its self-attention differs from {family.title}'s"
    if lost := [leaf for leaf, count in leaves.items() if count == blocks > 1]:
        raise UnsupportedModelError(
            f"{differs}: {len(lost) * blocks} tensors are missing, of every block "
            f"{' and '.join(lost[:4])}; expected biases, and norms of queries and keys"
        )
    if damaged := [name for name in missing if name not in absent]:
        theirs = some([family.source(name, "native") for name in damaged])
        raise UnsupportedModelError(
            f"{_tensors(len(damaged))} of a {family.title} model {_are(damaged)} missing: {theirs}"
        )
    if inside := [name for name in unknown if _ATTENTION.match(name)]:
        raise UnsupportedModelError(
            f"{differs}: {_tensors(len(inside))} of it {_are(inside)} not part of a {family.title} model: "
            f"{some(inside)}"
        )
    beyond = [name for name in tensors if name not in expected]
    carried = {name for name in _throughout(beyond, blocks, expected) if not _has_part(name, stated)}
    other: Layout = "native" if layout == "diffusers" else "diffusers"
    stray = [name for name in unknown if family.canonical(name, other) is not None]
    stray += [tensors[name].name for name in beyond if name not in carried]
    if stray:
        raise UnsupportedModelError(
            f"{_tensors(len(stray))} {_are(stray)} not part of a {family.title} model: {some(stray)}"
        )
    odd = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    same = Counter((_template(name), tensors[name].shape) for name in odd)
    for name in odd:
        info = tensors[name]
        if not _CROSS_ATTENTION.match(name) or same[_template(name), info.shape] < blocks:
            raise UnsupportedModelError(
                f"tensor {info.name!r} has shape {list(info.shape)}, expected {list(expected[name])}"
            )
    for name in expected:
        if name in tensors and tensors[name].dtype not in FLOATS:
            raise UnsupportedModelError(
                f"tensor {tensors[name].name!r} is {tensors[name].dtype}, expected float32, bfloat16, float16 or "
                "float64; use the unquantised weights"
            )
    names = [*unknown, *beyond, *odd]
    return Passengers(
        whose=family.title,
        names=frozenset(names),
        parts=tuple(_parts(names)),
        missing=tuple(missing),
        lacking=tuple(_modules(family.source(name, "native") for name in missing)),
    )


def refuse_promises(model_type: str, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError when config.json names a model whose own tensors are not there."""
    sign = _PROMISED.get(model_type)
    if sign is not None and not any(re.search(sign, name) for name in names):
        raise UnsupportedModelError(
            f"config.json says model_type {model_type!r}, and the weights have none of its tensors; get the whole file"
        )


def _refuse_other_attention(unknown: Iterable[str]) -> None:
    for name in unknown:
        for sign, what in _OTHER_ATTENTION if name.startswith("blocks.") else ():
            if re.search(sign, name):
                raise UnsupportedModelError(
                    f"this is {what} (found {name!r}); latent attention has no place for that, so give a model with "
                    "Wan's own self-attention"
                )


def _throughout(names: Collection[str], blocks: int, expected: Iterable[str]) -> set[str]:
    """Those of `names` that all blocks have, self-attention's excepted, and whole modules outside the blocks."""
    templates = Counter(_template(name) for name in names if _BLOCK.match(name))
    listed = set(names)
    broken = {name.split(".")[0] for name in expected if not _BLOCK.match(name) and name not in listed}
    return {
        name
        for name in names
        if (templates[_template(name)] == blocks and not _ATTENTION.match(name))
        or (not _BLOCK.match(name) and name.split(".")[0] not in broken)
    }


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in parts for part in name.split("."))


def _template(name: str) -> str:
    return _BLOCK.sub("blocks.N.", name, count=1)


def _parts(names: Iterable[str]) -> list[str]:
    """What tensors are of, each said once: in words, or by the module's name."""
    found: dict[str, None] = {}
    for name in names:
        words = next((words for sign, words in _KNOWN if re.search(sign, name)), None)
        found[words or _modules([name])[0]] = None
    return list(found) if len(found) < 5 else [*list(found)[:3], f"{len(found) - 3} others"]


def _modules(names: Iterable[str]) -> list[str]:
    """The modules just below the model or a block that tensors belong to, each once."""
    return list(dict.fromkeys(_BLOCK.sub("", name, count=1).split(".")[0][:_LONGEST] for name in names))


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def some(names: Collection[str]) -> str:
    """The first three of `names`."""
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
