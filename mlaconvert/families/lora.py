"""LoRAs merged into a dense checkpoint as it is read: W + scale * alpha / r * B A, and their kin (`lora_change`).

Self-attention is what a conversion replaces, so a LoRA made for the dense model has to be merged before, never loaded
afterwards. Files may name the model's modules natively or as diffusers does, after PEFT (adapter_model with its
adapter_config.json), diffusers, LongLive (`generator_lora` in a .pt file), ComfyUI, kohya or DiffSynth.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.adapter import PEFT_CONFIG, PEFT_STEM, AdapterConfig, find_config
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.families.lora_change import ModuleChange, check_partners, check_shapes, rank_of
from mlaconvert.families.lora_names import (
    FACTORS,
    OTHERS,
    ROLES,
    branch,
    flat,
    kind_of,
    module_names,
    other_kind,
    split_key,
)
from mlaconvert.families.wrappers import unwrap
from mlaconvert.files.find import open_store
from mlaconvert.files.headers import TensorInfo
from mlaconvert.files.inputs import is_file, is_folder
from mlaconvert.files.quantised import decode
from mlaconvert.files.store import TensorStore, check_finite

_STATE_KEY = "generator_lora"  # LongLive's; its file also holds the critic's
_CRITIC = re.compile(r"critic|fake_score")
_SELF_ATTENTION = re.compile(r"blocks[._](\d+)[._](?:self_attn|attn1)[._]")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file to merge, and by how much.

    `alpha` and `scaling` are those of a record (`Lora.record`) that merging it has to come to again.
    """

    path: Path
    scale: float = 1.0
    alpha: str | None = None
    scaling: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Lora:
    """An opened LoRA, checked against its model. `modules` are canonical names of what it changes.

    `left_out` counts its keys of each branch that the model has not.

    The scaling of a module is from the "file" (a tensor of its own), the "config" (adapter_config.json or metadata), or
    "rank" when nothing says it, which makes alpha / r one.
    """

    store: TensorStore
    scale: float
    sha256: str
    config: AdapterConfig
    modules: Mapping[str, ModuleChange]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name, without its path."""
        return self.store.files[0].name

    @property
    def alpha(self) -> str:
        """Where the scaling came from; "file+rank", for one, where modules differ."""
        found = {parts.alpha for parts in self.modules.values()}
        return "+".join(origin for origin in ("file", "config", "rank") if origin in found) or "rank"

    @property
    def scaling(self) -> tuple[float, ...]:
        """Every alpha / r, ascending; none for a file without factors."""
        return tuple(sorted({parts.scaling for parts in self.modules.values() if parts.alpha}))

    def record(self) -> dict[str, Any]:
        """Plain data for conversion.json; also the scaling, where another file than the LoRA's has it."""
        found = {
            "name": self.name,
            "sha256": self.sha256,
            "scale": self.scale,
            "alpha": self.alpha,
            "modules": len(self.modules),
        }
        return found | ({"scaling": list(self.scaling)} if self.config.file is not None else {})

    def remarks(self) -> list[str]:
        """What was assumed of its alpha, and what was left out, a line each."""
        lines = []
        if self.left_out:
            lines = [
                f"LoRA {self.name}: {sum(self.left_out.values())} keys of branches that this model has not "
                f"({', '.join(self.left_out)}) are left out"
            ]
        return lines + self._alpha_remarks()

    def _alpha_remarks(self) -> list[str]:
        scaling = " and ".join(f"{value:g}" for value in self.scaling)
        if self.config.file is not None and self.store.files[0].stem != PEFT_STEM:
            return [f"LoRA {self.name}: alpha is that of the {PEFT_CONFIG} beside it, a factor of {scaling}"]
        if "rank" not in self.alpha or not self.scaling:
            return []
        why = "nothing in it or beside it says its alpha"
        if self.config.misfit is not None:
            why = f"the {PEFT_CONFIG} beside it is another's ({self.config.misfit})"
        return [
            f"LoRA {self.name}: {why}, so alpha is taken for the rank, a factor of 1; if it was trained with another, "
            "give --lora-scale ALPHA/RANK"
        ]

    def merge(self, canonical: str, tensor: Tensor) -> Tensor:
        """`tensor` with this LoRA's change, in its own dtype.

        Raises CheckpointError when the LoRA's values are not finite.
        """
        module, _, leaf = canonical.rpartition(".")
        bare = self.modules.get(canonical)
        parts, leaf = (self.modules.get(module), leaf) if bare is None else (bare, "weight")
        if parts is None or leaf not in ("weight", "bias"):
            return tensor
        return parts.merge(tensor, leaf, self.scale, self._read)

    def _read(self, info: TensorInfo) -> Tensor:
        tensor = self.store.read(info.name).float()
        check_finite(tensor, info.name, self.store.path)
        return tensor


