"""What several of these tests are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HUGE = 10**18
SPECIAL = ("loop", "nowhere", "pipe", "device", "folder", "gone")
BAD_NUMBERS = ("0", "-1", "1000000000000000000", "1.5", ".nan", "true", "five")
CONVERT_FIELDS = {
    **dict.fromkeys(("kv_rank", "rope_dim", "v_dim", "clips", "frames", "height", "width", "vae_stride"), BAD_NUMBERS),
    "q_rank": ("0", "-1", "1000000000000000000", "1.5", "true", "all", "[5]"),
    "nope_dim": ("-1", "1000000000000000000", "1.5", "true", "'5'"),
    "seed": ("-1", "4294967296", "1000000000000000000", "1.5", "true", "null", "'5'"),
    "init": ("null", "SVD", "7", "true", "[svd]", "{a: svd}", "loss"),
    "rope": ("none", "7", "true", "[head]"),
    "key_norm": ("rms", "7", "true"),
    "rope_selection": ("lowest", "7", "energy"),
    "allocation": ("greedy", "7", "adaptive"),
    "without": ("refit", "[nothing]", "[refit]", "7", "true"),
    "dtype": ("float8", "int8", "32", "FLOAT32"),
    "layers": ("'5'", "a", "7", "'1-0'", "'0-999999'", "''", "[0]"),
    "streaming": (
        "7",
        "true",
        "[]",
        "{chunk_frames: 0}",
        "{window_frames: 1}",
        "{sink_frames: -1}",
        "{positions: x}",
        "{chunk_frames: true}",
        "{window_frames: 1000000000000000000}",
        "{frames: 3}",
    ),
    "layout": ("other", "7"),
}
HEAL_NUMBERS = (
    *("steps", "batch", "accumulate", "solver_steps", "critic_steps", "clips", "validation_clips", "validate_every"),
    *("save_every", "frames"),
)
HEAL_FIELDS = {
    **dict.fromkeys(HEAL_NUMBERS, BAD_NUMBERS),
    **dict.fromkeys(("lr", "critic_lr", "clip"), ("0", "-1", ".nan", ".inf", "true", "'5'", "[5]")),
    **dict.fromkeys(("warmup", "weight_decay", "guidance"), ("-1", ".nan", ".inf", "true", "'5'")),
    "ema": ("-0.1", "1", ".nan", "true", "'0.9'"),
    "betas": ("0.9", "[0.9]", "[0.9, 1]", "[-1, 0.9]", "[.nan, 0.9]", "[0.9, 0.9, 0.9]", "[true, false]"),
    "max_loss_ratio": ("1", "0", "-5", ".nan", ".inf", "true"),
    "seed": ("-1", "4294967296", "true", "1.5"),
    "train": ("nothing", "7", "[all]"),
    "stage": ("heal", "7", "null"),
    "schedule": ("linear", "7"),
    "precision": ("fp8", "7"),
    "bad_shards": ("ignore", "7", "true"),
    "gradient_checkpointing": ("'yes'", "1"),
    "attention_steps": ("-1", "1000000000000000000", "1.5", "true"),
}
FIELDS = [("convert", field, value) for field, values in CONVERT_FIELDS.items() for value in values]
FIELDS += [("heal", field, value) for field, values in HEAL_FIELDS.items() for value in values]
Tensors = dict[str, torch.Tensor]


def spoil_values(name: str, value: float, at: int = -1) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[at] = value

    return change


STATES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "text": (lambda p: p.write_text("hello"), "cannot be read"),
    "cut": (lambda p: os.truncate(p, p.stat().st_size // 2), "cannot be read"),
    "a list": (lambda p: torch.save([1], p), "no state of a healing run"),
    "an empty one": (lambda p: torch.save({}, p), "no state of a healing run"),
    "a tensor": (lambda p: torch.save(torch.ones(1), p), "no state of a healing run"),
    "code": (lambda p: torch.save({"x": torch.nn.Linear(1, 1)}, p), "cannot be read"),
    "a link": (lambda p: p.rename(p.with_name("other.pt")) and p.symlink_to("other.pt"), "is a link"),
}


def with_state(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return spoil


STATES |= {
    f"{name} {i}": (with_state(**{name: value}), "no state of a healing run|another")
    for name, values in {
        "recipe": (None, "", "{", "[]", 7),
        "identity": (None, [], {"data": 7}),
        "step": (None, "1", -1),
        "best": (None, [], [1], ["a", "b"]),
        "curves": (None, {}, {"losses": 7, "validation": [], "critic": []}),
        "parts": (None, {}, {"student": {}}, {"student": {"weights": {}, "average": [], "optimizer": {}}}),
    }.items()
    for i, value in enumerate(values)
}
