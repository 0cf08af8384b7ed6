"""What the README shows is what the program does, and the format and the recipes are what their pages say."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke
from documents import ROOT, blocks, commands, page

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.conversion.recipes import load_recipe
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.shipped import recipe_names

README = page("README.md")


def test_the_first_screen_shows_what_one_gets() -> None:
    """What it does and does not, a picture, and one table with both losses within the first lines."""
    screen = "\n".join(README.splitlines()[:32])
    assert "Speed does not" in screen
    assert re.search(r"!\[.+\]\(docs/images/.+\.png\)", screen)
    assert len(re.findall(r"^\|.*\|$", screen, re.MULTILINE)) == 7
    assert "behind clean pasts" in screen
    assert "with noisy pasts" in screen
    assert len(README.splitlines()) <= 160


@pytest.mark.slow
def test_the_three_commands_and_the_python_snippet_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [words for words in commands(README) if words[0] in ("analyze", "convert")]
    three = [words for words in short if any(word.startswith("tiny") for word in words)]
    assert [words[0] for words in three] == ["analyze", "convert", "analyze"]
    for words in three:
        result = invoke(*words, *(("--clips", "2") if words[0] == "convert" else ()))  # not 40, for time's sake
        assert result.exit_code == 0, result.stderr
    files = {path.name for path in (tmp_path / "tiny-mla").iterdir()}
    table = page("docs/format.md").split("```")[0]
    assert files == set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))
    (snippet,) = blocks(README, "python")
    scope: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert getattr(scope["velocity"], "shape", None) == getattr(scope["latents"], "shape", ())
    assert capsys.readouterr().out.count("torch.Size([1, 3, 3, 24, 32])") == 3


def test_recipes_are_listed_with_what_they_cache() -> None:
    section = page("docs/converting.md").split("## Recipes")[1].split("##")[0]
    listed = {name: int(count) for name, count in re.findall(r"^\| `(\S+)` \|.*\| (\d+) \|$", section, re.MULTILINE)}
    recipes = {name: load_recipe(name) for name in recipe_names()}
    assert listed == {
        name: (recipe.kv_rank or 0) + (recipe.rope_dim or 0) + (recipe.key_norm == "token")
        for name, recipe in recipes.items()
    }


def test_the_config_and_the_tensors_are_those_of_the_format() -> None:
    (shown,) = blocks(page("docs/format.md"), "json")
    example = MLAConfig.from_json(json.loads(shown)["mla"], "format.md")
    latent = example.layers[0]
    fields = {field.name for cls in (MLAConfig, MLALayer) for field in dataclasses.fields(cls)}
    format_section = page("docs/format.md").split("Names follow")[0]
    assert fields <= set(re.findall(r"\w+", format_section))
    names: set[str] = set()
    assert latent is not None
    narrow = dataclasses.replace(latent, v_head_dim=64)
    in_bits = dataclasses.replace(narrow, cache_bits=((5, latent.kv_lora_rank), (8, 1)))
    kinds: list[dict[str, Any]] = [
        {"key_norm": "latent", "rope": "cached", "layers": (latent,)},
        {"key_norm": "token", "rope": "latent", "layers": (latent,)},
        {"key_norm": "token", "rope": "latent", "layers": (narrow,), "present": "exact"},
        {"key_norm": "token", "rope": "latent", "layers": (in_bits,), "present": "exact"},
    ]
    for kind in kinds:
        mla = MLAConfig(q_lora_rank=None, softmax_scale=1.0, **kind)
        config = WanConfig(dim=1536, num_heads=12, num_layers=1, ffn_dim=64, mla=mla)
        prefix = "blocks.0.self_attn."
        names |= {name.removeprefix(prefix) for name in WanFamily().expected_shapes(config) if prefix in name}
    section = page("docs/format.md").split("Names follow DeepSeek-V2")[1].split("##")[0]
    found: set[str] = set()
    for module, leaf, others in re.findall(r"^\| `(\w+)\.(\w+)`((?:, `\.\w+`)*)", section, re.MULTILINE):
        found |= {f"{module}.{one}" for one in (leaf, *re.findall(r"\w+", others))}
    assert found == names


def test_ci_runs_the_readmes_test_command() -> None:
    (line,) = re.findall(r"^test_command=\$\((.*?)\)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    read = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    shown = [line for block in blocks(README, "bash") for line in block.splitlines() if "pytest" in line]
    assert read == shown
    assert len(shown) == 1
