"""Folders of clips: the documented layout, any clip by number, and shards that are bad in every way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlaconvert.config import WanConfig
from mlaconvert.data import NULL_CONTEXT, ClipFolder, load_clips, load_null_context
from mlaconvert.errors import InputError
from mlaconvert.heal.data import Stored

CONFIG = WanConfig(dim=24, num_heads=2, num_layers=1, ffn_dim=8, in_dim=5, out_dim=5, text_dim=7, patch_size=(1, 3, 2))


def shard(path: Path, count: int, first: int = 0, frames: int = 2) -> None:
    """`count` clips that hold their own number."""
    numbers = torch.arange(first, first + count).float()
    save_file(
        {
            "latents": numbers.view(-1, 1, 1, 1, 1).expand(-1, 5, frames, 3, 4).contiguous(),
            "context": numbers.view(-1, 1, 1).expand(-1, 6, 7).contiguous(),
        },
        path,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 3, 1 and 4 clips, numbered in the order of their names."""
    for name, count, first in (("a", 3, 0), ("b", 1, 3), ("c", 4, 4)):
        shard(tmp_path / f"{name}.safetensors", count, first)
    return tmp_path


BAD = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "no latents": lambda path: save_file({"context": torch.zeros(1, 6, 7)}, path),
    "channels": lambda path: save_file({"latents": torch.zeros(1, 4, 2, 3, 4), "context": torch.zeros(1, 6, 7)}, path),
    "text": lambda path: save_file({"latents": torch.zeros(1, 5, 2, 3, 4), "context": torch.zeros(1, 6, 8)}, path),
    "count": lambda path: save_file({"latents": torch.zeros(2, 5, 2, 3, 4), "context": torch.zeros(1, 6, 7)}, path),
    "frames": lambda path: shard(path, 1, frames=9),
    "empty": lambda path: save_file({"latents": torch.zeros(0, 5, 2, 3, 4), "context": torch.zeros(0, 6, 7)}, path),
}


def test_clips_by_number(folder: Path) -> None:
    clips = ClipFolder(folder, CONFIG)
    assert (len(clips), clips.clip_shape) == (8, (5, 2, 3, 4))
    found = clips.some([7, 0, 3, 2])
    assert found.latents.shape == (4, 5, 2, 3, 4)
    assert found.latents[:, 0, 0, 0, 0].tolist() == found.context[:, 0, 0].tolist() == [7, 0, 3, 2]


def test_the_first_clips_of_a_folder(folder: Path) -> None:
    found = load_clips(folder, CONFIG, 5)
    assert found.latents[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.context.shape == (5, 6, 7)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shard_is_refused_by_name_or_skipped(folder: Path, kind: str) -> None:
    BAD[kind](folder / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors") as raised:
        ClipFolder(folder, CONFIG)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"b\.safetensors"):
        load_clips(folder, CONFIG, 8)
    said: list[str] = []
    clips = ClipFolder(folder, CONFIG, bad="skip", on_bad=said.append)
    assert clips.some(range(7)).latents[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert len(said) == 1
    assert "b.safetensors" in said[0]


def test_values_that_are_not_finite_are_found_when_they_are_read(folder: Path) -> None:
    latents = torch.zeros(1, 5, 2, 3, 4)
    latents[0, 3, 1, 2, 2] = torch.nan
    save_file({"latents": latents, "context": torch.zeros(1, 6, 7)}, folder / "b.safetensors")
    strict = ClipFolder(folder, CONFIG)
    assert float(strict[0].latents.max()) == 0
    with pytest.raises(InputError, match=r"b\.safetensors: has values that are not finite"):
        strict[3]
    said: list[str] = []
    clips = ClipFolder(folder, CONFIG, bad="skip", on_bad=said.append)
    for _ in range(2):  # the same number, the same clip; one complaint
        assert float(clips[3].latents.mean()) == 4
    assert len(said) == 1


def test_a_folder_with_nothing_to_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.safetensors shards"):
        ClipFolder(tmp_path, CONFIG)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="no shard is left"):
        ClipFolder(tmp_path, CONFIG, bad="skip")
    latents = torch.full((2, 5, 2, 3, 4), torch.inf)
    save_file({"latents": latents, "context": torch.zeros(2, 6, 7)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no clip is left"):
        ClipFolder(tmp_path, CONFIG, bad="skip")[0]


def test_the_empty_prompt(folder: Path) -> None:
    assert load_null_context(folder, CONFIG) is None
    save_file({"context": torch.ones(1, 6, 7)}, folder / NULL_CONTEXT)
    found = load_null_context(folder, CONFIG)
    assert found is not None
    assert found.shape == (1, 6, 7)
    assert len(ClipFolder(folder, CONFIG)) == 8  # it is no shard
    for wrong in ({"context": torch.ones(2, 6, 7)}, {"context": torch.ones(1, 6, 8)}, {"text": torch.ones(1, 6, 7)}):
        save_file(wrong, folder / NULL_CONTEXT)
        with pytest.raises(InputError, match=NULL_CONTEXT):
            load_null_context(folder, CONFIG)


def test_an_order_that_is_new_in_every_pass_and_keeps_its_validation(folder: Path) -> None:
    stored = Stored(ClipFolder(folder, CONFIG), None, held=2, seed=3)
    passes = [stored.clips(list(range(6 * i, 6 * i + 6))).latents[:, 0, 0, 0, 0].tolist() for i in range(3)]
    assert all(sorted(one) == [0, 1, 2, 3, 4, 5] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert stored.validation(5).latents[:, 0, 0, 0, 0].tolist() == [6, 7]
    again = Stored(ClipFolder(folder, CONFIG), None, held=2, seed=3)
    assert again.clips([8, 1]).latents[:, 0, 0, 0, 0].tolist() == [passes[1][2], passes[0][1]]
    with pytest.raises(InputError, match="give more clips"):
        Stored(ClipFolder(folder, CONFIG), None, held=8, seed=3)
