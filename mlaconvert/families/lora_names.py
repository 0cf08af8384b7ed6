"""The names in LoRA files: which module of the model a key is of, and what it holds of it, however it is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora_change import HADAMARD, KRON

# What trainers and loaders put before a module's name. kohya writes underscores for dots, some of them or all.
_PREFIX = re.compile(
    r"(base_model\.model\.)?((transformer|transformer_2|model|diffusion_model|generator|pipe|dit|net|unet)\.)*(lora_unet_+|lycoris_+)?"
)
FACTORS = (  # what a key is, by its end; PEFT may put an adapter's name before the leaf, which some leave out
    ("down", re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?$")),
    ("up", re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?$")),
)
_ADAPTER = r"(?:\.(?!weight$)\w+)?(?:\.weight)?$"
OTHERS = tuple(  # LoKr's and LoHa's
    (role, re.compile(rf"\.{role}{_ADAPTER}")) for role in (*KRON, *HADAMARD)
)
ROLES = (
    *FACTORS,
    *OTHERS,
    ("magnitude", re.compile(rf"\.(?:dora_scale|lora_magnitude_vector){_ADAPTER}")),  # a DoRA's
    ("up_bias", re.compile(r"\.lora_B(?:\.(?!bias$)\w+)?\.bias$")),
    ("alpha", re.compile(r"\.(?:lora_)?alpha(?:\.default)?$")),
    ("diff_b", re.compile(r"\.diff_b$|\.b_norm$")),
    ("modulation", re.compile(r"\.diff_m$")),
    ("diff", re.compile(r"\.diff$|\.w_norm$")),
)
# Kinds of adapters that are not merged: (in a key, what it is).
_OTHER_KINDS = (
    (re.compile(r"\.oft_|\.boft_"), "an OFT (rotations), which is not merged here"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "a GLoRA, which is not merged here"),
)
# Branches that one model has and another has not: image-to-video of Wan2.1, and not of 2.2; and in HunyuanVideo 1.5
# and its kin, letters and the first image.
_BRANCH = re.compile(
    r"blocks_\d+_(?:cross_attn_(k_img|v_img|norm_k_img)|attn2_(add_k_proj|add_v_proj|norm_added_k))$|"
    r"(img_emb)_|(condition_embedder_image_embedder)_|(byt5_in)_|(vision_in)_"
)


def split_key(key: str) -> tuple[str, str]:
    """(the module's name without what is put before it, what the key holds of it); "" for what means nothing.

    A change of a block's modulation is a "diff" of that parameter, which is then the module.
    """
    plain = _PREFIX.sub("", key, count=1)
    for role, pattern in ROLES:
        if match := pattern.search(plain):
            name = plain[: match.start()]
            return (f"{name}.modulation", "diff") if role == "modulation" else (name, role)
    return plain, ""


def other_kind(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, if it is an adapter of another kind than a LoRA."""
    return next((what for key in keys for sign, what in _OTHER_KINDS if sign.search(key)), None)


def kind_of(roles: Iterable[str]) -> str:
    """What PEFT calls an adapter that has these of a module."""
    known = set(roles)
    return "LOKR" if known & {*KRON} else "LOHA" if known & {*HADAMARD} else "LORA"


def module_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """A module's or bare parameter's name in either layout, with underscores for dots -> its canonical name."""
    found = {}
    family = checkpoint.family
    for name in checkpoint.names:
        if name in checkpoint.passengers.names and family.canonical(name, "native") is None:
            continue  # no LoRA names it
        module, _, leaf = name.rpartition(".")
        for layout in family.layouts:
            named = family.source(name, layout)
            if leaf in ("weight", "bias"):
                found[flat(named.rpartition(".")[0])] = module
            else:
                found[flat(named)] = name
    return found


def flat(name: str) -> str:
    """A module's name as kohya writes it."""
    return name.replace(".", "_")


def branch(name: str) -> str | None:
    """The branch that only some models of a family have and a module of this name is of; None for another module."""
    match = _BRANCH.match(flat(name))
    return next(part for part in match.groups() if part) if match else None
