"""What several of these tests are made of."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heal_cases import STREAMING, TEACHER
from safetensors.torch import load_file, save_file
from support import randomize

from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.output import Output
from mlaconvert.healing.recipe import HealRecipe
from mlaconvert.healing.run import heal
from mlaconvert.listener import Listener
from mlaconvert.model.wan import WanModel

HANG = 600  # seconds after which a child process is given up


def save_teacher(folder: Path, streaming: Any = STREAMING) -> Path:
    made = WanModel(TEACHER)
    randomize(made, 1)
    folder.mkdir(parents=True)
    save_file(made.state_dict(), folder / WEIGHTS_NAME)
    names = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")
    config = {"_class_name": "CausalWanModel", "model_type": "t2v", "patch_size": [1, 2, 2]}
    config |= {name: getattr(TEACHER, name) for name in names}
    config["streaming"] = dataclasses.asdict(streaming) if streaming else None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(stage: str, **options: Any) -> HealRecipe:
    base: dict[str, Any] = {"stage": stage, "steps": 4, "batch": 2, "lr": 2e-3, "warmup": 2, "validation_clips": 3}
    base |= {"validate_every": 2, "save_every": 2, "critic_steps": 2, "tracker": "none", "solver_steps": 8}
    return HealRecipe(**base | options)


def run(home: Path, output: Path, recipe: HealRecipe, **options: Any) -> Any:
    """`heal` of the student; `options` are its own and the fields of `Output` and `Listener`."""
    target = Output(output, **{name: options.pop(name) for name in ("overwrite", "restart") if name in options})
    listener = Listener(**{name: options.pop(name) for name in ("progress", "say") if name in options})
    chosen = {"data": home / "clips", "cpu": True} | options
    return heal(home / "student", target, recipe, listener=listener, **chosen)


def in_processes(target: Callable[..., None], *arguments: tuple[Any, ...]) -> list[int | None]:
    """Exit codes of `target`, called in a fresh process for each of `arguments`; None for one that hangs.

    They are never forked: OpenMP's threads do not survive a fork, and the child waits for them for ever.
    """
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=target, args=each) for each in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(HANG)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def with_bad_clips(home: Path, folder: Path, *rows: int) -> Path:
    """The clips of `home`, with an infinity in these rows of the second of the two shards, of 5 and 8 clips."""
    shutil.copytree(home / "clips", folder)
    clips = load_file(folder / "1.safetensors")
    for row in rows:
        clips["latents"][row, 1, 2, 3, 0] = torch.inf
    save_file(clips, folder / "1.safetensors")
    return folder
