"""What several of these tests are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mlaconvert.files.find import open_store
from mlaconvert.files.names import WEIGHTS_NAME

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
INDEX = f"{WEIGHTS_NAME}.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def save_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, name in zip(SHARDS, STATE, strict=True):
        save_file({name: STATE[name]}, folder / shard)
    mapping = weight_map if weight_map is not None else dict(zip(STATE, SHARDS, strict=True))
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    return folder


def read_all(source: str | Path, **options: Any) -> dict[str, torch.Tensor]:
    with open_store(source, **options) as store:
        found = {name: store.read(name).clone() for name in store.tensors}
        for name, info in store.tensors.items():
            assert (info.name, info.shape, info.dtype) == (name, tuple(found[name].shape), found[name].dtype)
            assert info.nbytes == found[name].nbytes
    return found


def assert_state(found: dict[str, torch.Tensor], prefix: str = "") -> None:
    assert set(found) == {prefix + name for name in STATE}
    for name, tensor in STATE.items():
        assert torch.equal(found[prefix + name], tensor)
