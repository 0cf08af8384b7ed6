"""What CONTRIBUTING.md says of five changes: each touches the rooms that its table names, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from support import randomize, relative
from torch import Tensor

import mlaconvert
from mlaconvert.clips.folder import Clips
from mlaconvert.config import parsing
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion import from_weights, recipe
from mlaconvert.conversion.calibration.windows import Regime, windows
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.families import known, wrappers
from mlaconvert.families import open as families
from mlaconvert.families.protocol import Layout
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.inputs import read_json
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.frames import forcing_layout, noisy_layout, views
from mlaconvert.latent.factorize import Factors
from mlaconvert.model import window
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import LatentSize, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

ROOT = Path(mlaconvert.__file__).parent
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

MODELS = re.compile(
    r"Wan(?![a-z])|(?<![a-z])wan(?![a-z])|WAN|"
    r"(?i:sky_?reels|causvid|self.?forcing|longlive|hunyuan|ltx|cogvideo|mochi|matrix.?game|world.?play)"
)
OURS = {"WanConfig", "WanModel"}  # one geometry and one transformer for all families
# Rooms that name models for a reason. Nothing here decides how a checkpoint is read or converted.
NAMED = {
    "base/repository.py": "which file in a base repository is its VAE, and what to give instead of one",
    "base/text.py": "the encoder that was expected, in an error",
    "base/vae.py": "diffusers' class of the VAE and its conversion",
    "cli/__init__.py": "help",
    "cli/convert_options.py": "help",
    "cli/encode.py": "help, and the default base",
    "cli/help.py": "examples",
    "cli/options.py": "help",
    "publishing/hub.py": "an example in an error",
}


def test_the_table_of_changes_names_what_is_there() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "/" in line]
    assert len(rows) == 5
    for path in re.findall(r"`([\w/]+(?:/|\.py))`", "".join(rows)):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT.parent / link).exists(), link
    assert {"Init", "STARTS"} <= set(re.findall(r"`(\w+)`", rows[-1]))


def docstrings(tree: ast.AST) -> set[int]:
    """Texts that stand alone: of modules, classes, functions and fields."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    return {id(line.value) for body in bodies for line in body if isinstance(line, ast.Expr)}


