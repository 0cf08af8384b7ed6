"""The two walks of a calibration: measure and divide, then convert and refit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlaconvert.clips.folder import Clips
from mlaconvert.config.mla import MLALayer
from mlaconvert.conversion.calibration.bits import NORM_BITS, in_runs, quantised, share_bits
from mlaconvert.conversion.calibration.layer import Layer
from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.newest import attention_error
from mlaconvert.conversion.calibration.refit import refit_output, refit_query
from mlaconvert.conversion.calibration.refit_past import refit_past
from mlaconvert.conversion.calibration.store import load_moments, moments_file, save_moments
from mlaconvert.conversion.calibration.target import ErrorTable, Target, branch, share_budget
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.calibration.windows import Losses, Regime
from mlaconvert.conversion.collected.record import Collected
from mlaconvert.conversion.collected.walk import CollectedWalk
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.scratch import return_memory
from mlaconvert.latent.moments import LayerMoments
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.progress import Counter, Progress, silent

STAGES = (
    *("dense", "rotations dropped", "rotary key shared", "heads narrowed", "low rank", "norms and queries", "in bits"),
    *("past refitted", "output refitted", "queries refitted"),
)
"""What `refit_layers` measures the loss of, in the order of the work."""
PROBES = 8  # batches of windows that a model with one converted layer sees, at most
BUDGETS = (0.4, 0.55, 0.75, 1.0, 1.35, 1.8, 2.4)  # of the average, measured in every layer


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How each converted layer divides its scalars; its moments lie in `folder`."""

    folder: Path
    layers: dict[int, MLALayer]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both walks work on: the dense model, the clips that go through it, and what its layers become.

    In the place of clips there may be windows that its own code ran, which no layer's result changes.
    """

    checkpoint: Checkpoint
    clips: Clips | Collected
    regime: Regime
    target: Target
    device: torch.device | str = "cpu"

    def walk(self, folder: Path, *, probes: int = 0, validation: Clips | None = None) -> LayerWalk | CollectedWalk:
        """A walk through all layers, which keeps large tensors in `folder`."""
        if isinstance(self.clips, Collected):
            return CollectedWalk(self.checkpoint, self.clips, self.regime.present, device=self.device, scratch=folder)
        return LayerWalk(
            self.checkpoint,
            self.clips,
            self.regime,
            device=self.device,
            probes=probes,
            validation=validation,
            scratch=folder,
        )


@dataclass(frozen=True, kw_only=True)
class KeptWalk:
    """How far an interrupted second walk came: its state lies in `folder`, the `finished` layers are written.

    `say` is told of a state that is damaged and left alone.
    """

    folder: Path
    finished: Collection[int] = ()
    say: Callable[[str], None] | None = None


def calibrate(
    task: Task,
    *,
    layers: Sequence[int],
    budget: int,
    adaptive: bool,
    folder: Path,
    bytes_per_token: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """First walk: moments of `layers`, kept in `folder`, and the split of `budget` scalars that measures best.

    Moments that are in `folder` already are taken from there. With `adaptive`, layers share the total by what a scalar
    buys the model's velocity. With `bytes_per_token`, what is shared is bits under so many bytes a layer
    (`share_bits`), and `budget` is only where errors are measured.
    """
    checkpoint, target = task.checkpoint, task.target
    counts = target.counts(budget)
    least = min(3, budget)  # a cached rotary pair and one latent channel; fewer only where fewer are asked for
    budgets = sorted({max(least, round(budget * share)) for share in BUDGETS}) if adaptive else [budget]
    largest = max(budget, checkpoint.config.dim)  # no latent is wider than the model
    budgets = [b for b in budgets if b <= largest]
    tables: dict[int, ErrorTable] = {}
    energies: dict[int, Tensor] = {}
    walk = task.walk(folder, probes=PROBES if adaptive else 0)
    count = Counter(progress, "calibrate", checkpoint.config.num_layers)
    count.show()
    for layer in walk:
        if layer.index in layers:
            if not moments_file(folder, layer.index).exists():
                save_moments(folder, layer.index, layer_moments(layer))
                return_memory()
            moments = load_moments(folder, layer.index, checkpoint.config, task.device)
            table = target.measure(layer, moments, counts=counts, budgets=budgets)
            tables[layer.index] = table
            shape, student = target.layer(budget, table.best(budget)[1]), None
            if bytes_per_token is not None:
                most = max(shape.kv_lora_rank, min(checkpoint.config.dim, 8 * bytes_per_token))
                student, energies[layer.index] = target.convert_with_energies(layer, shape, moments, rank=most)
            elif adaptive:
                student = target.convert(layer, shape, moments)
            if adaptive and student is not None:
                target.fit_output(layer, student)
                layer.follow(layer.index, student)
        count.step()
    if bytes_per_token is not None:
        errors = walk.velocity_errors if adaptive else None
        return Calibration(folder=folder, layers=_in_bits(target, tables, energies, errors, budget, bytes_per_token))
    ordered = [tables[i] for i in sorted(tables)]
    shares = [budget] * len(ordered)
    if adaptive:
        shares = share_budget(ordered, [walk.velocity_errors[i] for i in sorted(tables)], budget, largest=largest)
    chosen = {
        index: target.layer(share, table.best(share)[1])
        for index, table, share in zip(sorted(tables), ordered, shares, strict=True)
    }
    return Calibration(folder=folder, layers=chosen)


def _in_bits(
    target: Target,
    tables: Mapping[int, ErrorTable],
    energies: Mapping[int, Tensor],
    velocity_errors: Mapping[int | str, float] | None,
    budget: int,
    bytes_per_token: int,
) -> dict[int, MLALayer]:
    """Each layer with the bits of its scalars, `bytes_per_token` on average.

    A layer's energies count by what it did to the model's velocity when it alone was cut to `budget` channels; without
    those `velocity_errors`, every layer gets as many bytes.
    """
    order, beside = sorted(tables), [NORM_BITS] if target.key_norm == "token" else []
    if velocity_errors is None:
        bits = [share_bits([energies[i].tolist()], bytes_per_token, beside=beside)[0] for i in order]
    else:
        units = [velocity_errors[i] / max(float(energies[i][budget:].sum()), 1e-300) for i in order]
        weighted = [(unit * energies[i]).tolist() for unit, i in zip(units, order, strict=True)]
        bits = share_bits(weighted, bytes_per_token * len(order), beside=beside)
    return {
        index: dataclasses.replace(
            target.layer(len(channels), tables[index].best(budget)[1]), cache_bits=in_runs([*channels, *beside])
        )
        for index, channels in zip(order, bits, strict=True)
    }


def refit_layers(
    task: Task,
    calibration: Calibration,
    *,
    validation: Clips | None = None,
    losses: Losses | None = None,
    kept: KeptWalk | None = None,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, float]]]:
    """Second walk: each layer's tensors, its queries and output refitted, with its attention error by stage.

    With `validation` clips, `losses` has the model's losses on them at the end, with all layers at each stage. With
    `kept`, the walk keeps how far it is; called again, it goes on behind the finished layers, and whatever it has to
    pass again comes out the same.
    """
    checkpoint, target = task.checkpoint, task.target
    walk = task.walk(calibration.folder, validation=validation)
    if kept is not None:
        walk.resume(kept.folder, lambda index: index in kept.finished or index not in calibration.layers, kept.say)
    for layer in walk:
        if layer.index not in calibration.layers:
            continue
        moments = load_moments(calibration.folder, layer.index, checkpoint.config, task.device)
        sample, errors = layer.sample(), dict[str, float]()
        for name, student in _stages(target, layer, calibration.layers[layer.index], moments):
            errors[name] = attention_error(sample, student)
            if validation is not None:
                layer.follow(name, branch(student))
            return_memory()
        yield layer.index, dict(student.state_dict()), errors
    if losses is not None:
        for made, found in ((losses.clean_past, walk.losses.clean_past), (losses.noisy_past, walk.losses.noisy_past)):
            made |= {name: found[name] for name in STAGES if name in found}  # a walk that went on has them by name


def _stages(
    target: Target, layer: Layer, shape: MLALayer, moments: LayerMoments
) -> Iterator[tuple[str, LatentAttention]]:
    """A layer's conversion step by step, each with all that the steps before it lose; the last is what is written."""
    dim, head_dim, heads = target.config.dim, target.config.head_dim, target.config.num_heads
    in_bits, shape = shape, dataclasses.replace(shape, cache_bits=())
    exact = dataclasses.replace(target, key_norm="token", q_lora_rank=None, v_dim=head_dim)
    wide = dataclasses.replace(shape, kv_lora_rank=dim, qk_nope_head_dim=head_dim, v_head_dim=head_dim)
    if target.rope != "head":
        apart = dataclasses.replace(exact, rope="cached")
        every = tuple((pair, heads) for pair, _ in shape.rope_components)
        yield "rotations dropped", apart.convert(layer, dataclasses.replace(wide, rope_components=every), moments)
        yield "rotary key shared", apart.convert(layer, wide, moments)
    heads_fit = head_dim if target.rope == "head" else head_dim - shape.qk_rope_head_dim
    if shape.qk_nope_head_dim < heads_fit or shape.v_head_dim < head_dim:
        yield "heads narrowed", exact.convert(layer, dataclasses.replace(shape, kv_lora_rank=dim), moments)
    student = dataclasses.replace(exact, v_dim=shape.v_head_dim).convert(layer, shape, moments)
    yield "low rank", student
    if target.key_norm == "latent" or target.q_lora_rank is not None:
        student = target.convert(layer, shape, moments)
        yield "norms and queries", student
    if in_bits.cache_bits:
        student = quantised(layer, student, in_bits)
        yield "in bits", student
    if target.method.refit and target.present == "exact":
        yield "past refitted", refit_past(layer, student)
    elif target.method.refit:
        refit_output(layer, student)
        yield "output refitted", student
        refit_query(layer, student)
        refit_output(layer, student)
        yield "queries refitted", student
