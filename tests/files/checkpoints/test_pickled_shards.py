"""Shards of PyTorch's, with their index: read as those of safetensors are, and refused as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import STATE, assert_state, read_all, save_shards
from safetensors.torch import save_file

from mlaconvert.errors import CheckpointError
from mlaconvert.files.find import open_store
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.select import select

INDEX = "diffusion_pytorch_model.bin.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def save_pickled(folder: Path, weight_map: dict[str, str] | None = None, *, shards: list[str] = SHARDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, name in zip(shards, STATE, strict=True):
        torch.save({name: STATE[name]}, folder / shard)
    mapping = dict(zip(STATE, shards, strict=True)) if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": mapping}))
    return folder


def test_they_are_read(tmp_path: Path) -> None:
    save_pickled(tmp_path / "model" / "transformer")
    assert_state(read_all(tmp_path / "model"))
    assert_state(read_all(tmp_path / "model" / "transformer" / INDEX))
    with open_store(tmp_path / "model") as store:
        assert [file.name for file in store.files] == SHARDS
        digest = store.sha256()
    torch.save({"b": STATE["b"] + 1}, tmp_path / "model" / "transformer" / SHARDS[1])
    with open_store(tmp_path / "model") as store:
        assert store.sha256() != digest


def test_a_variant(tmp_path: Path) -> None:
    shards = [name.replace("model-", "model.fp16-") for name in SHARDS]
    save_pickled(tmp_path, shards=shards)
    (tmp_path / INDEX).rename(tmp_path / "diffusion_pytorch_model.bin.index.fp16.json")
    assert_state(read_all(tmp_path))


def test_a_shard_by_itself_leads_to_its_folder(tmp_path: Path) -> None:
    save_pickled(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]}: one shard of several; give its folder {tmp_path}$"):
        open_store(tmp_path / SHARDS[0])
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"it holds shards but no \*\.bin\.index\.json; download the index too"):
        open_store(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_one_shard_of_one_is_the_model(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model-00001-of-00001{suffix}"
    (torch.save if suffix == ".bin" else save_file)(STATE, file)
    assert_state(read_all(file))
    assert_state(read_all(tmp_path))


@pytest.mark.parametrize(
    ("beside", "model"),
    [
        ([WEIGHTS_NAME], WEIGHTS_NAME),
        (["x-00001-of-00002.safetensors", "x.safetensors.index.json"], "x.safetensors.index.json"),
        (["transformer/w.safetensors"], "transformer/w.safetensors"),
        (["wan-Q8_0.gguf"], INDEX),
        (["models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/pytorch_model.bin.index.json"], INDEX),
    ],
)
def test_safetensors_come_first(beside: list[str], model: str) -> None:
    assert select(sorted([INDEX, *SHARDS, *beside]), "here") == model


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "../evil.bin", "b": SHARDS[1]}, "'a.weight' points to '../evil.bin'"),
        ({"a.weight": "/etc/evil.bin"}, "not a .bin file beside it"),
        ({"a.weight": "evil.safetensors"}, "points to 'evil.safetensors', which is not a .bin file"),
        ({"a.weight": "evil.pt"}, "points to 'evil.pt', which is not a .bin file"),
        ({"a.weight": SHARDS[0], "b": "gone.bin"}, "gone.bin: there is no such file"),
        ({"a.weight": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "lists 'c', against its shards"),
        ({"a.weight": SHARDS[0], "c": SHARDS[1]}, "against its shards"),
        ({}, "no weight_map"),
    ],
)
def test_bad_indexes(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "evil.bin")
    folder = save_pickled(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(folder)
    assert str(folder) in str(caught.value)


def test_an_index_of_safetensors_leads_to_no_pickle(tmp_path: Path) -> None:
    torch.save({"b": STATE["b"]}, tmp_path / "b.bin")
    save_shards(tmp_path, {"b": "b.bin"})
    with pytest.raises(CheckpointError, match=r"points to 'b\.bin', which is not a \.safetensors file"):
        open_store(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_pickled(tmp_path)
    torch.save(STATE, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor 'a.weight' is in {SHARDS[0]} too"):
        open_store(tmp_path)


def test_a_shard_with_code_is_refused(tmp_path: Path) -> None:
    save_pickled(tmp_path)
    torch.save({"b": torch.nn.Linear(2, 3)}, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: it pickles more than tensors"):
        open_store(tmp_path)
