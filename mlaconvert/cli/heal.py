"""mlaconvert heal"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlaconvert.cli.options import Json, OutputFolder, among, present_device, recipes, source_of
from mlaconvert.cli.show import console, print_json, progress_bar
from mlaconvert.healing.stages import STAGES

if TYPE_CHECKING:
    from mlaconvert.healing.estimate import Estimate
    from mlaconvert.healing.recipe import HealRecipe


def heal(
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="A converted model folder; it is not changed.", show_default=False)
    ],
    output: OutputFolder = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(STAGES),
            autocompletion=among(*STAGES),
            help=f"What to train for: {'; '.join(stage.goal for stage in STAGES.values())}. Default: the recipe's.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of the optimizer. Default: the recipe's, else 300.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            autocompletion=recipes("heal"),
            help="Recipe file, or the name of a shipped healing recipe. Options override it. Default: none.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="File, folder or Hub id of the teacher. Default: what DIR was converted from."
        ),
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of two experts in DIR. Default: DIR is one model.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clips: safetensors shards with latents and context. Default: what was made from tiny draws its own; "
            "other teachers generate some, for a stage that does without a data set.",
        ),
    ] = None,
    bad_shards: Annotated[
        str | None,
        typer.Option(
            metavar="refuse|skip",
            autocompletion=among("refuse", "skip"),
            help="A shard or clip that cannot be used is an error, or left out and named. Default: refuse.",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="latent|attention|all",
            autocompletion=among("latent", "attention", "all"),
            help="Learn what the conversion brought, self-attention, or everything. Default: attention.",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Peak learning rate. Default: the stage's, 2e-6 to 1e-5, for real models."),
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Clips a process takes at once. Default: 8.")] = None,
    accumulate: Annotated[int | None, typer.Option(metavar="N", help="Batches to a step. Default: 1.")] = None,
    ema: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="Decay of the averaged weights, 0 for none. Default: 0.99."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="SCALE", help="The teacher's guidance, in few-step stages; 1 for none. Default: 3."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bf16",
            autocompletion=among("float32", "bf16"),
            help="Of the passes; weights stay float32. Default: float32.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice to save memory.")
    ] = False,
    validate_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between validations on held-back clips. Default: 50.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between saves of the run's state. Default: 50.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of clips, noise and their order. Default: 0.")
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A tracker that accelerate knows, or none. Default: tensorboard, if it is installed."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the run's state and log. Default: the output with .state added."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw the saved state away and begin again.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder of --output.")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Device to train on: cpu, cuda or cuda:N. Default: a GPU where there is one."
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="The same as --device cpu.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input, estimate memory and FLOPs, write nothing.")
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="TFLOP/s that the device sustained when you measured it, for --dry-run to tell the time. "
            "Default: the device is probed for some seconds.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a converted model for one stage. Interrupted, the same command goes on where it was."""
    from mlaconvert.conversion.provenance import refuse_dense
    from mlaconvert.errors import ConfigError
    from mlaconvert.families.open import open_checkpoint
    from mlaconvert.files.output import Output
    from mlaconvert.healing.recipe import load_heal_recipe
    from mlaconvert.healing.run import heal as run
    from mlaconvert.healing.run import plan
    from mlaconvert.listener import Listener

    options = {
        "stage": stage,
        "steps": steps,
        "bad_shards": bad_shards,
        "train": train,
        "lr": lr,
        "batch": batch,
        "accumulate": accumulate,
        "ema": ema,
        "guidance": guidance,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing or None,
        "validate_every": validate_every,
        "save_every": save_every,
        "seed": seed,
        "tracker": tracker,
    }
    source, out, err = source_of(str(model), subfolder=subfolder), console(), console(stderr=True)
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is None and stage is None:  # that the model cannot be healed goes before a stage that is missing
        with open_checkpoint(source) as opened:
            refuse_dense(opened, source, "heal")
    chosen = load_heal_recipe(recipe, given)
    if dry_run:
        rate = None if tflops is None else 1e12 * tflops
        present = present_device("cpu" if cpu else device or "auto")
        found = plan(source, chosen, teacher=teacher, data=data, flops_per_second=rate, device=present)
        if as_json:
            print_json(found.to_json())
        else:
            out.print(_estimate_text(found, chosen, present), markup=False, soft_wrap=True)
        err.print("dry run: nothing was written")
        return
    if output is None:
        raise ConfigError("no folder to write to; give one with -o DIR, or --dry-run to see the estimate")
    if device in ("auto", None):
        device = "cpu" if cpu else None
    elif cpu and device != "cpu":
        raise ConfigError(f"--cpu and --device {device} are two devices; give one of them")
    if device is not None:
        _train_on(device)
    started, speaks = time.monotonic(), int(os.environ.get("RANK", "0")) == 0
    with progress_bar(err) as progress:
        report = run(
            source,
            Output(output, overwrite=overwrite, restart=restart),
            chosen,
            teacher=teacher,
            data=data,
            state=state,
            cpu=device == "cpu",
            listener=Listener(
                progress=progress,
                say=lambda line: err.print(line, markup=False, soft_wrap=True) if speaks else None,
            ),
        )
    if speaks:
        if as_json:
            print_json(report.to_json())
        first, (step, best) = report.curves.validation[0][1], report.best
        err.print(
            f"written to {output} in {time.monotonic() - started:.1f} s: step {step}, validation {first:.5g} -> "
            f"{best:.5g}; the run's state may be deleted",
            markup=False,
            soft_wrap=True,
        )
        if step == 0:
            err.print(
                "no later state validated better than the start, so its weights were written; "
                "try more steps or another --lr",
                soft_wrap=True,
            )
    _leave_processes()


