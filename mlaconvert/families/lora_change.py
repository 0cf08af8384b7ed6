"""What the tensors of one module of an adapter change of its weight and bias.

LoRA    W + s B A                       (arXiv 2106.09685)
LoHa    W + s (A1 B1) * (A2 B2)         (element by element; arXiv 2108.06098)
LoKr    W + s A (x) B                   (Kronecker product, each whole or of two factors; arXiv 2309.14859)
DoRA    m V / |V| of V, any of these    (m for each output or each input; arXiv 2402.09353)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mlaconvert.errors import CheckpointError
from mlaconvert.files.headers import TensorInfo

Read = Callable[[TensorInfo], Tensor]
BIAS = ("up_bias", "diff_b")
KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
# Which of its tensors has the rank of a change, and along which axis. A LoKr of whole matrices has none.
_RANKS = (("down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0))
# What belongs together; a whole matrix stands for two factors.
_COMPLETE = (
    ({"down", "up"},),
    (set(HADAMARD[:4]), set(HADAMARD)),
    tuple(
        {*first, *second}
        for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
        for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"], ["lokr_w2_a", "lokr_w2_b", "lokr_t2"])
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModuleChange:
    """What a file holds for one module: role -> tensor; `scaling` is alpha / r, where `alpha` is from: "" for none."""

    tensors: Mapping[str, TensorInfo]
    scaling: float
    alpha: str

    def merge(self, tensor: Tensor, leaf: str, scale: float, read: Read) -> Tensor:
        """`tensor`, the module's "weight" or "bias", with `scale` of its change, in its own dtype.

        The sum is taken in float32 at least. `scale` goes so far from the weight to the merged one, a DoRA's too, as in
        LyCORIS and ComfyUI; PEFT would scale the change inside a DoRA's norms.
        """
        found = {role: read(info) for role, info in self.tensors.items() if (role in BIAS) == (leaf == "bias")}
        magnitude = found.pop("magnitude", None)
        parts = list(changes(found, self.scaling))
        if not parts:
            return tensor
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        wide, change = tensor.to(dtype), sum(parts[1:], parts[0]).to(dtype).view(tensor.shape)
        if magnitude is not None:
            change = _stretched(wide + change, magnitude.to(dtype)) - wide
        return (wide + scale * change).to(tensor.dtype)


def changes(found: Mapping[str, Tensor], scaling: float) -> list[Tensor]:
    """The changes of a weight or a bias that its tensors make, each flattened [out * in], before a DoRA's norms."""
    made = [found[role].flatten() for role in ("diff", "diff_b") if role in found]
    if "down" in found:  # a convolution's A is [r, in, *kernel], its B [out, r, 1, ...]
        made.append(scaling * (found["up"].flatten(1) @ found["down"].flatten(1)).flatten())
    if "up_bias" in found:
        made.append(scaling * found["up_bias"])
    if "hada_w1_a" in found:
        made.append(scaling * (_hadamard(found, "1") * _hadamard(found, "2")).flatten())
    if any(role in found for role in KRON):
        made.append(scaling * _kronecker(found).flatten())
    return made


def rank_of(tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, int | None] | None:
    """The tensor that has the rank of a module's factors, and the rank; None of a module without factors.

    A LoKr of two whole matrices has no rank, which is then None.
    """
    for role, axis in _RANKS:
        if role in tensors:
            shape = tensors[role].shape
            return tensors[role], shape[axis] if shape else 0
    return (tensors["lokr_w1"], None) if "lokr_w1" in tensors else None


def check_partners(tensors: Mapping[str, TensorInfo], module: str) -> None:
    """Raise CheckpointError for factors that are not all there."""
    for kind in _COMPLETE:
        there = set().union(*kind) & tensors.keys()
        if there and there not in kind:
            raise CheckpointError(f"{tensors[min(there)].name!r} has no partner for {module!r}; get the whole file")
    if "up_bias" in tensors and "up" not in tensors:
        raise CheckpointError(f"{tensors['up_bias'].name!r} has no lora_B.weight; get the whole file")
    if "magnitude" in tensors and rank_of(tensors) is None:
        raise CheckpointError(f"{tensors['magnitude'].name!r} has no factors for {module!r}; get the whole file")


