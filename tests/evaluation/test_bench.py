"""The benchmark at small size: its counts, its memory against the plan, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import Present
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe
from mlaconvert.errors import ConfigError
from mlaconvert.evaluation.bench.flops import forward_flops
from mlaconvert.evaluation.bench.memory import largest, profiled_peak
from mlaconvert.evaluation.bench.run import bench, full_window_mode
from mlaconvert.evaluation.bench.runner import ResolvedSetting, Runner, no_remarks
from mlaconvert.evaluation.bench.setting import BenchReport, BenchSetting, random_model, side_configs
from mlaconvert.model.attention.latent import LatentAttention
from mlaconvert.model.memory import StreamedVideo, plan_memory


def invoke(*arguments: object) -> command_line.Result:
    return command_line.invoke("bench", *arguments)


@pytest.fixture(scope="module")
def report(golden: Path) -> BenchReport:
    setting = BenchSetting(
        geometry=str(golden),
        height=32,
        width=48,
        batch=2,
        streaming=StreamingConfig(chunk_frames=2, window_frames=5),
        steps=2,
        rounds=2,
        kv_ranks=(9, 12),
        heads=((18, 24), (8, 10)),
    )
    return bench(setting)


def test_every_side_is_measured(report: BenchReport) -> None:
    assert [side.name for side in report.sides] == [
        "dense",
        "MLA 9+6, heads 18+6/24",
        "MLA 9+6, heads 8+6/10",
        "MLA 12+6, heads 18+6/24",
        "MLA 12+6, heads 8+6/10",
    ]
    for side in report.sides:
        assert side.next_chunk_spread[0] <= side.next_chunk <= side.next_chunk_spread[1]
        assert side.frames_per_second == pytest.approx(2 * 2 * 4 / side.next_chunk)  # batch, frames, VAE stride
        assert side.first_chunk > 0
        assert min(side.profile.values()) > 0
        assert (side.largest_batch, side.largest_batch_sliced) == (None, None)
        assert side.weight_bytes + side.cache_bytes + side.text_bytes < side.peak_bytes < 40 * side.weight_bytes
    assert report.sides[0].speedup == 1
    assert report.matmul_rate > 0
    assert report.attention_rate > 0


def test_memory_agrees_with_the_plan(report: BenchReport, golden: Path) -> None:
    """Measured bytes of buffers and weights within 2% of what `analyze` says before anything is allocated."""
    for side in report.sides:
        assert side.cache_bytes == pytest.approx(side.plan_cache_bytes, rel=0.02)
        assert side.weight_bytes == pytest.approx(side.plan_weight_bytes, rel=0.02)
    # 2 videos, 5 frames of 2 x 3 tokens, 3 layers, float32.
    assert [side.cache_bytes for side in report.sides] == [
        2 * 5 * 6 * 3 * 4 * scalars for scalars in (192, 15, 15, 18, 18)
    ]
    analyzed = command_line.invoke(
        "analyze", golden, "--json", "--height", "32", "--width", "48", "--batch", "2", "--window-frames", "5"
    )
    memory = json.loads(analyzed.stdout)["memory"]
    # analyze counts a bfloat16 cache and weights.
    assert report.sides[0].cache_bytes == 2 * memory["dense"]["bytes_per_window"]
    assert report.sides[0].weight_bytes == 2 * memory["dense"]["weight_bytes"]


def test_the_profile_accounts_for_the_time(report: BenchReport) -> None:
    for side in report.sides:
        assert set(side.profile) == {"attention", "projections", "norms and RoPE", "the rest"}
        # One chunk under a profiler, which slows it: the same order as a chunk without.
        assert 0.1 * side.next_chunk_spread[0] < sum(side.profile.values()) < 20 * side.next_chunk_spread[1]


def test_sides_with_a_narrowed_cache_stand_beside_their_own(golden: Path) -> None:
    """The rival of a conversion: dense, narrowed. Its bytes by hand are measured, and planned."""
    size = ("--height", 48, "--width", 80, "--window-frames", 5, "--chunk-frames", 2, "--steps", 1, "--rounds", 1)
    done = invoke(golden, *size, "--kv-rank", 9, "--cache-dtype", "fp8,int4,qvg2", "--batch", 2, "--json")
    assert done.exit_code == 0, done.stderr
    sides = json.loads(done.stdout)["sides"]
    latent = "MLA 9+6, heads 18+6/24"
    assert [side["name"] for side in sides] == [
        *("dense", "dense, fp8 cache", "dense, int4 cache", "dense, qvg2 cache"),
        *(latent, f"{latent}, fp8 cache", f"{latent}, int4 cache", f"{latent}, qvg2 cache"),
    ]
    # 15 tokens a frame in one group; 96 keys, and 96 values in three groups; 9 and 6 latent channels in one each.
    frames, dense = 2 * 5 * 3, 96 * (8 + 4) + 15 * (48 + 3 * 4)
    # Behind k-means, 2 bytes for a head of 24 (or 9, or 6), two centroids, and a bit of a name for each token.
    clusters = (2 * 4 * (15 * (6 + 2) + 2 * 24 + 2), 15 * (3 + 2 + 2 + 2) + 2 * (9 + 6) + 2 * 2)
    plain, latents = (15 * 192 * 4, 15 * 192, dense), (15 * 15 * 4, 15 * 15, 15 * (5 + 4 + 3 + 4))
    expected = [frames * size for size in (*plain, clusters[0], *latents, clusters[1])]
    assert [side["cache_bytes"] for side in sides] == expected
    assert [side["plan_cache_bytes"] for side in sides] == expected
    assert invoke(golden, *size, "--cache-dtype", "int4,int5").exit_code == 2


def test_a_side_with_bits_of_its_own_is_not_narrowed(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = side_configs(BenchSetting(geometry=str(golden), kv_ranks=(9,), rope="head", present="exact"))
    (mla,) = (side.mla for side in config.values() if side.mla is not None)
    layers = tuple(layer and dataclasses.replace(layer, cache_bits=((4, 9),)) for layer in mla.layers)
    converted = dataclasses.replace(config["dense"], mla=dataclasses.replace(mla, layers=layers, key_norm="latent"))
    monkeypatch.setattr("mlaconvert.evaluation.bench.setting.base_geometry", lambda _: converted)
    assert list(side_configs(BenchSetting(cache_dtypes=("int4",)))) == ["dense", "dense, int4 cache", "MLA"]


def test_flops_are_those_of_a_chunk(report: BenchReport, golden: Path) -> None:
    configs = side_configs(BenchSetting(geometry=str(golden)))
    once = forward_flops(configs["dense"], queries=12, keys=30)
    assert report.sides[0].flops == {part: 3 * 2 * count for part, count in once.items()}
    assert report.sides[2].flops["attention"] < report.sides[0].flops["attention"]


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["head", "latent", "cached"])
def test_a_side_whose_present_is_exact(golden: Path, rope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, its bytes are as planned, and its FLOPs are those of 18 past keys and 12 own ones."""
    asked = []
    monkeypatch.setattr(
        "mlaconvert.evaluation.bench.run.cheaper_mode", lambda *_, **sizes: asked.append(sizes) or "expanded"
    )
    setting = BenchSetting(
        geometry=str(golden),
        height=32,
        width=48,
        streaming=StreamingConfig(chunk_frames=2, window_frames=5),
        steps=2,
        rounds=1,
        kv_ranks=(9,),
        heads=((None, 10),),
        rope=rope,
        present="exact",
    )
    found = bench(setting).sides[1]
    assert found.name.endswith("/10, exact present")
    assert found.cache_bytes == found.plan_cache_bytes
    assert found.weight_bytes == found.plan_weight_bytes
    config = side_configs(setting)[found.name]
    assert config.mla is not None
    once = forward_flops(config, queries=12, keys=30, mode="expanded")
    assert once["attention"] == 3 * 4 * 4 * 12 * (12 * 24 + 18 * 24)  # layers and heads
    if rope == "head":
        assert found.flops == {part: 3 * count for part, count in once.items()}
    assert found.mode == "expanded"
    assert {(sizes["queries"], sizes["keys"]) for sizes in asked} == (set() if rope == "head" else {(12, 18)})
    recorded = side_configs(dataclasses.replace(setting, present=None))
    assert [config.mla.present for config in recorded.values() if config.mla] == ["latent"]  # as from weights alone


