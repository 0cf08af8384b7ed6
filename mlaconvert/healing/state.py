"""What a healing run keeps between steps: trained weights, their average, the optimizer; files are whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlaconvert.errors import CheckpointError, OutputError
from mlaconvert.files.inputs import file_size
from mlaconvert.files.pickles import check_zip
from mlaconvert.files.whole import whole_file
from mlaconvert.healing.recipe import HealRecipe, Train
from mlaconvert.model.blocks import Block
from mlaconvert.model.wan import WanModel

LAST, BEST = "last.pt", "best.pt"
# SOAP turns its eigenbases every so many steps; dimensions above this width keep the standard basis.
TURN_EVERY, WIDEST = 2, 4096
_LATENT = ("q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "k_rope_proj", "past_out_proj")


def choose_trained(model: WanModel, train: Train) -> list[str]:
    """Let gradients into what `train` says, and nothing else; the names of those parameters.

    "latent": what a conversion brings to self-attention, "attention": all of self-attention, "all": everything.
    """
    model.requires_grad_(False)
    chosen: list[nn.Module] = [model] if train == "all" else []
    for block in model.blocks if train != "all" else ():
        assert isinstance(block, Block)
        children = dict(block.self_attn.named_children())
        chosen += [block.self_attn] if train == "attention" else [children[n] for n in _LATENT if n in children]
    for name, parameter in (pair for module in chosen for pair in module.named_parameters()):
        # A layer without content keys has an empty bias; the tables of a quantiser are no weights.
        parameter.requires_grad_(parameter.numel() > 0 and "kv_quantizer" not in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered from all processes where it is sharded."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", copy=True)


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, each process its share where that is sharded."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    with torch.no_grad():
        target.copy_(value)


def _whole(value: Any) -> Any:
    """`whole` of a tensor, or of each in a list; anything else as it is."""
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    return whole(value) if isinstance(value, Tensor) else value


def _beside(parameter: Tensor, value: Any) -> Any:
    """A copy of what the optimizer keeps for `parameter`: on its device, and sharded like it if it has its shape."""
    if isinstance(value, list):
        return [_beside(parameter, entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    if hasattr(parameter, "full_tensor") and value.shape == parameter.shape:
        made = torch.zeros_like(parameter)
        fill(made, value)
        return made
    return value.to(parameter.device if value.ndim else "cpu", copy=True)  # AdamW's count of steps stays on the CPU


class Trained:
    """The parameters that one optimizer trains, and their running average.

    Averages are kept in the parameters' own sharding. `names` are those of the model inside the objective.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, ema: float) -> None:
        self.objective, self.optimizer, self.decay = objective, optimizer, ema
        self.parameters = {
            name.split("student.", 1)[1]: p for name, p in objective.named_parameters() if p.requires_grad
        }
        self.average = [p.detach().clone() for p in self.parameters.values()] if ema else []

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the average a little towards the weights after `step` (from 0); it forgets faster at first."""
        if self.average:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, list(self.parameters.values()), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The average in place of the weights, which come back unchanged."""
        if not self.average:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters.values()]
        for parameter, average in zip(self.parameters.values(), self.average, strict=True):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, weight in zip(self.parameters.values(), kept, strict=True):
                parameter.copy_(weight)

    def weights(self) -> dict[str, Tensor]:
        """What would be written: the average, or the weights where there is none. All processes must call it."""
        values = self.average or list(self.parameters.values())
        return {name: whole(value) for name, value in zip(self.parameters, values, strict=True)}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. All processes must call it."""
        moments = self.optimizer.state
        return {
            "weights": {name: whole(p) for name, p in self.parameters.items()},
            "average": [whole(a) for a in self.average],
            "optimizer": {
                name: {key: _whole(value) for key, value in moments[p].items()}
                for name, p in self.parameters.items()
                if p in moments
            },
            "steps": [int(group.get("step", 0)) for group in self.optimizer.param_groups],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`."""
        for name, parameter in self.parameters.items():
            fill(parameter, state["weights"][name])
            if name in state["optimizer"]:
                saved = state["optimizer"][name]
                self.optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in saved.items()}
        for group, step in zip(self.optimizer.param_groups, state.get("steps", ()), strict=False):
            if step:  # AdamW counts by parameter
                group["step"] = int(step)
        for average, value in zip(self.average, state["average"], strict=True):
            fill(average, value)


def save(path: Path, data: dict[str, Any]) -> None:
    """Write `data` so that `path` is always whole: the old file or the new one. Raises OutputError."""
    try:
        with whole_file(path) as partial, partial.open("wb") as stream:
            torch.save(data, stream)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        if isinstance(error.__context__, KeyboardInterrupt | SystemExit):  # and over what interrupts its writer
            raise error.__context__ from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OutputError(f"{path}: the run cannot be saved ({reason}); make room and run the command again") from None


def load(path: Path, *fields: str) -> dict[str, Any]:
    """What `save` wrote, with these fields. Raises CheckpointError."""
    try:
        check_zip(path, file_size(path), longest_pickle=1 << 30)  # it holds the curves
        data: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}); start afresh with --restart") from None
    if not isinstance(data, dict) or not data.keys() >= set(fields):
        raise not_a_state(path)
    return data


def not_a_state(path: Path) -> CheckpointError:
    """The error for a file that `save` did not write, or that was changed since."""
    return CheckpointError(f"{path}: no state of a healing run, or a damaged one; start afresh with --restart")


def make_optimizer(objective: nn.Module, recipe: HealRecipe, lr: float) -> torch.optim.Optimizer:
    """The recipe's, over what is trained and nothing else."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    betas = recipe.betas or (0.9, 0.99)
    if recipe.optimizer == "soap":
        from pytorch_optimizer import SOAP  # takes seconds to import

        return SOAP(
            trained,
            lr=lr,
            betas=betas,
            weight_decay=recipe.weight_decay,
            precondition_frequency=TURN_EVERY,
            max_precondition_dim=WIDEST,
        )
    if recipe.optimizer == "muon":
        from pytorch_optimizer import Muon

        # Its authors leave embeddings and heads to AdamW, and all that is no matrix.
        matrices, rest = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                (matrices if "blocks" in name.split(".") and parameter.ndim == 2 else rest).append(parameter)
        common = {"lr": lr, "weight_decay": recipe.weight_decay}
        groups = [
            {"params": matrices, "use_muon": True, "momentum": betas[0], "use_adjusted_lr": True, **common},
            {"params": rest, "use_muon": False, "betas": betas, "eps": 1e-8, **common},
        ]
        return Muon([group for group in groups if group["params"]])
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=recipe.weight_decay)
