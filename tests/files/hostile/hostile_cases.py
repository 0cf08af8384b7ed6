"""What several of these tests are made of."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile import Cases, Spoil

SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
HUGE, BEYOND = 10**18, 10**400
COMMANDS = ("analyze", "convert", "generate", "heal", "evaluate", "push")


def spoiled(tmp_path: Path, source: Path, spoil: Spoil) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    spoil(folder)
    return folder


def named(cases: Cases, commands: Sequence[str] = COMMANDS) -> list[Any]:
    """Each case by one of the commands that read a model, in turn."""
    return [
        pytest.param(case, commands[i % len(commands)], id=f"{commands[i % len(commands)]}-{case}")
        for i, case in enumerate(cases)
    ]


SIZES = ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")
ABSURD: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "huge": HUGE,
    "beyond 64 bits": 10**30,
    "half": 0.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "text": "24",
    "list": [24],
    "object": {"value": 24},
}
NOT_SIZES = {
    "patch_size": ([], [1, 2], [1, 2, 0], [1, 2, -2], [1, 2, HUGE], [1, 2, 2, 2], [1.0, 2, 2], "1x2x2", True, {"t": 1}),
    "eps": (0, -1, 1, 1e300, float("nan"), float("inf"), "1e-6", True, [1e-6]),
    "model_type": (7, True, ["t2v"], {}, "x" * 1000, "\x1b[31m", "t2v\nowned"),
    "cross_attn_norm": (0, "no", [], False),
    "image_dim": (0, -1, 3, HUGE, "1280", True),
    "qk_norm": (False, "layer_norm", 7, [], {}),
    "window_size": ([3, 3], HUGE, "all", [-1], {}),
    "streaming": (
        3,
        True,
        [],
        "yes",
        {"chunk": 3},
        {"chunk_frames": 0},
        {"window_frames": HUGE},
        {"sink_frames": -1},
        {"chunk_frames": True},
        {"window_frames": 3},
        {"sink_frames": HUGE},
        {"positions": "other"},
    ),
}
CONFIG_VALUES = {f"{field} {name}": (field, value) for field in SIZES for name, value in ABSURD.items()}
CONFIG_VALUES |= {f"{name} {i}": (name, value) for name, values in NOT_SIZES.items() for i, value in enumerate(values)}
