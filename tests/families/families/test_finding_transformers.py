"""The transformer is found under any prefix, in safetensors and pickles, whatever else the file holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families_cases import SaveFolder, State, to_diffusers
from golden_relatives import make_worldplay
from safetensors.torch import load_file, save_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError
from mlaconvert.families.merged import remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.model.load import load_model


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


ENCODERS: State = {
    "text_encoders.umt5xxl.transformer.shared.weight": torch.ones(5, 4),
    "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 3),
    "vae.encoder.conv1.weight": torch.ones(3, 2),
    "vae.decoder.middle.0.residual.0.gamma": torch.ones(3),
    "vae.patch_embedding.weight": torch.ones(1),  # no blocks below it
}

# What made the file -> (its tensors, of the model's and another's; --state-key; the state key; streaming; left out).
Made = Callable[[State, State], State]
FILES: dict[str, tuple[Made, str | None, str | None, bool, str]] = {
    "rCM": (lambda s, o: below("net.", s), None, "net", False, ""),
    "rCM's average": (lambda s, o: below("net.", o) | below("net_ema.", s), "net_ema", "net_ema", False, "net"),
    "UniAnimate-DiT": (lambda s, o: below("pipe.dit.", s), None, "pipe.dit", False, ""),
    "ComfyUI": (lambda s, o: below("model.diffusion_model.", s), None, None, False, ""),
    "all in one": (
        lambda s, o: below("model.diffusion_model.", s) | ENCODERS, None, None, False, "text_encoders, vae",
    ),
    "all in one, without a prefix": (lambda s, o: s | ENCODERS, None, None, False, "text_encoders, vae"),
    "a flattened student": (
        lambda s, o: below("generator_ema.model.", s) | below("generator.model.", o) | below("critic.model.", o),
        None, "generator_ema", True, "generator, critic",
    ),
    "a flattened student, chosen": (
        lambda s, o: below("generator_ema.model.", o) | below("generator.model.", s), "generator", "generator", True,
        "generator_ema",
    ),
    "chosen by its whole prefix": (
        lambda s, o: below("a.x.", o) | below("a.y.", s), "a.y", "a.y", False, "a",
    ),
    "a robot's": (
        lambda s, o: below("action_head.model.", s) | {"action_head.action_encoder.w": torch.ones(2)},
        None, "action_head", False, "action_head",
    ),
    "a copy inside": (lambda s, o: s | below("teacher.", o), None, None, False, "teacher"),
    "sharded training": (
        lambda s, o: {f"dit._fsdp_wrapped_module.{name}": tensor for name, tensor in s.items()},
        None, "dit", False, "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=["wan", "hy-worldplay"])
def model(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of each family."""
    return golden if request.param == "wan" else make_worldplay(tmp_path_factory.mktemp("found"))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("case", FILES)
def test_any_prefix(case: str, pickled: bool, model: Path, tmp_path: Path) -> None:
    make, chosen, key, streaming, beside = FILES[case]
    state = load_file(model / WEIGHTS_NAME)
    other = {name: tensor + 1 for name, tensor in state.items()}
    file = tmp_path / ("model.pt" if pickled else "model.safetensors")
    (torch.save if pickled else save_file)(make(state, other), file)
    source = Source(file, state_key=chosen, config=model / "config.json")
    with open_checkpoint(source) as opened:
        assert opened.state_key == key
        assert opened.config.few_step == (streaming and opened.family.name == "wan")
        theirs = {opened.family.source(name, "native"): name for name in opened.names}
        assert set(theirs) == set(state)
        assert all(torch.equal(opened.read(theirs[name]), tensor) for name, tensor in state.items())
        said = [line.removeprefix("left out, beside the transformer: ") for line in remarks(opened)]
        assert sorted(said[0].split(", ") if said else [""]) == sorted(beside.split(", "))


def test_nested_pickles(golden: Path, golden_state: State, tmp_path: Path) -> None:
    data: dict[str, Any] = {"trainer": {"nets": {"dit": golden_state}}, "optimizer": {"state": {"a": torch.ones(1)}}}
    torch.save(data, tmp_path / "last.ckpt")
    with open_checkpoint(Source(tmp_path / "last.ckpt", config=golden / "config.json")) as opened:
        assert opened.state_key == "trainer/nets/dit"
        assert torch.equal(opened.read("head.modulation"), golden_state["head.modulation"])


@pytest.mark.parametrize(
    ("prefixes", "state_key", "says"),
    [
        (("net.", "net_ema."), None, "Choose with --state-key; there: 'net', 'net_ema'$"),
        (("a.x.", "a.y."), "a", r"Choose with --state-key; there: 'a\.x', 'a\.y'$"),
        (("net.",), "ema", "there is no state key 'ema'; there: 'net'$"),
        (("model.", "diffusion_model."), None, "there: 'diffusion_model', 'model'$"),
    ],
)
def test_several_are_offered(
    prefixes: tuple[str, ...], state_key: str | None, says: str, model: Path, tmp_path: Path
) -> None:
    state: State = {}
    for prefix in prefixes:
        state |= below(prefix, load_file(model / WEIGHTS_NAME))
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(Source(tmp_path / "m.safetensors", state_key=state_key))


def test_what_is_chosen_is_recorded_and_found_again(golden: Path, golden_state: State, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in golden_state.items()}
    save_file(below("net.", other) | below("net_ema.", golden_state), tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_bytes((golden / "config.json").read_bytes())
    convert(Source(tmp_path / "m.safetensors", state_key="net_ema"), tmp_path / "out", ConvertRecipe(init="random"))
    convert(golden, tmp_path / "plain", ConvertRecipe(init="random"))
    made, plain = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("out", "plain"))
    assert made.keys() == plain.keys()
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["state_key"] == "net_ema"


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_linear_patch_embedding(
    layout: str, golden_state: State, golden_config: dict[str, Any], save_folder: SaveFolder, tmp_path: Path
) -> None:
    """It is the convolution: on patches flattened by channel, row and column both give the same tokens."""
    weight = golden_state["patch_embedding.weight"]
    flat = dict(golden_state) | {"patch_embedding.weight": weight.reshape(len(weight), -1)}
    source = save_folder(flat if layout == "native" else to_diffusers(golden_state) | {
        "patch_embedding.weight": weight.reshape(len(weight), -1)
    }, {"num_heads": 4, "text_len": 16})  # fmt: skip
    model = load_model(source)
    video = torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(2))
    patches = video.unfold(3, 2, 2).unfold(4, 2, 2)  # [1, C, F, H/2, W/2, 2, 2]
    tokens = F.linear(patches.permute(0, 2, 3, 4, 1, 5, 6).flatten(4), flat["patch_embedding.weight"])
    ours = F.conv3d(video, model.patch_embedding.weight, stride=(1, 2, 2))
    assert torch.allclose(ours.permute(0, 2, 3, 4, 1), tokens, atol=1e-5)
    convert(source, tmp_path / "out", ConvertRecipe(init="random"), verify=True)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS_NAME)["patch_embedding.weight"], weight)