def pair(paths: Sequence[Path], scales: Sequence[float]) -> list[LoraFile]:
    """LoRA files with their scales, in order; without `scales` each is merged as it is. Raises ConfigError."""
    if scales and len(scales) != len(paths):
        raise ConfigError(
            f"{len(scales)} scales for {len(paths)} LoRAs; give --lora-scale once for each --lora, or not"
        )
    return [LoraFile(path=path, scale=scale) for path, scale in zip(paths, scales or [1.0] * len(paths), strict=True)]


def open_lora(file: LoraFile, checkpoint: Checkpoint) -> Lora:
    """Open one LoRA and check every tensor of it against `checkpoint`; raises what `merge_loras` does."""
    path = file.path.expanduser()
    if not (is_file(path) or is_folder(path)):
        raise CheckpointError(
            f"{file.path}: there is no such LoRA file; download one of the Hub first, as with `hf download user/repo`"
        )
    if not abs(file.scale) < float("inf"):
        raise ConfigError(f"the scale of {file.path} is {file.scale}: give a finite number, such as 1")
    store = open_store(path)
    try:
        _decode(store)
        parts, left_out = _sort(store, checkpoint)
        for module, found in parts.items():
            tensors = {role: info for role, (info, _) in found.items() if role != "alpha"}
            _check_fit(store, checkpoint, module, tensors)
        config = _config(store, parts, file.alpha)
        modules = {module: _change(store, found, config) for module, found in parts.items()}
        lora = Lora(
            store=store,
            scale=file.scale,
            sha256=tensors_digest(store.files),
            config=config,
            modules=modules,
            left_out=left_out,
        )
        other = file.alpha not in (None, "file") and ("config" in file.alpha) != ("config" in lora.alpha)
        if other or file.scaling not in (None, lora.scaling):
            raise InputError(
                f"{path}: its alpha is not the one it was merged with before the conversion; put the {PEFT_CONFIG} of "
                "that time beside it, or name a merged teacher with --teacher"
            )
        return lora
    except BaseException:
        store.close()
        raise


def refuse_converted(names: Iterable[str], config: WanConfig, where: str | Path) -> None:
    """Raise UnsupportedModelError when `names`, a LoRA's keys in any layout, touch self-attention of `config`'s
    converted layers: its projections are gone, so the LoRA belongs into the dense model.
    """
    layers = config.mla.layers if config.mla is not None else ()
    for name in names:
        match = _SELF_ATTENTION.search(name)
        if match and int(match[1]) < len(layers) and layers[int(match[1])] is not None:
            raise UnsupportedModelError(
                f"{where}: {name!r} belongs to self-attention, which was converted; merge this LoRA before: "
                "mlaconvert convert SOURCE --lora FILE"
            )


def _decode(store: TensorStore) -> None:
    try:
        decode(store)
    except CheckpointError as error:
        raise CheckpointError(f"{store.path}: {error}") from None


_Found = dict[str, tuple[TensorInfo, str]]  # role -> (the tensor, the module's name in the file)


def _sort(store: TensorStore, checkpoint: Checkpoint) -> tuple[dict[str, _Found], dict[str, int]]:
    """Canonical module -> its parts; and of branches that the model has not, how many keys are left out.

    Raises CheckpointError naming a key that means nothing here.
    """
    keys = _chosen(store)
    if kind := other_kind(keys):
        raise _of_another_kind(store, kind)
    if not any(pattern.search(clean) for clean in keys for role, pattern in ROLES if role != "alpha"):
        raise CheckpointError(f"{store.path}: it holds no LoRA (keys such as ...q.lora_A.weight); found {min(keys)!r}")
    refuse_converted(keys, checkpoint.config, store.path)
    canonical = module_names(checkpoint)
    modules: dict[str, _Found] = {}
    left_out: Counter[str] = Counter()
    for clean, raw in sorted(keys.items()):
        named, role = split_key(clean)
        module = canonical.get(flat(named))
        missing = branch(named) if module is None else None
        if role and missing is not None:
            left_out[missing] += 1
            continue
        if not role or module is None:
            raise CheckpointError(
                f"{store.path}: {raw!r} is no LoRA of this model ({checkpoint.family.name}, "
                f"{checkpoint.config.num_layers} layers); only lora_A and lora_B (or down and up), LoKr's and LoHa's "
                "factors, DoRA's magnitudes, alpha, diff, diff_b and diff_m of its modules can be merged"
            )
        found = modules.setdefault(module, {})
        if role in found:
            raise CheckpointError(f"{store.path}: {raw!r} and {found[role][0].name!r} are both {role} of {module!r}")
        found[role] = (store.tensors[raw], named)
    if not modules:
        raise CheckpointError(f"{store.path}: all of it is of branches that this model has not: {', '.join(left_out)}")
    return {module: found for module, found in modules.items() if set(found) != {"alpha"}}, dict(left_out)