@pytest.mark.slow
def test_the_present_is_asked_for_on_the_command_line(golden: Path) -> None:
    size = ("--height", 32, "--width", 48, "--rounds", 1, "--steps", 1, "--kv-rank", 9, "--rope", "head")
    done = invoke(golden, *size, "--present", "exact", "--json")
    assert done.exit_code == 0, done.stderr
    assert [side["name"] for side in json.loads(done.stdout)["sides"]][1].endswith("exact present")
    refused = invoke(golden, *size, "--present", "now")
    assert refused.exit_code == 2
    assert "present" in refused.stderr
    compressed = invoke(golden, *size, "--present", "exact", "--q-rank", 7)
    assert compressed.exit_code == 2
    assert "q_rank is 7" in compressed.stderr


def test_flops_at_wans_size() -> None:
    """Worked out by hand for a chunk of 4,680 queries in a window of 10,920 keys at 480 x 832."""
    setting = BenchSetting(kv_ranks=(192,), heads=((96, 128), (32, 64)))
    dense, wide, narrow = (forward_flops(config, queries=4680, keys=10920) for config in side_configs(setting).values())
    layers, tokens, keys = 30, 4680, 10920
    assert dense["attention"] == layers * 4 * tokens * keys * 1536
    assert dense["projections"] == layers * 2 * tokens * 6 * 1536**2
    assert wide["attention"] == dense["attention"]
    assert wide["latent"] == layers * 2 * keys * 232 * 12 * 256
    assert wide["projections"] == layers * 2 * tokens * (1536 * 768 * 2 + 1536 * 224 + 3 * 1536**2)
    assert 2 * narrow["attention"] == dense["attention"]
    assert dense["ffn"] == narrow["ffn"] == layers * 4 * tokens * 1536 * 8960
    # Wide heads save a few percent, narrow ones more than a quarter.
    assert 0.93 < sum(wide.values()) / sum(dense.values()) < 0.98
    assert sum(narrow.values()) / sum(dense.values()) < 0.75


