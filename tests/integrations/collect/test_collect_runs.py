"""Runs in the code of others: whole circle with passengers, what is refused before it is guessed, and interruptions."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collect_cases import THEIRS, collect_windows, generate, make_clip, make_model, with_camera, world_pipeline
from streaming_codebases import BlendingAttention, TheirPipeline
from support import SaveFolder, relative
from torch import Tensor

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.calibration.method import CalibrationSetup
from mlaconvert.conversion.collected.record import Collected, is_collected
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError, OutputError, UnsupportedModelError
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME
from mlaconvert.files.output import Output
from mlaconvert.integrations.collect import Pass, collect
from mlaconvert.integrations.streaming import swap_attention
from mlaconvert.listener import Listener


@pytest.fixture
def contexts() -> Tensor:
    return torch.randn(6, 1, 6, 40, generator=torch.Generator().manual_seed(1))


def run(
    pipe: TheirPipeline, contexts: Tensor, output: Any, *, ends_with: type[BaseException] | None = None, **options: Any
) -> Any:
    with collect(pipe, **{"output": output, "streaming": THEIRS, **options}) as collection:
        for context in contexts:
            generate(pipe, context)
        if ends_with is not None:
            raise ends_with
    return collection


def test_a_world_model_is_calibrated_in_its_own_code_and_put_back(
    golden: Path, contexts: Tensor, tmp_path: Path
) -> None:
    """Better than from its weights alone, on prompts that were not collected; said on screen and in the record."""
    source, said = with_camera(tmp_path / "world", golden), []
    run(world_pipeline(golden), contexts[:5], tmp_path / "moments", windows=20)
    setup = CalibrationSetup(moments=tmp_path / "moments")
    sizes = {"kv_rank": 30, "height": 48, "width": 80}
    listener = Listener(say=said.append)
    convert(source, tmp_path / "ours", ConvertRecipe(**sizes), data=setup, listener=listener, verify=True)
    weights = ConvertRecipe(init="svd", present="exact", rope="head", key_norm="token", streaming=THEIRS, **sizes)
    convert(source, tmp_path / "weights", weights)
    expected = generate(world_pipeline(golden), contexts[5])
    errors = {}
    for name in ("ours", "weights"):
        pipe = world_pipeline(golden)
        swap_attention(pipe, tmp_path / name)
        errors[name] = relative(generate(pipe, contexts[5]), expected)
    assert errors["ours"] < 0.7 * errors["weights"]
    record = json.loads((tmp_path / "ours" / CONVERSION_NAME).read_text())
    assert record["collected"] == {
        "inputs": "collected", "windows": 20, "passes": 45, "videos": 5, "streaming": dataclasses.asdict(THEIRS),
        "left_out": 0, "stopped": "",
        "without": ["allocation between layers", "refit of the whole model", "losses"],
    }  # fmt: skip
    assert (record["recipe"]["clips"], record["recipe"]["allocation"], record["losses"]) == (None, "uniform", {})
    config = json.loads((tmp_path / "ours" / CONFIG_NAME).read_text())
    assert config["streaming"] == dataclasses.asdict(THEIRS)
    assert config["mla"]["calibration"]["inputs"] == "collected"
    text = "\n".join(said)
    assert "20 windows of 5 videos, drawn from 45 passes" in text
    assert "left out, for want of the model itself: allocation between layers" in text
    assert (tmp_path / "ours.moments").is_dir()  # what was collected is only read
    assert {path.name for path in (tmp_path / "moments").iterdir()} == {"collected.json", "windows"}


def test_a_model_in_bfloat16_under_inference_mode(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    pipe = world_pipeline(golden).to(torch.bfloat16)
    pipe._initialize_kv_cache(1, torch.bfloat16, "cpu")
    with torch.inference_mode():
        run(pipe, contexts[:1].bfloat16(), tmp_path / "moments")
    collected = Collected(tmp_path / "moments")
    assert (collected.dtype, collected.record.weights_dtype) == (torch.bfloat16, "bfloat16")
    # The checkpoint in float32 is known for the one that ran, rounded.
    source = with_camera(tmp_path / "world", golden)
    convert(source, tmp_path / "out", ConvertRecipe(kv_rank=30), data=CalibrationSetup(moments=tmp_path / "moments"))


WRONG: dict[str, tuple[Callable[[Path], TheirPipeline], StreamingConfig, str]] = {
    "another sink": (
        world_pipeline,
        dataclasses.replace(THEIRS, sink_frames=2),
        r"does not give what Wan's attention gives .*window of 6 and a sink of 2.*streaming=StreamingConfig",
    ),
    "a wider window": (
        world_pipeline, dataclasses.replace(THEIRS, window_frames=8), r"layer 0 does not give what Wan's"
    ),
    "other positions": (
        world_pipeline, dataclasses.replace(THEIRS, positions="window"), r"counts frames by positions 'absolute'"
    ),
    "frames that are blended": (
        lambda golden: world_pipeline(golden, _Blending), THEIRS, r"_Blending of layer 0 does not give what Wan's"
    ),
    "longer chunks": (
        world_pipeline, dataclasses.replace(THEIRS, chunk_frames=2), r"chunk of 3 frames was run, .*chunk_frames 2"
    ),
}  # fmt: skip


class _Blending(BlendingAttention):
    def evict(self, kv_cache: Any, over: int, kept: int, sink: int) -> None:
        super().evict(kv_cache, over, kept, sink)
        kv_cache["v"][:, :sink] += kv_cache["v"][:, sink : 2 * sink]


@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_guessed(case: str, golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    """A window that is not the model's own is found out by what its attention gives; and nothing is left."""
    make, streaming, says = WRONG[case]
    error = ConfigError if case == "longer chunks" else UnsupportedModelError
    with pytest.raises(error, match=says) as caught:
        run(make(golden), contexts[:1], tmp_path / "moments", streaming=streaming, windows=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_is_not_theirs_is_left_out_with_a_warning(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    """A model that once in a while does something of its own, when windows of the kind have been proved."""
    pipe, seen = world_pipeline(golden), [0]
    attention = pipe.generator.model.blocks[1].self_attn  # type: ignore[union-attr]

    def now_and_then(_: Any, args: Any, output: Tensor) -> Tensor:
        seen[0] += 1
        return output * (1.5 if seen[0] in (20, 23) else 1.0)

    attention.register_forward_hook(now_and_then)
    with pytest.warns(UserWarning, match="2 windows were drawn and left out"):
        run(pipe, contexts[:2], tmp_path / "moments", windows=20)
    collected = Collected(tmp_path / "moments")
    assert (collected.record.left_out, len(collected.windows)) == (2, 16)


def test_the_window_of_the_model_itself(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    pipe = world_pipeline(golden)
    with pytest.raises(ConfigError, match=r"does not say what a chunk sees .*streaming=StreamingConfig"):
        run(pipe, contexts, tmp_path / "moments", streaming=None)
    pipe.generator.model.num_frame_per_block = 3  # type: ignore[union-attr]
    assert run(pipe, contexts[:1], tmp_path / "moments", streaming=None).streaming == THEIRS


def test_a_cache_needs_a_window(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    """Also where only the reader of calls knows of the cache."""
    pipe = world_pipeline(golden)
    for block in pipe.generator.model.blocks:  # type: ignore[union-attr]
        block.self_attn = _Renamed(block.self_attn)
    with pytest.raises(
        UnsupportedModelError, match=r"is called with x, lengths, .* with collect\(\.\.\., read=\.\.\.\)"
    ):
        run(pipe, contexts[:1], tmp_path / "moments")

    def read(arguments: Any) -> Pass:
        frames, height, width = arguments["sizes"][0].tolist()
        return Pass(arguments["x"], (frames, height, width), arguments["begin"] // (height * width), arguments["store"])

    with pytest.raises(ConfigError, match="called with a cache; say what a chunk sees"):
        run(pipe, contexts[:1], tmp_path / "moments", streaming=None, read=read)
    assert list(tmp_path.iterdir()) == []
    assert len(run(pipe, contexts[:1], tmp_path / "moments", read=read).record.windows) == 9


class _Renamed(torch.nn.Module):
    """Self-attention whose call has names of its own."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        for name, part in own.named_children():
            self.add_module(name, part)
        self.num_heads, self.own = own.num_heads, [own]

    def forward(
        self, x: Any, lengths: Any, sizes: Any, turns: Any, mask: Any, store: Any, begin: Any, last: Any
    ) -> Any:
        return self.own[0](x, lengths, sizes, turns, mask, store, begin, last)


def test_models_that_are_no_wan(golden: Path, tmp_path: Path) -> None:
    pipe = world_pipeline(golden)
    del pipe.generator.model.blocks[1].self_attn.norm_k  # type: ignore[union-attr]
    for model, says in (
        (pipe, r"blocks\.1\.self_attn \(TheirAttention\) has not Wan's q, k, v, o"),
        (torch.nn.Linear(3, 4), "holds 0 models with blocks"),
        ({"model": 1}, "dict is no torch module"),
    ):
        with pytest.raises(UnsupportedModelError, match=says), collect(model, output=tmp_path / "moments"):  # type: ignore[arg-type]
            raise AssertionError
    with pytest.raises(ConfigError, match="windows is 0"), collect(pipe, output=tmp_path / "x", windows=0):
        raise AssertionError


def test_a_run_without_a_past_collects_nothing(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    pipe = world_pipeline(golden)
    with (
        pytest.raises(InputError, match=r"of 3 passes none was a chunk with a past"),
        collect(pipe, output=tmp_path / "moments", streaming=THEIRS),
    ):
        generate(pipe, contexts[0], 3)
    with (
        pytest.raises(InputError, match="self-attention was never called"),
        collect(pipe, output=tmp_path / "moments", streaming=THEIRS),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert not any(block.self_attn._forward_hooks for block in pipe.generator.model.blocks)  # type: ignore[union-attr]


def test_an_error_keeps_what_there_is_and_the_same_call_goes_on(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    """And in the end the sample is that of an uninterrupted run."""
    pipe = world_pipeline(golden)
    run(pipe, contexts[:3], tmp_path / "whole", windows=5)
    kept = pytest.warns(UserWarning, match=r"5 windows are kept in .*\.parts\.partial")
    with kept, pytest.raises(ZeroDivisionError):
        run(pipe, contexts[:2], tmp_path / "parts", windows=5, ends_with=ZeroDivisionError)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(OutputError, match=r"holds windows of another model, or of other settings"):
        run(pipe, contexts[:1], tmp_path / "parts", windows=6)
    run(pipe, contexts[2:3], tmp_path / "parts", windows=5)
    whole, parts = (Collected(tmp_path / name) for name in ("whole", "parts"))
    assert whole.record == parts.record
    for one, other in zip(whole.windows, parts.windows, strict=True):
        assert torch.equal(whole.read(one, 1), parts.read(other, 1))
    with pytest.raises(OutputError, match="exists; choose another path"):
        run(pipe, contexts[:1], tmp_path / "parts")
    run(pipe, contexts[:1], Output(tmp_path / "parts", overwrite=True), windows=2)
    assert len(Collected(tmp_path / "parts").windows) == 2


KILLED = """
import os, sys
from pathlib import Path
import torch
from collect_cases import THEIRS, generate, world_pipeline
from mlaconvert import collect

pipe, passes = world_pipeline(Path(sys.argv[1])), []

def stop(*_):
    passes.append(1)
    if len(passes) == 8:  # in the middle of a pass
        os._exit(9)

pipe.generator.model.blocks[1].self_attn.register_forward_hook(stop)
contexts = torch.randn(6, 1, 6, 40, generator=torch.Generator().manual_seed(1))
with collect(pipe, output=Path(sys.argv[2]), streaming=THEIRS, windows=30):
    generate(pipe, contexts[0])
"""


def test_a_killed_run_is_gone_on_with(golden: Path, contexts: Tensor, tmp_path: Path) -> None:
    """It had no chance to tidy up: whole windows count, and what is left of others goes."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, "-c", KILLED, str(golden), str(tmp_path / "moments")]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert ended.returncode == 9
    left = tmp_path / ".moments.partial" / "collected" / "windows"
    assert len(list(left.iterdir())) == 4 * 3 + 1  # four windows of three layers, and a fifth that was begun
    record = run(world_pipeline(golden), contexts[1:2], tmp_path / "moments", windows=30).record
    assert [window.video for window in record.windows] == [1] * 4 + [2] * 9
    assert len(list((tmp_path / "moments" / "windows").iterdir())) == 13 * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interactive_session_ends_by_an_interrupt(
    error: type[BaseException], golden: Path, contexts: Tensor, tmp_path: Path
) -> None:
    pipe, said = world_pipeline(golden), []
    with pytest.raises(error):
        run(pipe, contexts[:1], tmp_path / "moments", windows=5, ends_with=error)
    assert Collected(tmp_path / "moments").record.stopped == error.__name__
    source = with_camera(tmp_path / "world", golden)
    setup = CalibrationSetup(moments=tmp_path / "moments")
    convert(source, tmp_path / "out", ConvertRecipe(kv_rank=30), data=setup, listener=Listener(say=said.append))
    assert f"the run was stopped by {error.__name__}" in "\n".join(said)
    with pytest.raises(error), collect(pipe, output=tmp_path / "none", streaming=THEIRS):
        raise error
    assert not is_collected(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"moments", "out", "out.moments", "world"}


def test_a_conversion_goes_on_after_its_finished_layers(save_folder: SaveFolder, tmp_path: Path) -> None:
    source = make_model(save_folder)
    collect_windows(source, tmp_path / "moments", make_clip(15))
    setup, recipe = CalibrationSetup(moments=tmp_path / "moments"), ConvertRecipe(kv_rank=9, height=32, width=48)
    convert(source, tmp_path / "whole", recipe, data=setup)

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "convert" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"finished layers \(\d\) are kept"):
        convert(source, tmp_path / "again", recipe, data=setup, listener=Listener(progress=stop))
    convert(source, tmp_path / "again", recipe, data=setup)
    whole, again = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "again"))
    assert whole == again