def check_shapes(tensors: Mapping[str, TensorInfo], module: str, shape: tuple[int, ...], outputs: int | None) -> None:
    """Raise CheckpointError naming what does not fit a weight of this `shape` and a bias of so many `outputs`."""
    matrix, rank = len(shape) > 1, (*tensors["down"].shape, 0)[0] if "down" in tensors else 0
    expected: dict[str, tuple[int, ...] | None] = {
        "down": (rank, *shape[1:]) if matrix else None,
        "up": (shape[0], rank, *(1 for _ in shape[2:])) if matrix else None,
        "diff": shape or None,
        "up_bias": None if outputs is None else (outputs,),
        "diff_b": None if outputs is None else (outputs,),
    }
    for role, info in tensors.items():
        if role in expected and info.shape != expected[role]:
            wanted = expected[role]
            asked = f"expected {list(wanted)}" if wanted else "which has none to change"
            raise _misfit(info, module, asked)
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{info.name!r} is {info.dtype}; expected floating point")
    for kind, make in ((HADAMARD, lambda found: _hadamard(found, "1") * _hadamard(found, "2")), (KRON, _kronecker)):
        first = next((tensors[role] for role in kind if role in tensors), None)
        if first is not None:
            found = {role: torch.empty(tensors[role].shape, device="meta") for role in kind if role in tensors}
            try:
                made: tuple[int, ...] = tuple(make(found).shape)
            except (RuntimeError, IndexError, ValueError):
                made = ()
            if not matrix or made[:1] != shape[:1] or prod(made) != prod(shape):
                both = f"and with its partners makes {list(made)}, expected {list(shape)}"
                raise _misfit(first, module, both if made else "which does not fit its partners")
    magnitude = tensors.get("magnitude")
    if magnitude is not None and not (matrix and _axis(magnitude.shape, shape) is not None):
        raise _misfit(magnitude, module, f"expected one number for each of {shape[0]} outputs, or of its inputs")


def _misfit(info: TensorInfo, module: str, asked: str) -> CheckpointError:
    return CheckpointError(f"{info.name!r} has shape {list(info.shape)} for {module!r} of this model, {asked}")


def _hadamard(found: Mapping[str, Tensor], which: str) -> Tensor:
    a, b, core = (found.get(f"hada_{name}") for name in (f"w{which}_a", f"w{which}_b", f"t{which}"))
    assert a is not None
    assert b is not None
    return a @ b if core is None else _tucker(core, a, b)


def _kronecker(found: Mapping[str, Tensor]) -> Tensor:
    """[out, in, *kernel], or [out, in * kernel]."""
    first, second = found.get("lokr_w1"), found.get("lokr_w2")
    if first is None:
        first = found["lokr_w1_a"] @ found["lokr_w1_b"]
    if second is None:
        a, b, core = found["lokr_w2_a"], found["lokr_w2_b"], found.get("lokr_t2")
        second = a @ b.flatten(1) if core is None else _tucker(core, a, b)
    if first.ndim != 2 or second.ndim < 2:
        raise ValueError
    return torch.kron(first.view(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[out, in, *kernel] of a core [r, r, *kernel] and its factors [r, out] and [r, in]."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def _axis(magnitude: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """The axis of a weight that a DoRA's magnitudes lie along: 0 for outputs, 1 for inputs; None for neither.

    PEFT keeps [out], and [1, out, 1, ...] of a convolution; LyCORIS [out, 1, ...] or, for inputs, [1, in, ...].
    """
    ones = tuple(1 for _ in weight[2:])
    if magnitude in ((weight[0],), (weight[0], 1, *ones)) or (ones and magnitude == (1, weight[0], *ones)):
        return 0
    return 1 if magnitude == (1, weight[1], *ones) else None


def _stretched(weight: Tensor, magnitude: Tensor) -> Tensor:
    """A weight whose rows (or columns) have the lengths `magnitude`."""
    axis = _axis(tuple(magnitude.shape), tuple(weight.shape))
    assert axis is not None
    others = [dim for dim in range(weight.ndim) if dim != axis]
    length = torch.linalg.vector_norm(weight, dim=others, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return weight * (magnitude.view(length.shape) / length)
