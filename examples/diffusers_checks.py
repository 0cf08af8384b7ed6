"""What diffusers asks of every model, asked of a converted one:

    python examples/diffusers_checks.py tiny-mla

diffusers' own test suite (its `ModelTesterMixin` and the mixins beside it) is in no release, so these are the same
questions, put to the installed package's public API: saving and loading, whole and in shards; device maps; precision
that is chosen, or cast layer by layer; group offloading, to memory and to a disk; training, gradient checkpointing, an
average of weights. On a CPU, from a folder or Hub id, in a minute for small models; prints a line for each.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from mlaconvert.errors import InputError
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel

CPU = torch.device("cpu")
FRAMES = 6
CHECKS: dict[str, Callable[[Path | str, Path], None]] = {}


def check(function: Callable[[Path | str, Path], None]) -> Callable[[Path | str, Path], None]:
    """A check takes the model's folder or Hub id and a folder to write to, and raises AssertionError."""
    CHECKS[function.__name__] = function
    return function


def load(folder: Path | str, **options: Any) -> Any:
    return WanMLATransformer3DModel.from_pretrained(folder, **options)


def inputs(model: Any, seed: int = 0) -> dict[str, Any]:
    """One video of a few frames and tokens, two patches high and three wide."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    _, high, wide = config.patch_size
    text = config.text_len if config.image_dim else 7  # with CLIP features, diffusers counts on all of them
    latents = torch.randn(1, config.in_channels, FRAMES, 2 * high, 3 * wide, generator=generator)
    given: dict[str, Any] = {"hidden_states": latents, "timestep": torch.tensor([300.0])}
    given["encoder_hidden_states"] = torch.randn(1, text, config.text_dim, generator=generator)
    if config.image_dim:
        given["encoder_hidden_states_image"] = torch.randn(1, 257, config.image_dim, generator=generator)
    return given


@torch.no_grad()
def output(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).sample
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert difference(found, expected) < 1e-5, difference(found, expected)


@check
def outputs(folder: Path | str, scratch: Path) -> None:
    """Finite, of the latents' size, the same twice, and the same as a tuple."""
    model = load(folder)
    found = output(model)
    assert found.isfinite().all()
    assert found.shape == (1, model.config.out_channels, *inputs(model)["hidden_states"].shape[2:])
    assert torch.equal(output(model), found)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model), return_dict=False)[0], found)


@check
def signature(folder: Path | str, scratch: Path) -> None:
    """Called as diffusers' own class is."""
    model = load(folder)
    skyreels = isinstance(model, SkyReelsV2Transformer3DModel)
    theirs = SkyReelsV2Transformer3DModel if skyreels else WanTransformer3DModel
    assert isinstance(model, theirs)
    assert inspect.signature(type(model).forward) == inspect.signature(theirs.forward)