@pytest.mark.parametrize(("geometry", "dense", "latent"), [("1.3b", 3072, 224), ("14b", 10240, 746)])
def test_sides_of_the_published_sizes(geometry: str, dense: int, latent: int) -> None:
    configs = list(side_configs(BenchSetting(geometry=geometry)).values())
    assert [config.cached_scalars()[0] for config in configs] == [dense, latent]
    assert all(config.streaming == StreamingConfig() for config in configs)


def test_a_converted_geometry_brings_its_own_latent_side(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted = command_line.invoke("convert", golden, "-o", out, "--init", "svd", "--kv-rank", "7", "--layers", "0,2")
    assert converted.exit_code == 0
    sides = side_configs(BenchSetting(geometry=str(out)))
    assert list(sides) == ["dense", "MLA"]
    assert sides["MLA"].cached_scalars() == (13, 192, 13)
    assert sides["dense"].mla is None


def test_random_weights_are_of_the_geometry(golden: Path) -> None:
    config = side_configs(BenchSetting(geometry=str(golden), kv_ranks=(9,)))["MLA 9+6, heads 18+6/24"]
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    plan = plan_memory(
        dataclasses.replace(config, mla=None), config.mla, video=StreamedVideo(height=32, width=48, window_frames=5)
    )
    assert sum(p.nbytes for p in model.parameters()) == plan.mla.weight_bytes
    assert all(p.isfinite().all() and not p.requires_grad for p in model.parameters())


def test_sides_take_turns(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = Runner.chunk

    def chunk(self: Runner) -> float:
        """Takes four seconds for the dense side, one, two, one, two, ... for the other."""
        order.append(self.name)
        original(self)
        return 4.0 if self.name == "dense" else 1.0 + order.count(self.name) % 2

    monkeypatch.setattr(Runner, "chunk", chunk)
    streaming = StreamingConfig(chunk_frames=1, window_frames=2)
    notes: list[tuple[int, int]] = []
    setting = BenchSetting(geometry=str(golden), height=16, width=16, streaming=streaming, steps=1, rounds=2)
    sides = bench(setting, lambda _, done, total, __="": notes.append((done, total))).sides
    dense, latent = "dense", "MLA 8+6, heads 18+6/24"
    assert order[12:16] == [dense, latent, latent, dense]
    assert [side.speedup for side in sides] == [1, 3]
    assert [side.next_chunk for side in sides] == [4, 1.5]
    assert [side.next_chunk_spread for side in sides] == [(4, 4), (1, 2)]
    assert [side.frames_per_second for side in sides] == [1, 4 / 1.5]  # four video frames a latent one
    assert [done for done, _ in notes] == list(range(notes[-1][1] + 1))


def test_the_largest_batch_is_thelargest() -> None:
    for limit in (0, 1, 2, 7, 8, 100):
        assert largest(lambda n, limit=limit: n <= limit) == limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_and_batches_are_measured(golden: Path) -> None:
    setting = BenchSetting(geometry="1.3b", height=96, width=96, rounds=1, device="cuda")
    dense, latent = bench(setting).sides
    for side in (dense, latent):
        assert side.cache_bytes == pytest.approx(side.plan_cache_bytes, rel=0.02)
        assert side.weight_bytes == pytest.approx(side.plan_weight_bytes, rel=0.02)
        assert side.peak_bytes is not None
        assert side.peak_bytes > side.weight_bytes + side.cache_bytes
        assert side.largest_batch_sliced is not None
        assert side.largest_batch is not None
        assert side.largest_batch_sliced >= side.largest_batch > 0
    assert latent.largest_batch_sliced > dense.largest_batch_sliced  # type: ignore[operator]


@pytest.mark.parametrize(("present", "expected"), [("exact", "expanded"), ("latent", "absorbed")])
def test_the_mode_that_is_named_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, present: Present, expected: str
) -> None:
    """Beside an exact present, a chunk reads only what is before it from latents: half of this window."""
    streaming = StreamingConfig(chunk_frames=2, window_frames=4)
    dense = WanConfig(dim=48, num_heads=2, num_layers=1, ffn_dim=64, text_dim=10, text_len=5, streaming=streaming)
    recipe = ConvertRecipe(kv_rank=4, nope_dim=9, rope_dim=6, v_dim=15, present=present)
    config = dataclasses.replace(dense, mla=mla_config(resolve_recipe(recipe, dense), dense))
    resolved = ResolvedSetting(
        setting=BenchSetting(streaming=streaming, steps=1),
        device=torch.device("cpu"),
        dtype=torch.float32,
        streaming=streaming,
        height=4,
        width=4,
        frame_tokens=4,
        context=torch.zeros(1, 5, 10),
    )
    runner = Runner("", config, resolved, compiled=False)
    runner.begin()
    for _ in range(resolved.filling):
        runner.chunk()
    chosen: list[str] = []
    choose = LatentAttention._mode
    monkeypatch.setattr(LatentAttention, "_mode", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    runner.chunk()
    assert set(chosen) == {expected}
    assert full_window_mode(resolved, config) == expected


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_tables_or_json(golden: Path) -> None:
    flags = ("--height", 16, "--width", 32, "--chunk-frames", 1, "--window-frames", 3, "--steps", 1, "--rounds", 1)
    shown = invoke(golden, *flags)
    assert shown.exit_code == 0, shown.stderr
    for part in ("speed, dense = 1", "next chunk", "not searched", "norms and RoPE", "GFLOP", "Ceilings"):
        assert part in shown.stdout
    found = invoke(golden, *flags, "--json", "--nope-dim", 8, "--v-dim", 10, "--no-text-cache", "--dtype", "bfloat16")
    data: dict[str, Any] = json.loads(found.stdout)
    assert [side["name"] for side in data["sides"]] == ["dense", "MLA 8+6, heads 8+6/10"]
    assert data["setting"]["window_frames"] == 3
    assert data["dtype"] == "bfloat16"
    assert data["sides"][0]["text_bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "error: none: there is no such file or folder"),
        (["tiny", "--rounds", "0"], "error: rounds is 0"),
        (["tiny", "--kv-rank", "x"], "error: --kv-rank is 'x'"),
        (["tiny", "--kv-rank", "999"], "error: kv_rank is 999, larger than the layer"),
        (["tiny", "--nope-dim", "8,9", "--v-dim", "8"], "--nope-dim has 2 widths, --v-dim 1"),
        (["tiny", "--height", "25"], "error: height is 25"),
        (["tiny", "--device", "abacus"], "error: device 'abacus'"),
        (["tiny", "--dtype", "int8"], "error: dtype is 'int8'"),
        (["tiny", "--attention", "magic"], "error: attention is 'magic'"),
        (["tiny", "--window-frames", "2"], "window_frames is 2"),
        (["tiny", "--slice", "0"], "slice_size is 0: give 1 or more"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["batch", "steps", "rounds", "height", "width", "slice_size"])
def test_settings_from_python_are_checked_too(name: str) -> None:
    values: Any = {name: 0}
    with pytest.raises(ConfigError, match=f"^{name} is 0: give 1 or more$"):
        BenchSetting(**values)
    wrong: Any = {"rope": "magic"}
    with pytest.raises(ConfigError, match=r"^rope is 'magic': give cached, latent or head$"):
        BenchSetting(**wrong)


def test_image_to_video_geometries_are_refused(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = side_configs(BenchSetting(geometry=str(golden)))["dense"]
    monkeypatch.setattr(
        "mlaconvert.evaluation.bench.setting.base_geometry", lambda _: dataclasses.replace(config, in_dim=36)
    )
    with pytest.raises(ConfigError, match="image-to-video geometry"):
        bench(BenchSetting(geometry="x"))


def test_the_peak_is_the_most_that_was_held_at_a_time() -> None:
    def work() -> None:
        first, second = torch.zeros(1000, 100), torch.zeros(2000, 100)  # 400,000 and 800,000 bytes
        del first
        third = torch.zeros(1500, 100)  # 600,000
        del second, third

    assert profiled_peak(work) == 1_400_000


def test_what_a_profiler_says_beside_python_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with no_remarks():
        os.write(2, b"USDT: profiler_start")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