def _train_on(device: str) -> None:
    """Check the device; one of several GPUs is told to accelerate, which a launcher's processes divide themselves."""
    import torch

    from mlaconvert.errors import ConfigError
    from mlaconvert.model.device import resolve_device

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ":" in device and several:
        raise ConfigError(f"device is {device!r}, but several processes share the work, each on its own; give cuda")
    resolve_device(device, torch.float32)
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device


def _leave_processes() -> None:
    """Several processes on CPUs: gloo can abort at exit after all is done, so leave without its goodbye."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        torch.distributed.barrier()
        if torch.distributed.get_backend() == "gloo":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        torch.distributed.destroy_process_group()


def _estimate_text(found: Estimate, recipe: HealRecipe, device: str) -> str:
    import torch

    from mlaconvert.model.rates import does_not_fit
    from mlaconvert.units import format_bytes, format_seconds

    lines: list[tuple[str, Any]] = [
        ("stage", f"{recipe.stage}, {recipe.steps} steps, batch {recipe.batch} x {recipe.accumulate} a process"),
        ("trained", f"{found.trained_parameters:,} of {found.parameters:,} parameters ({recipe.train})"),
        ("step", f"{found.tokens:,} tokens, {found.flops:.3g} FLOPs; all steps {found.flops * recipe.steps:.3g} FLOPs"),
        *((f"  {name}", format_bytes(size)) for name, size in found.memory.items()),
        ("memory", f"{format_bytes(found.total_memory)} a process, activations roughly; nothing sharded"),
    ]
    if found.disk:
        lines.append(("disk", f"{format_bytes(found.disk)} of the teacher's velocities, deleted at the end"))
    if found.seconds is not None:
        total = format_seconds(found.seconds * recipe.steps)
        lines.append(("time", f"{found.seconds:.3g} s a step, about {total} on {device} besides validations"))
    advice = "take a smaller --batch, --gradient-checkpointing or --precision bf16, or shard it (accelerate launch)"
    trouble = does_not_fit(found.total_memory, torch.device(device), advice)
    lines += [] if trouble is None else [("memory", trouble)]
    return "\n".join(f"{name:<13} {value}" for name, value in lines)
