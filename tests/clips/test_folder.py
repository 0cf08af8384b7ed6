"""Folders of clips: the documented layout, any clip by number, and shards that are bad in every way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlaconvert.clips.folder import NULL_CONTEXT, ClipFolder, Clips, load_clips, load_null_context
from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError
from mlaconvert.healing.batches import StoredClips, open_source
from mlaconvert.healing.recipe import HealRecipe

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
    spoil_clip(folder / "c.safetensors", 2)
    spoil_clip(folder / "c.safetensors", 0)
    said: list[str] = []
    clips = ClipFolder(folder, CONFIG, bad="skip", on_bad=said.append)
    assert [numbers(clip) for clip in clips] == [[0], [1], [2], [5], [7]]  # it ends, and no clip stands for another
    assert (len(clips), clips.total, clips.unusable) == (5, 8, 0)
    assert numbers(clips.some([4, 3, -1])) == [7, 5, 7]
    with pytest.raises(IndexError):
        clips[5]
    assert [line.partition("; ")[2] for line in said] == [
        "mend or remove this shard (1 of its 1 clips: 0, counted from 0)",
        "mend or remove this shard (2 of its 4 clips: 0, 2, counted from 0)",
    ]
    assert "b.safetensors" in said[0]
    assert "c.safetensors" in said[1]


def numbers(clips: Clips) -> list[int]:
    """The numbers that clips of `shard` hold."""
    assert torch.equal(clips.latents[:, 0, 0, 0, 0], clips.context[:, 0, 0])
    return [int(number) for number in clips.context[:, 0, 0]]


def spoil_clip(path: Path, row: int) -> None:
    tensors = load_file(path)
    tensors["latents"][row, 4, 1, 0, 2] = torch.nan
    save_file(tensors, path)


def test_iterating_a_folder_ends(folder: Path) -> None:
    assert [numbers(clip) for clip in ClipFolder(folder, CONFIG)] == [[i] for i in range(8)]
    for number in (8, -9):
        with pytest.raises(IndexError):
            ClipFolder(folder, CONFIG)[number]


def test_a_shard_that_spoils_later_is_an_error_and_no_other_clip(folder: Path) -> None:
    clips = ClipFolder(folder, CONFIG, bad="skip")
    spoil_clip(folder / "b.safetensors", 0)
    with pytest.raises(InputError, match=r"b\.safetensors: has values that are not finite"):
        clips[3]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shards=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bad=st.sets(st.integers(0, 29), max_size=12),
    torn=st.sets(st.integers(0, 4), max_size=2),
    most=st.integers(1, 9),
)
def test_training_and_validation_never_meet(
    tmp_path_factory: pytest.TempPathFactory, shards: list[int], bad: set[int], torn: set[int], most: int
) -> None:
    """Whatever is bad: good clips alone, each on one side, and on the same side as when none of them is bad."""
    folder, first, there = tmp_path_factory.mktemp("clips"), 0, []
    for i, count in enumerate(shards):
        shard(folder / f"{i}.safetensors", count, first)
        rows = range(first, first + count)
        for number in bad & set(rows):
            spoil_clip(folder / f"{i}.safetensors", number - first)
        if i in torn:
            os.truncate(folder / f"{i}.safetensors", 50)
        else:
            there += rows
        first += count
    held = min(most, len(there) // 4)
    trained, validated = ([n for n in part if n not in bad] for part in (there[: len(there) - held], there[-held:]))
    if not held or not trained or not validated:
        with pytest.raises(InputError):
            open_stored(folder, most)
        return
    source = open_stored(folder, most)
    assert numbers(source.validation(99)) == validated
    assert numbers(source.validation(most)) == validated
    for turn in range(3):
        one = source.clips([turn * len(trained) + i for i in range(len(trained))])
        assert sorted(numbers(one)) == trained


def open_stored(folder: Path, most: int) -> StoredClips:
    said: list[str] = []
    made = HealRecipe(stage="distill", bad_shards="skip", validation_clips=most, seed=3)
    found = open_source(made, folder, CONFIG, said.append, draws=False)
    assert isinstance(found, StoredClips)
    assert bool(said) == (found.folder.unusable > 0 or len(found.folder) < found.folder.total)
    return found


def test_a_fingerprint_tells_which_clips_are_left_out(folder: Path) -> None:
    whole = ClipFolder(folder, CONFIG).fingerprint
    assert ClipFolder(folder, CONFIG, bad="skip").fingerprint == whole
    found = [whole]
    for row in (1, 3):
        spoil_clip(folder / "c.safetensors", row)
        found.append(ClipFolder(folder, CONFIG, bad="skip").fingerprint)
        assert ClipFolder(folder, CONFIG).fingerprint == whole == found[-1].partition("-")[0]
    assert len(set(found)) == 3


def test_a_folder_with_nothing_to_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.safetensors shards"):
        ClipFolder(tmp_path, CONFIG)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="no shard is left"):
        ClipFolder(tmp_path, CONFIG, bad="skip")
    latents = torch.full((2, 5, 2, 3, 4), torch.inf)
    save_file({"latents": latents, "context": torch.zeros(2, 6, 7)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no clip is left"):
        ClipFolder(tmp_path, CONFIG, bad="skip")


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
    stored = StoredClips(ClipFolder(folder, CONFIG), None, held=2, seed=3)
    passes = [stored.clips(list(range(6 * i, 6 * i + 6))).latents[:, 0, 0, 0, 0].tolist() for i in range(3)]
    assert all(sorted(one) == [0, 1, 2, 3, 4, 5] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert stored.validation(5).latents[:, 0, 0, 0, 0].tolist() == [6, 7]
    again = StoredClips(ClipFolder(folder, CONFIG), None, held=2, seed=3)
    assert again.clips([8, 1]).latents[:, 0, 0, 0, 0].tolist() == [passes[1][2], passes[0][1]]
    with pytest.raises(InputError, match="give more clips"):
        StoredClips(ClipFolder(folder, CONFIG), None, held=8, seed=3)