def words(tree: ast.AST) -> list[str]:
    """Every name and text of the code, without docstrings."""
    told, found = docstrings(tree), []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in told:
                found.append(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found.append(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                found.append(name)
    return found


def models_named(tree: ast.AST) -> set[str]:
    return {word for word in words(tree) if MODELS.search(word) and word not in OURS}


def test_names_of_models_stay_in_families() -> None:
    found = {
        path: names
        for path, tree in MODULES.items()
        if not path.startswith(("families/", "integrations/", "clips/tiny/")) and (names := models_named(tree))
    }
    assert found.keys() == NAMED.keys(), {path: found[path] for path in found.keys() - NAMED.keys()}


def test_a_name_of_a_model_shows() -> None:
    code = (
        'def f(x: WanConfig) -> WanModel:\n    """As SkyReels does."""\n    return "WanModel2" if LTX else y.wan_steps'
    )
    assert models_named(ast.parse(code)) == {"WanModel2", "LTX", "wan_steps"}
    assert models_named(ast.parse("wants = 'unwanted'")) == set()


class Renamed(WanFamily):
    """A family that calls its blocks and their self-attention something else."""

    name = "renamed"

    def detect(self, raw_config: Any, names: Collection[str]) -> bool:
        return any(name.startswith("stack.0.mixer.") for name in names)

    def layout(self, _names: Collection[str]) -> Layout:
        return "native"

    def canonical(self, name: str, layout: Layout) -> str | None:
        return super().canonical(name.replace("stack.", "blocks.").replace("mixer.", "self_attn."), layout)

    def source(self, name: str, layout: Layout) -> str:
        return super().source(name, layout).replace("blocks.", "stack.").replace("self_attn.", "mixer.")


def test_a_family_is_one_line_among_the_known(
    golden: Path, golden_state: dict[str, Tensor], golden_config: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, save_folder: Callable[..., Path],
) -> None:  # fmt: skip
    """A checkpoint under another family's names converts to the same tensors, under the names of its own family."""
    renamed = Renamed()
    theirs = {renamed.source(name, "native"): tensor for name, tensor in golden_state.items()}
    folder = save_folder(theirs, golden_config)
    for module in (families, wrappers):  # both read the list of families/known.py
        monkeypatch.setattr(module, "FAMILIES", (*known.FAMILIES, renamed))
    wanted = ConvertRecipe(init="svd", kv_rank=9, seed=3)
    for source, output in ((golden, "ours"), (folder, "theirs")):
        convert(source, tmp_path / output, wanted)
    ours, found = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("ours", "theirs"))
    assert found.keys() == {renamed.source(name, "native") for name in ours} != ours.keys()
    assert all(torch.equal(found[renamed.source(name, "native")], tensor) for name, tensor in ours.items())
    with families.open_checkpoint(tmp_path / "theirs") as opened:
        assert opened.describe().startswith("renamed t2v, native layout")
    assert same(
        load_model(tmp_path / "theirs").state_dict()["blocks.1.self_attn.o.bias"], ours["blocks.1.self_attn.o.bias"]
    )


# --- how the cache evicts ----------------------------------------------------------------------------------------


def without_sink(rule: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*given: Any, **named: Any) -> Any:
        forget = [
            dataclasses.replace(value, sink_frames=0) if isinstance(value, StreamingConfig) else value
            for value in given
        ]
        assert not any(isinstance(value, StreamingConfig) for value in named.values())
        return rule(*forget, **named)

    return changed


def rewrite_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `model/window.py` had been edited: its rules forget that there is a sink."""
    rules = {name: rule for name, rule in vars(window).items() if getattr(rule, "__module__", "") == window.__name__}
    assert len(rules) > 5
    for module in [module for name, module in sys.modules.items() if name.startswith("mlaconvert.")]:
        for name, rule in rules.items():
            if getattr(module, name, None) is rule:
                monkeypatch.setattr(module, name, without_sink(rule))


def seen_by_every_room(sink: int) -> dict[str, Any]:
    """What cache, mask, calibration and healing make of a video that has left its window."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=7, sink_frames=sink)
    layer = MLALayer(kv_lora_rank=7, qk_nope_head_dim=8, v_head_dim=11, rope_components=((0, 1), (2, 2)))
    model = WanModel(
        WanConfig(
            **{"dim": 60, "num_heads": 5, "num_layers": 2, "ffn_dim": 20, "freq_dim": 8, "text_dim": 9, "text_len": 4},
            in_dim=3,
            out_dim=3,
            streaming=streaming,
            mla=MLAConfig(q_lora_rank=17, key_norm="token", softmax_scale=0.3, layers=(layer, None)),
        )
    ).requires_grad_(False)
    randomize(model)
    generator = torch.Generator().manual_seed(5)
    context, latents = torch.randn(1, 3, 9, generator=generator), torch.randn(1, 3, 10, 4, 6, generator=generator)
    sampler = Sampler.few_step((1000, 400))
    clip = Clips(latents, context)
    layouts = [layout(view, streaming) for view in views(10, streaming) for layout in (noisy_layout, forcing_layout)]
    return {
        "rollout": torch.cat([*rollout(model, context, size=LatentSize(10, 4, 6), sampler=sampler)], 2),
        "mask": model(latents, torch.full((1, 10), 300.0), context),
        "calibration": [(w.latents, w.timestep, w.chunks) for w in windows(clip, Regime.of(streaming))],
        "healing": [(layout.positions, layout.visible) for layout in layouts],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        close = relative(one, other) < 1e-5 if one.is_floating_point() and one.shape == other.shape else False
        return close or torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_how_the_cache_evicts_is_changed_in_the_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sink forgotten there, every room does what it did for a model that has none."""
    expected, other = seen_by_every_room(sink=0), seen_by_every_room(sink=2)
    assert not any(same(other[room], expected[room]) for room in expected)
    rewrite_window(monkeypatch)
    found = seen_by_every_room(sink=2)
    assert {room for room in expected if not same(found[room], expected[room])} == set()


# --- a new way to choose the latent ------------------------------------------------------------------------------


def test_a_new_way_to_choose_the_latent_is_one_function_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function in `latent/`, its name in `Init` and in `STARTS`: recipes, plan, journal and records take it."""

    def constant(_checkpoint: Any, plan: Any, weights: Any, layer: int, time: Any, device: Any) -> Factors:
        assert time is not None
        made = from_weights._draw(_checkpoint, plan, weights, layer, time, device)
        return Factors(tensors={name: torch.full_like(t, 0.25) for name, t in made.tensors.items()}, errors={})

    parsing._adapter.cache_clear()
    monkeypatch.setattr(recipe, "Init", Literal["svd", "calibrated", "random", "lossless", "constant"])
    monkeypatch.setitem(from_weights.STARTS, "constant", constant)
    wanted: Any = "constant"
    try:
        report = convert("tiny", tmp_path / "out", ConvertRecipe(init=wanted, kv_rank=9), verify=True)
    finally:
        parsing._adapter.cache_clear()
    assert [len(model.layers) for model in report.models] == [len(load_model(tmp_path / "out").blocks)]
    attention = load_model(tmp_path / "out").blocks[1].self_attn
    assert float(attention.kv_b_proj.weight.float().std()) == 0  # type: ignore[union-attr]
    assert read_json(tmp_path / "out" / "conversion.json")["recipe"]["init"] == "constant"