def _chosen(store: TensorStore) -> dict[str, str]:
    """{cleaned name: name in the file} of the LoRA's tensors; of LongLive's two, the generator's."""
    keys = lora_keys(store)
    state_key = (keys[0] or None) if len(keys) == 1 else None
    try:
        _, cleaned = unwrap(store.tensors, state_key)
    except CheckpointError as error:
        raise CheckpointError(f"{store.path}: {error}") from None
    if {name.split(".")[0] for name in cleaned} >= {"transformer", "transformer_2"}:
        raise CheckpointError(
            f"{store.path}: it holds LoRAs of two experts; split it, and convert each with --subfolder"
        )
    return cleaned


def lora_keys(store: TensorStore) -> list[str]:
    """State keys of a pickle under which there is a LoRA of the model: the generator's if it says so, no critic's."""
    keys = {name.rpartition("/")[0] for name in store.tensors if any(p.search(name) for _, p in (*FACTORS, *OTHERS))}
    found = [key for key in sorted(keys) if not _CRITIC.search(key.rpartition("/")[2])]
    return [key for key in found if key.rpartition("/")[2] == _STATE_KEY] or found


def _of_another_kind(store: TensorStore, kind: str) -> CheckpointError:
    return CheckpointError(f"{store.path}: it is {kind}; merge it into the model with the library that made it first")


def _config(store: TensorStore, parts: Mapping[str, _Found], recorded: str | None) -> AdapterConfig:
    """The configuration for factors without an alpha of their own; none where a record says that none was used."""
    ranks: dict[str, int | None] = {}
    kinds = set()
    for found in parts.values():
        ranked = rank_of({role: info for role, (info, _) in found.items()})
        if ranked is not None and "alpha" not in found:
            info, rank = ranked
            named = next(named for other, named in found.values() if other is info)
            if rank is not None or store.files[0].stem == PEFT_STEM:
                ranks[named] = rank
                kinds.add(kind_of(found))
    if not ranks or recorded in ("rank", "file+rank"):
        return AdapterConfig()
    config = find_config(store.files[0], ranks, kinds)
    bare = [found["down"][0].name for found in parts.values() if "down" in found and "magnitude" not in found]
    if config.fields.get("use_dora") and bare:
        raise CheckpointError(
            f"{store.path}: its configuration says DoRA, and {bare[0]!r} has no magnitudes; get the whole file"
        )
    return config


def _change(store: TensorStore, found: _Found, config: AdapterConfig) -> ModuleChange:
    """One module's tensors and its scaling, alpha / r, or alpha / sqrt(r) where rsLoRA's configuration has alpha."""
    tensors = {role: info for role, (info, _) in found.items() if role != "alpha"}
    ranked = rank_of(tensors)
    if ranked is None:
        return ModuleChange(tensors=tensors, scaling=1.0, alpha="")
    info, rank = ranked
    named = next(named for other, named in found.values() if other is info)
    if rank is None:  # of two whole matrices: LyCORIS takes them as they are, PEFT scales them too
        rank = config.rank(named)
        if rank is None:
            return ModuleChange(tensors=tensors, scaling=1.0, alpha="")
    if rank < 1:
        raise CheckpointError(f"{store.path}: {info.name!r} has shape {list(info.shape)}; expected [r, in]")
    alpha: Any = config.alpha(named)
    origin, root = ("rank", False) if alpha is None else ("config", config.stabilised)
    if "alpha" in found:
        tensor = store.read(found["alpha"][0].name)
        alpha, origin, root = tensor.double().item() if tensor.numel() == 1 else None, "file", False
    elif alpha is None:
        alpha = rank
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < float("inf"):
        raise CheckpointError(f"{store.path}: alpha of {info.name!r} is {alpha!r}; expected one finite number")
    return ModuleChange(tensors=tensors, scaling=float(alpha) / (rank**0.5 if root else rank), alpha=origin)


def _check_fit(store: TensorStore, checkpoint: Checkpoint, module: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Every part of one module against the model's tensor. Raises CheckpointError naming what does not fit."""
    weight, bias = (f"{module}.{leaf}" for leaf in ("weight", "bias"))
    weight = module if module in checkpoint.names else weight  # a bare parameter
    shape = checkpoint.info(weight).shape if weight in checkpoint.names else ()
    outputs = checkpoint.info(bias).shape[0] if bias in checkpoint.names else None
    try:
        check_partners(tensors, module)
        check_shapes(tensors, module, shape, outputs)
    except CheckpointError as error:
        raise CheckpointError(f"{store.path}: {error}") from None


def tensors_digest(files: Sequence[Path]) -> str:
    """SHA-256 of the one file of a LoRA, of the contents one after the other where there are shards."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 22):
                total.update(piece)
    return total.hexdigest()
