"""Conversion of whole checkpoints: small ones of odd sizes in every layout, and the golden model without loss."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import EXACT, NATIVE, SVD, SaveFolder, State, files, listing
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.report import ConversionReport
from mlaconvert.conversion.run import ConversionListener, convert
from mlaconvert.conversion.verify import verify_conversion
from mlaconvert.errors import CheckpointError, MLAConvertError, OutputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files import writer
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.output import Output
from mlaconvert.model.load import load_model


def test_conversion_json_says_what_was_done(source: Path, state: State, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", ConvertRecipe(init="svd", layers="1-2", kv_rank=6))
    text = (tmp_path / "out" / "conversion.json").read_text()
    data = json.loads(text)
    assert data["source"]["name"] == "model"
    with open_checkpoint(source) as checkpoint:
        assert data["source"]["sha256"] == checkpoint.store.sha256() == report.models[0].sha256
    assert data["recipe"] | {"kv_rank": 6, "rope_dim": 4, "nope_dim": 16, "q_rank": 30} == data["recipe"]
    assert data["recipe"]["layers"] == "1-2"
    assert data["cache_scalars_per_token"] == {"dense": 360, "mla": 120 + 10 + 10}
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    for layer in data["layers"]:
        names = (f"blocks.{layer['layer']}.self_attn.{name}.weight" for name in "kv")
        singular = np.linalg.svd(np.concatenate([state[name].double().numpy() for name in names]), compute_uv=False)
        np.testing.assert_allclose(layer["singular_values"], singular, rtol=1e-5)
        energy = (singular**2).cumsum() / (singular**2).sum()
        assert layer["effective_rank"] == int((energy < 0.99).sum()) + 1
        assert layer["energy_at_kv_rank"] == pytest.approx(energy[5], rel=1e-5)
        assert {"rope", "latent", "query"} <= layer["errors"].keys()
        assert 0 < layer["errors"]["latent"] < 1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "layers 1-2" in readme
    assert str(tmp_path) not in text + readme
    assert listing(tmp_path / "out") == ["README.md", "config.json", "conversion.json", WEIGHTS_NAME]


@pytest.mark.parametrize("init", ["svd", "random", "lossless"])
def test_same_input_and_seed_give_the_same_bytes(
    state: State, save_folder: SaveFolder, tmp_path: Path, init: Any
) -> None:
    """From copies in two places, without touching torch's own generator."""
    recipe = ConvertRecipe(init=init)
    for place in ("here", "there"):
        torch.manual_seed(len(place))
        given = save_folder(state, NATIVE, f"{place}/model")
        before = torch.get_rng_state()
        convert(given, tmp_path / place / "out", recipe, verify=True)
        assert torch.equal(torch.get_rng_state(), before)
    assert files(tmp_path / "here" / "out") == files(tmp_path / "there" / "out")


@pytest.mark.parametrize("threads", [2, 5])
def test_layers_side_by_side_are_those_of_one_thread(source: Path, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            convert(source, tmp_path / str(count), SVD)
            assert torch.get_num_threads() == count
        convert(source, tmp_path / "alone", dataclasses.replace(SVD, layers="2"))
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / str(threads))
    together, alone = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("1", "alone"))
    names = [name for name in together if name.startswith("blocks.2.self_attn.")]
    assert len(names) > 8
    assert all(torch.equal(together[name], alone[name]) for name in names)


def test_random_init_follows_its_seed_layer_by_layer(source: Path, tmp_path: Path) -> None:
    weights = {}
    for name, recipe in (
        ("all", ConvertRecipe(init="random", seed=3)),
        ("one", ConvertRecipe(init="random", seed=3, layers="2")),
        ("other", ConvertRecipe(init="random", seed=4)),
    ):
        convert(source, tmp_path / name, recipe)
        weights[name] = load_file(tmp_path / name / WEIGHTS_NAME)
    key = "blocks.{}.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(weights["all"][key.format(2)], weights["one"][key.format(2)])
    assert not torch.equal(weights["all"][key.format(2)], weights["other"][key.format(2)])
    assert not torch.equal(weights["all"][key.format(1)], weights["all"][key.format(2)])


def test_large_outputs_are_sharded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's limit of 5 GB, made small."""
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 150_000)
    convert(source, tmp_path / "out", SVD)
    assert (tmp_path / "out" / f"{WEIGHTS_NAME}.index.json").is_file()
    assert len(list((tmp_path / "out").glob("*-of-*.safetensors"))) > 1
    load_model(tmp_path / "out")


def test_two_experts_keep_their_layout(pair: Path, state: State, tmp_path: Path) -> None:
    plans = []
    report = convert(pair, tmp_path / "out", EXACT, listener=ConversionListener(on_plan=plans.append), verify=True)
    assert [plan.subfolder for plan in plans] == ["high_noise_model", "low_noise_model"]
    assert [model.plan.subfolder for model in report.models] == ["high_noise_model", "low_noise_model"]
    assert all(model.verification is not None for model in report.models)
    for name, gain in (("high_noise_model", 1.0), ("low_noise_model", 1.25)):
        written = load_file(tmp_path / "out" / name / WEIGHTS_NAME)
        assert torch.equal(written["head.head.weight"], gain * state["head.head.weight"])
        load_model(Source(tmp_path / "out", subfolder=name))
    assert listing(tmp_path / "out")[0] == "high_noise_model"
    convert(Source(pair, subfolder="low_noise_model"), tmp_path / "one", EXACT)
    assert files(tmp_path / "one") == files(tmp_path / "out" / "low_noise_model")