@check
def config(folder: Path | str, scratch: Path) -> None:
    """A model of the same tensors comes of the config, and of its JSON."""
    model = load(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plain = {key: value for key, value in json.loads(model.to_json_string()).items() if key[0] != "_"}
    for made in (type(model).from_config(model.config), type(model)(**plain)):
        assert {name: tensor.shape for name, tensor in made.state_dict().items()} == shapes
        assert made.dtype == torch.float32


@check
def save_and_load(folder: Path | str, scratch: Path) -> None:
    """Written and read again, also in a half precision: the same tensors, dtypes and output."""
    for dtype in (None, torch.bfloat16):
        model = load(folder, dtype=dtype)
        model.save_pretrained(scratch / str(dtype))
        again = load(scratch / str(dtype))
        tensors = again.state_dict()
        assert tensors.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == tensors[name].dtype, name
            assert torch.equal(tensor, tensors[name]), name
        if dtype is None:
            same(output(again), output(model))


@check
def save_in_shards(folder: Path | str, scratch: Path) -> None:
    """Several files and an index, of which the same model comes."""
    model = load(folder)
    model.save_pretrained(scratch / "shards", max_shard_size=model.get_memory_footprint() // 3)
    (index,) = (scratch / "shards").glob("*.index.json")
    files = set(json.loads(index.read_text())["weight_map"].values())
    assert len(files) > 1
    assert files == {path.name for path in (scratch / "shards").glob("*.safetensors")}
    same(output(load(scratch / "shards")), output(model))


@check
def half_precision(folder: Path | str, scratch: Path) -> None:
    """What diffusers keeps in float32 stays there, all else is narrow, and the output is near."""
    model, narrow = load(folder, dtype=torch.float32), load(folder, dtype=torch.bfloat16)
    kept = set(narrow._keep_in_fp32_modules)
    for name, parameter in narrow.named_parameters():
        wide = not kept.isdisjoint(name.split("."))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    given = {name: value if name == "timestep" else value.to(torch.bfloat16) for name, value in inputs(narrow).items()}
    with torch.no_grad():
        assert difference(narrow(**given).sample, output(model)) < 0.1


@check
def footprint(folder: Path | str, scratch: Path) -> None:
    """Counted as the tensors lie in memory."""
    model = load(folder)
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in tensors)
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@check
def device_maps(folder: Path | str, scratch: Path) -> None:
    """On one device, spread by hand, and with as little memory as puts blocks on a disk."""
    model = load(folder)
    expected, size = output(model), model.get_memory_footprint()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a parameter of the model itself is no submodule
        same(output(load(folder, device_map="cpu")), expected)
        by_hand = {name: "cpu" for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)]}
        by_hand |= {f"blocks.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.blocks))}
        del by_hand["blocks"]
        away = load(folder, device_map=by_hand, offload_folder=scratch / "by hand")
        assert all(parameter.is_meta for parameter in away.blocks[1].parameters())
        same(output(away), expected)
        spread = load(folder, device_map="auto", max_memory={"cpu": size * 2 // 3}, offload_folder=scratch / "auto")
        assert any(parameter.is_meta for parameter in spread.parameters())
        same(output(spread), expected)


@check
def layerwise_casting(folder: Path | str, scratch: Path) -> None:
    """Weights lie narrow between uses: less memory, and an output that is near."""
    for storage, most in ((torch.float16, 0.01), (torch.float8_e4m3fn, 0.5)):
        model = load(folder, dtype=torch.float32)
        expected, wide = output(model), model.get_memory_footprint()
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert model.get_memory_footprint() < wide
        found = [output(model) for _ in range(2)]
        assert torch.equal(*found)
        assert difference(found[0], expected) < most
        dtypes = {parameter.dtype for parameter in model.blocks.parameters()}
        assert storage in dtypes  # between passes, too


@check
def group_offload(folder: Path | str, scratch: Path) -> None:
    """Block by block and leaf by leaf, to memory and to a disk."""
    expected = output(load(folder))
    for kind in ("block_level", "leaf_level"):
        for disk in (None, scratch / f"{kind} disk"):
            model = load(folder)
            options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            if disk is not None:
                disk.mkdir()
                options |= {"offload_to_disk_path": str(disk)}
            model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **options)
            for _ in range(2):
                same(output(model), expected)
            assert disk is None or list(disk.iterdir())


def gradients(model: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**inputs(model)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@check
def training(folder: Path | str, scratch: Path) -> None:
    """A gradient for every weight that the output depends on, and a step that changes them."""
    model = load(folder, dtype=torch.float32)
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    missing = {name for name, _ in model.named_parameters()} - found.keys()
    assert all("kv_quantizer" in name for name in missing), missing  # tables that count bits are not trained
    before = output(model.eval())
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert difference(output(model), before) > 0


@check
def gradient_checkpointing(folder: Path | str, scratch: Path) -> None:
    """Blocks are computed again on the way back, and the gradients are the same."""
    model = load(folder, dtype=torch.float32)
    plain = gradients(model)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    again = gradients(model)
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@check
def average_of_weights(folder: Path | str, scratch: Path) -> None:
    """diffusers' moving average takes the weights, moves with them, and is saved and loaded as the model is."""
    model = load(folder, dtype=torch.float32)
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.step(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    decay = average.cur_decay_value
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, old + (1 - decay), atol=1e-5)
    average.restore(model.parameters())
    assert all(torch.allclose(p, old + 1, atol=1e-5) for p, old in zip(model.parameters(), before, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="diffusers' checks of a model, on a converted one")
    parser.add_argument("folder", help="a converted folder or Hub id")
    folder = parser.parse_args().folder
    try:
        latent = load(folder).contract.latent_layers
    except InputError as error:
        parser.error(str(error))
    if not latent:
        parser.error(f"{folder}: the model is dense; convert it first, mlaconvert convert {folder} -o DIR")
    failed = 0
    for name, function in CHECKS.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                function(folder, Path(scratch))
            except Exception as error:  # whatever it is, the other checks go on
                failed += 1
                print(f"{name.replace('_', ' ')}: failed, {type(error).__name__}: {error}")
            else:
                print(f"{name.replace('_', ' ')}: passed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
