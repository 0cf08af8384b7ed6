"""What the serving pages say of memory is the plan's, and what they show of engines is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import succeed
from documents import blocks, commands, page
from sglang_standin import PIPELINES, SelfForcingWanT2V480PConfig, standing_in
from wan_base import TEXT_DIM, save_base
from wan_diffusers import reference

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe
from mlaconvert.model.memory import ModelMemory, StreamedVideo, plan_memory
from mlaconvert.units import format_bytes

SERVING, SGLANG = page("docs/serving.md"), page("docs/integrations/sglang.md")
SIZES = {
    "Wan2.1 1.3B": WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
    "Wan 14B": WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
}


def sides(config: WanConfig, gpu: int) -> tuple[ModelMemory, ModelMemory]:
    """As `analyze` plans it."""
    mla = mla_config(resolve_recipe(ConvertRecipe(), config), config)
    plan = plan_memory(config, mla, video=StreamedVideo(height=480, width=832, window_frames=21), gpu_gb=gpu)
    return plan.dense, plan.mla


@pytest.mark.parametrize("name", SIZES)
def test_what_one_node_takes_is_the_plans(name: str) -> None:
    section = SERVING.split("## One GPU, one node, many")[1]
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", section, re.MULTILINE)
    expected = [format_bytes(side.bytes_per_window) for side in sides(SIZES[name], 24)]
    for gpu in (24, 80):
        dense, mla = sides(SIZES[name], gpu)
        expected.append(f"{mla.largest_batch} (dense {dense.largest_batch})")
    assert row.split(" | ") == expected


def test_weights_and_the_longest_window_are_the_plans() -> None:
    dense, mla = sides(SIZES["Wan2.1 1.3B"], 24)
    assert f"up to {mla.longest_window:,} latent frames instead of {dense.longest_window}" in " ".join(SERVING.split())
    weights = [sides(config, 24)[1].weight_bytes / 2**30 for config in SIZES.values()]
    assert "1.3B take {:.1f} GiB in bfloat16 when converted, those of 14B {:.1f} GiB".format(*weights) in SERVING


def test_the_pipeline_and_its_steps_are_those_of_the_package() -> None:
    PIPELINES.clear()
    with standing_in():
        import mlaconvert.integrations.sglang
    (name,) = PIPELINES
    for text in (SERVING, SGLANG):
        assert f"--pipeline-class-name {name}" in text
    assert f"SGLANG_EXTERNAL_MODEL_PACKAGE={mlaconvert.integrations.sglang.__name__}\n" in SGLANG
    config = SelfForcingWanT2V480PConfig()
    assert f"({', '.join(map(str, config.dmd_denoising_steps or ()))}, shift {config.flow_shift:g})" in SGLANG


def test_a_batch_of_videos_is_made_by_the_command_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is printed, on a CPU and of a small size."""
    monkeypatch.chdir(tmp_path)
    save_base(Path("BASE"))
    reference(text_dim=TEXT_DIM, in_channels=16, out_channels=16).save_pretrained("BASE/transformer")
    succeed("convert", "BASE", "-o", "sf-mla", "--init", "svd", "--window-frames", "7")
    (words,) = [words for words in commands(SERVING.split("## One GPU, one node, many")[1]) if words[0] == "generate"]
    device = words.index("cuda")
    small = ("--height", "48", "--width", "80", "--frames", "3", "--steps", "1")
    succeed(*words[:device], "cpu", *words[device + 1 :], *small)
    assert sorted(path.name for path in Path("videos").glob("*.mp4")) == [f"video-{i}.mp4" for i in range(4)]


def test_an_engine_of_ones_own_gets_its_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("convert", "tiny", "-o", "tiny-mla", "--init", "svd")
    (snippet,) = [code for code in blocks(page("docs/integrations/index.md"), "python") if "Contract" in code]
    exec(snippet, {})
    # Seven frames of 48 tokens, six layers of 28 scalars, in bfloat16.
    assert capsys.readouterr().out.startswith(f"{7 * 48 * 6 * 28 * 2} bytes")