def test_an_expert_that_fails_takes_the_other_with_it(pair: Path, state: State, tmp_path: Path) -> None:
    bad = dict(state)
    bad["blocks.1.ffn.2.bias"] = bad["blocks.1.ffn.2.bias"].clone().index_fill_(0, torch.tensor(3), float("nan"))
    save_file(bad, pair / "low_noise_model" / WEIGHTS_NAME)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.2\.bias"):
        convert(pair, tmp_path / "out", SVD)
    assert listing(tmp_path) == before


def test_a_disk_that_fails_at_the_end_leaves_the_old_experts(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(pair, tmp_path / "out", SVD)
    before, rename = files(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "model" and target.name == "out":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match=r"writing failed \(No space left"):
        convert(pair, Output(tmp_path / "out", overwrite=True), EXACT)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / ".out.partial")  # kept: everything was finished
    assert files(tmp_path) == before


def test_overwriting_two_experts(pair: Path, tmp_path: Path) -> None:
    convert(pair, tmp_path / "out", SVD)
    with pytest.raises(OutputError, match="exists"):
        convert(pair, tmp_path / "out", EXACT)
    convert(pair, Output(tmp_path / "out", overwrite=True), EXACT)
    assert load_model(Source(tmp_path / "out", subfolder="high_noise_model")).config.cached_scalars() == (9, 9, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pair"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="not a model folder"):
        convert(pair, Output(tmp_path / "mine", overwrite=True), SVD)


def tamper(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / WEIGHTS_NAME)


def check(source: Path, report: ConversionReport) -> dict[int, float]:
    with open_checkpoint(source) as checkpoint:
        plan = report.models[0].plan
        found = verify_conversion(checkpoint, report.output, plan, device=torch.device("cpu"))
    assert found.passed_through == 66
    return dict(found.attention_errors)


def test_verification_sees_one_flipped_bit(source: Path, converted: ConversionReport) -> None:
    check(source, converted)

    def flip(tensor: Tensor) -> Tensor:
        tensor.view(torch.int32)[5] ^= 1
        return tensor

    tamper(converted.output, "blocks.1.cross_attn.q.bias", flip)
    with pytest.raises(MLAConvertError, match=r"blocks\.1\.cross_attn\.q\.bias") as raised:
        check(source, converted)
    assert raised.value.exit_code == 1


def test_a_layer_that_puts_out_nothing_is_verified(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Its output projection is zero, as where attention was switched off or training began."""
    silent = {f"blocks.1.self_attn.o.{leaf}": torch.zeros_like(state[f"blocks.1.self_attn.o.{leaf}"])
              for leaf in ("weight", "bias")}  # fmt: skip
    source = save_folder(state | silent, NATIVE, "silent")
    report = convert(source, tmp_path / "out", SVD, verify=True)
    errors = check(source, report)
    assert errors[1] == 0
    assert min(errors[0], errors[2]) > 0
    tamper(report.output, "blocks.1.self_attn.q_a_proj.weight", lambda t: t * float("nan"))
    with pytest.raises(MLAConvertError, match="attention output of layer 1 is not finite"):
        check(source, report)


def test_verification_measures_attention(source: Path, converted: ConversionReport) -> None:
    """Doubling W_O and its bias doubles the output: an error of one, in that layer only."""
    for leaf in ("weight", "bias"):
        tamper(converted.output, f"blocks.1.self_attn.o.{leaf}", lambda t: 2 * t)
    errors = check(source, converted)
    assert errors[1] == pytest.approx(1, abs=1e-4)
    assert max(errors[0], errors[2]) < 1e-5
    tamper(converted.output, "blocks.1.self_attn.o.bias", lambda t: t * float("inf"))
    with pytest.raises(MLAConvertError, match="layer 1 is not finite"):
        check(source, converted)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The most anonymous memory taken inside the block, beyond what there was at its start."""
    start, highest, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tensors_pass_through_one_at_a_time(state: State, save_folder: SaveFolder, tmp_path: Path) -> None:
    """Six tensors of 24 MB: one at a time needs a few copies of one (the check for NaN), not all of them."""
    width = 100_000
    wide = dict(state)
    for i in range(3):
        wide[f"blocks.{i}.ffn.0.weight"] = torch.ones(width, 60)
        wide[f"blocks.{i}.ffn.0.bias"] = torch.ones(width)
        wide[f"blocks.{i}.ffn.2.weight"] = torch.ones(60, width)
    source = save_folder(wide, NATIVE | {"ffn_dim": width})
    del wide
    with peak_memory() as peak:
        convert(source, tmp_path / "out", SVD)
    assert 0 < peak() < 100e6
