"""What is collected of our own model gives what our own calibration measures, and what theirs ran is what is kept."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from collect_cases import (
    CONFIG,
    REGIME,
    THEIRS,
    TOKENS,
    collect_windows,
    generate,
    make_clip,
    make_model,
    world_pipeline,
)
from safetensors.torch import load_file, save_file
from streaming_codebases import TOKENS as FRAME
from streaming_codebases import InfinityAttention, LongLiveAttention, TheirAttention, WorldAttention
from support import SaveFolder, relative
from torch import Tensor

from mlaconvert.conversion.calibration.measure import layer_moments
from mlaconvert.conversion.calibration.method import CalibrationSetup
from mlaconvert.conversion.calibration.walk import LayerWalk
from mlaconvert.conversion.collected.record import Collected
from mlaconvert.conversion.collected.walk import CollectedWalk
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONVERSION_NAME, WEIGHTS_NAME
from mlaconvert.files.scratch import Scratch
from mlaconvert.integrations.collect import collect

RECIPE = ConvertRecipe(kv_rank=9, height=32, width=48, allocation="uniform", refit_steps=0)


@pytest.fixture
def model(save_folder: SaveFolder) -> Path:
    return make_model(save_folder)


def test_the_same_windows_give_the_same_moments(model: Path, tmp_path: Path) -> None:
    """To the last bits, which hang on where in memory a product finds its numbers. The sensitivity has another kernel
    where no mask is needed."""
    clip = make_clip()
    collect_windows(model, tmp_path / "moments", clip)
    collected = Collected(tmp_path / "moments")
    assert [window.grid[0] for window in collected.windows] == [4, 5, 5, 5]
    assert [window.queries for window in collected.windows] == [2, 2, 2, 1]
    with open_checkpoint(model) as checkpoint:
        ours = [layer_moments(layer) for layer in LayerWalk(checkpoint, clip, REGIME)]
        theirs = [layer_moments(layer) for layer in CollectedWalk(checkpoint, collected, "exact")]
    assert len(ours) == len(theirs) == CONFIG.num_layers
    for own, found in zip(ours, theirs, strict=True):
        for name in ("mean", "covariance", "query", "rho"):
            torch.testing.assert_close(getattr(found, name), getattr(own, name), rtol=1e-6, atol=1e-7)
        assert found.inverse_norm == pytest.approx(own.inverse_norm, rel=1e-6)
        assert own.sensitivity is not None
        assert found.sensitivity is not None
        assert relative(found.sensitivity, own.sensitivity) < 1e-5
        assert found.output_power == pytest.approx(own.output_power, rel=1e-5)


def test_the_same_windows_give_the_same_conversion(model: Path, tmp_path: Path) -> None:
    """With all that is layer by layer: components, latents, and the refit of what only the past uses."""
    clip = make_clip()
    collect_windows(model, tmp_path / "moments", clip)
    (tmp_path / "clips").mkdir()
    save_file(clip._asdict(), tmp_path / "clips" / "a.safetensors")
    own = dataclasses.replace(RECIPE, clips=1)
    convert(model, tmp_path / "ours", own, data=tmp_path / "clips")
    convert(model, tmp_path / "theirs", RECIPE, data=CalibrationSetup(moments=tmp_path / "moments"))
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    errors = []
    for name in ("ours", "theirs"):
        record = json.loads((tmp_path / name / CONVERSION_NAME).read_text())
        errors.append([layer["errors"] for layer in record["layers"]])
    for first, second in zip(*errors, strict=True):
        assert list(first) == list(second) == ["low rank", "past refitted"]
        assert first["past refitted"] < first["low rank"]
        for stage, error in first.items():
            assert second[stage] == pytest.approx(error, rel=1e-3), stage


@pytest.mark.parametrize("kind", [TheirAttention, InfinityAttention, LongLiveAttention, WorldAttention])
def test_a_window_is_what_was_last_run_at_each_of_its_frames(
    kind: type[TheirAttention], golden: Path, tmp_path: Path
) -> None:
    """Two prompts in one batch, a video after another: every window against all that was caught of every call."""
    pipe, calls = world_pipeline(golden, kind), []
    layers = [block.self_attn for block in pipe.generator.model.blocks]  # type: ignore[union-attr]
    layers[2].register_forward_pre_hook(lambda _, args: calls.append((int(args[6]) // FRAME, args[0].clone())))
    for layer in layers:
        layer.max_attention_size = 6 * FRAME
    positions = "window" if kind is InfinityAttention else "absolute"
    streaming = dataclasses.replace(THEIRS, positions=positions)
    contexts = torch.randn(2, 2, 6, 40, generator=torch.Generator().manual_seed(1))
    with collect(pipe, output=tmp_path / "moments", streaming=streaming, windows=100) as collection:
        for context in contexts:
            generate(pipe, context)
    assert collection.record is not None
    collected = Collected(tmp_path / "moments")
    # Four chunks, each run at two noise levels and clean; the first has no past.
    assert len(collected.windows) == collected.record.passes == 2 * 3 * 3
    assert collected.record == collection.record
    assert len(calls) == 2 * 4 * 3
    by_number = {window.number: window for window in collected.windows}
    number, rows = 0, set()
    last: dict[int, Tensor] = {}
    for start, x in calls:
        last = {} if start == 0 and 3 in last else last
        frames = list(x.split(FRAME, 1))
        if start:
            number += 1
            seen = [0, *range(max(1, start - 2), start)] if start > 3 else [0, 1, 2]
            expected = torch.cat([last[frame] for frame in seen] + frames, 1)
            window = by_number[number]
            found = collected.read(window, 2)
            assert (window.grid, window.queries, window.video) == ((len(seen) + 3, 3, 5), 3, 1 + (number > 9))
            row = next(row for row in range(2) if torch.equal(found, expected[row : row + 1]))
            rows.add(row)
            late = positions == "absolute" or start == 3
            moved = [*seen, *range(start, start + 3)] if late else list(range(6))
            assert list(window.positions) == moved
        last |= {start + i: frame for i, frame in enumerate(frames)}
    assert rows == {0, 1}


def test_moments_of_many_windows_are_a_fair_sample(golden: Path, tmp_path: Path) -> None:
    """Of 27 windows each is as likely to be kept as any other, and what is dropped leaves nothing behind."""
    pipe = world_pipeline(golden)
    contexts = torch.randn(3, 1, 6, 40, generator=torch.Generator().manual_seed(1))
    with collect(pipe, output=tmp_path / "moments", streaming=THEIRS, windows=4):
        for context in contexts:
            generate(pipe, context)
    collected = Collected(tmp_path / "moments")
    assert (collected.record.passes, len(collected.windows)) == (27, 4)
    assert max(window.number for window in collected.windows) > 9
    files = {path.name for path in (tmp_path / "moments" / "windows").iterdir()}
    assert len(files) == 4 * 3


def test_videos_side_by_side_have_pasts_of_their_own(golden: Path, tmp_path: Path) -> None:
    """As guidance runs two, each with its cache, pass by pass in turn."""
    pipes = [world_pipeline(golden), world_pipeline(golden)]
    contexts = torch.randn(2, 1, 6, 40, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    for pipe in pipes:
        pipe.begin()
        pipe.generator.model = pipes[0].generator.model
    with collect(pipes[0], output=tmp_path / "moments", streaming=THEIRS, windows=50) as collection, torch.no_grad():
        for start in range(0, 12, 3):
            for level in (700.0, 0.0):
                for pipe, context in zip(pipes, contexts, strict=True):
                    pipe.chunk(torch.randn(1, 16, 3, 6, 10, generator=g), torch.full((1, 3), level), context, start)
    record = collection.record
    assert record is not None
    assert (len(record.windows), record.left_out) == (12, 0)
    assert sorted(window.video for window in record.windows) == [1] * 6 + [2] * 6


def test_past_chunks_that_are_run_again_when_the_prompt_changes(golden: Path, tmp_path: Path) -> None:
    """As LongLive does it, several at once; what its sink then holds is not what was run last at its place."""
    pipe, g = world_pipeline(golden, LongLiveAttention), torch.Generator().manual_seed(2)
    contexts = torch.randn(2, 1, 6, 40, generator=g)
    pipe.begin()

    def one(start: int, frames: int, prompt: int, *more: bool) -> None:
        x = torch.randn(1, 16, frames, 6, 10, generator=g)
        pipe.chunk(x, torch.full((1, frames), 500.0), contexts[prompt], start, *more)

    with collect(pipe, output=tmp_path / "moments", streaming=THEIRS, windows=50) as collection, torch.no_grad():
        for start in range(0, 12, 3):
            one(start, 3, 0)
        one(6, 6, 1)  # the window again, but for its sink
        one(12, 3, 1)
    assert collection.record is not None
    assert (len(collection.record.windows), collection.record.left_out) == (4, 0)


def test_memory_holds_a_window_however_long_the_video(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[Tensor]] = []
    keep = Scratch.keep

    def watched(scratch: Scratch, tensor: Tensor) -> Tensor:
        made = keep(scratch, tensor)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Scratch, "keep", watched)
    pipe, context = world_pipeline(golden), torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(1))
    with collect(pipe, output=tmp_path / "moments", streaming=THEIRS, windows=2):
        generate(pipe, context, 30)
        assert len(kept) == 3 * 30  # every frame of every layer
        assert sum(one() is not None for one in kept) == 3 * THEIRS.window_frames


def test_whole_clips_of_a_bidirectional_model(save_folder: SaveFolder, tmp_path: Path) -> None:
    """Wan's own attention has no cache: every frame is a query, and padding is left out."""
    from torch import nn

    from mlaconvert.model.load import load_model

    source = make_model(save_folder)
    dense = load_model(source)

    class Plain(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            for name in ("q", "k", "v", "o", "norm_q", "norm_k"):
                setattr(self, name, getattr(own, name))
            self.num_heads, self.own = 3, [own]

        def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor | None) -> Tensor:
            frames = int(grid_sizes[0][0])
            plan = dense.attention_plan((frames, 2, 3), x.device, chunks=[frames])
            out: Tensor = self.own[0](x[:, : frames * TOKENS], plan)
            return torch.cat((out, torch.zeros_like(x[:, frames * TOKENS :])), 1)

    holder = nn.Module()
    holder.blocks = nn.ModuleList([nn.Module() for _ in range(3)])
    for block, own in zip(holder.blocks, dense.blocks, strict=True):
        block.self_attn = Plain(own.self_attn)  # type: ignore[union-attr]
    x = torch.randn(2, 4 * TOKENS + 5, 42, generator=torch.Generator().manual_seed(2))
    with collect(holder, output=tmp_path / "moments"), torch.inference_mode():
        for block in holder.blocks:
            block.self_attn(x, torch.tensor([24, 24]), torch.tensor([[4, 2, 3]] * 2), None)  # type: ignore[union-attr]
    collected = Collected(tmp_path / "moments")
    (window,) = collected.windows
    assert collected.record.streaming is None
    assert (window.grid, window.queries) == ((4, 2, 3), 4)
    assert any(torch.equal(collected.read(window, 1), x[row : row + 1, : 4 * TOKENS]) for row in range(2))
    report = convert(
        source, tmp_path / "out", ConvertRecipe(kv_rank=9), data=CalibrationSetup(moments=tmp_path / "moments")
    )
    mla = report.models[0].plan.config.mla
    assert mla is not None
    assert mla.present == "latent"
    assert report.models[0].plan.config.streaming is None
