"""Reading checkpoints: files, folders, shards, pickles, the Hub; and every way in which they can be bad."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SHARDS, STATE, assert_state, read_all, save_shards
from safetensors.torch import save_file

from mlaconvert.errors import CheckpointError
from mlaconvert.files import select
from mlaconvert.files.find import experts, open_store
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.store import check_finite


def test_single_file_and_its_config(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "odd name.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 7}')
    assert_state(read_all(tmp_path / "odd name.safetensors"))
    with open_store(str(tmp_path)) as store:
        assert store.config == {"dim": 7}
        assert store.source == str(tmp_path)
        assert store.files == (tmp_path / "odd name.safetensors",) == (store.path,)
        kept = store.read("a.weight")
    assert torch.equal(kept, STATE["a.weight"])  # a tensor outlives its store


def test_shards(tmp_path: Path) -> None:
    assert_state(read_all(save_shards(tmp_path)))
    with open_store(tmp_path) as store:
        assert [file.name for file in store.files] == SHARDS
        assert store.path == tmp_path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_flattened(tmp_path: Path, suffix: str, zipped: bool) -> None:
    nested = {
        "generator": OrderedDict(STATE),
        "deep": {"er": {"a": STATE["b"]}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 1e-4},
        "step": 3,
        "bare": torch.nn.Parameter(torch.ones(1)),
    }
    torch.save(nested, tmp_path / f"model{suffix}", _use_new_zipfile_serialization=zipped)
    found = read_all(tmp_path)
    assert sorted(found) == ["bare", "deep/er/a", "generator/a.weight", "generator/b"]
    assert torch.equal(found["generator/a.weight"], STATE["a.weight"])
    assert not found["bare"].requires_grad


def test_diffusers_repo_reads_its_transformer(tmp_path: Path) -> None:
    save_shards(tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 1}')
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "vae" / WEIGHTS_NAME)
    assert_state(read_all(tmp_path))
    with open_store(tmp_path) as store:
        assert store.config == {"num_layers": 1}
    assert set(read_all(tmp_path, subfolder="vae")) == {"x"}


def test_native_repo_prefers_the_transformer_to_the_pickles_beside_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / WEIGHTS_NAME)
    save_file({"x": torch.ones(1)}, tmp_path / "golden.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    assert_state(read_all(tmp_path))


@pytest.mark.parametrize("pair", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_experts(tmp_path: Path, pair: tuple[str, str]) -> None:
    for folder in pair:
        save_shards(tmp_path / folder)
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    assert experts(tmp_path) == experts(str(tmp_path)) == pair
    assert experts(tmp_path / pair[0]) == ()
    with pytest.raises(CheckpointError, match=f"two experts; give --subfolder {pair[0]} or --subfolder {pair[1]}"):
        open_store(tmp_path)
    with pytest.raises(CheckpointError, match=f"no folder 'medium'; it has {pair[0]} and {pair[1]}"):
        open_store(tmp_path, subfolder="medium")
    assert_state(read_all(tmp_path, subfolder=pair[1]))


def test_tiny_is_built_in_but_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards(tmp_path / "shipped")
    monkeypatch.setattr(select, "TINY", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert_state(read_all("tiny"))
    save_file({"mine": torch.ones(1)}, tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"tiny: not a weight file"):
        open_store("tiny")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_maps_rather_than_copies(tmp_path: Path) -> None:
    def anonymous_kb() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    state = {f"w{i}": torch.full((4, 1 << 20), float(i)) for i in range(2)}  # 16 MiB each
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    del state
    for name in ("m.safetensors", "m.pt"):
        before = anonymous_kb()
        with open_store(tmp_path / name) as store:
            tensors = [store.read(f"w{i}") for i in range(2)]
            assert [float(t[3, 5]) for t in tensors] == [0.0, 1.0]
            assert anonymous_kb() - before < 8 * 1024


def test_sha256_covers_names_and_contents(tmp_path: Path) -> None:
    folders = [save_shards(tmp_path / name) for name in ("one", "two", "three", "four")]
    data = (folders[2] / SHARDS[1]).read_bytes()
    (folders[2] / SHARDS[1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    swapped = {"a.weight": SHARDS[1], "b": SHARDS[0]}
    save_shards(folders[3], swapped)
    first, second = ((folders[3] / shard).read_bytes() for shard in SHARDS)
    (folders[3] / SHARDS[0]).write_bytes(second)
    (folders[3] / SHARDS[1]).write_bytes(first)
    sums, told = [], []
    for folder in folders:
        with open_store(folder) as store:
            sums.append(store.sha256(lambda *of: told.append(of[:3])))
            size = sum(file.stat().st_size for file in store.files)
            assert told[-1] == ("hash", size, size)
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3
    data = (folders[0] / SHARDS[0]).read_bytes()
    for name in ("x.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(data)
        with open_store(tmp_path / name) as store:
            sums.append(store.sha256())
    assert len(set(sums)) == 5
    assert len(sums[0]) == hashlib.sha256().digest_size * 2


def test_tensors_are_met_while_their_file_is_hashed(tmp_path: Path) -> None:
    state = {
        "wide": torch.randn(3, 131_075, generator=torch.Generator().manual_seed(0)),  # more than one piece
        "half": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "empty": torch.zeros(0, 4),
        "left": torch.arange(11),
    }
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    longhand = hashlib.sha256(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes()).hexdigest()
    met: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def visit(name: str) -> Iterator[Callable[[torch.Tensor], None] | None]:
        met[name] = []
        yield None if name == "left" else lambda part: met[name].append(part.clone())

    with open_store(file) as store:
        assert store.sha256() == store.sha256(visit=visit) == longhand
    assert met.pop("left") == []
    assert set(met) == {"wide", "half", "empty"}
    assert len(met["wide"]) == 2
    for name, parts in met.items():
        found = torch.cat(parts) if parts else state[name].flatten()
        assert torch.equal(found, state[name].flatten())
        assert found.dtype == state[name].dtype


@pytest.mark.parametrize("after", [0, 1])
def test_a_file_that_becomes_shorter_while_it_is_hashed(tmp_path: Path, after: int) -> None:
    """Before its first byte is read, or after some."""
    file = tmp_path / "model.safetensors"
    save_file({"wide": torch.zeros(3, 1 << 20)}, file)
    with open_store(file) as store, pytest.raises(CheckpointError, match="has become shorter while it was read"):
        store.sha256(lambda _, done, *__: os.truncate(file, 1_500_000) if done >= after else None)


def test_check_finite(tmp_path: Path) -> None:
    check_finite(STATE["b"], "b", "f")
    check_finite(torch.tensor([3]), "count", "f")
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
        tensor[2, 1] = bad
        with pytest.raises(CheckpointError, match=r"model\.pt: tensor 'b\.weight' holds NaN or infinite"):
            check_finite(tensor, "b.weight", Path("model.pt"))
