"""The demo tells what it does, what it found and what to do next, as it comes."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from command_line import options, succeed

from mlaconvert import demo
from mlaconvert.conversion.recipes import load_recipe


@pytest.mark.slow
def test_every_stage_has_a_sentence_and_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(load_recipe("tiny"), clips=2, refit_steps=0)
    monkeypatch.setattr(demo, "load_recipe", lambda _: short)
    monkeypatch.setattr(demo, "CLIPS", 8)
    monkeypatch.setattr(demo, "FRAMES", 9)
    monkeypatch.setattr(demo, "STEPS", 2)
    result = succeed("demo", "-o", tmp_path / "my demo")
    told = " ".join(result.stderr.split())
    parts = re.split(r"([1-4] of 4, \w+: )", told)
    assert [part[8:-2] for part in parts[1::2]] == ["analyze", "convert", "compare", "rollouts"]
    saved = json.loads((tmp_path / "my demo" / "tiny-mla" / "evaluation.json").read_text())["models"][0]
    late = saved["drift"]["last_third"]["difference"]
    for part, figure in zip(
        parts[2::2],
        (
            "A latent of 20 channels in place of 384",
            "(-92.7%)",
            f"velocity is off by {100 * saved['clean_past']['velocity_error']:.1f}%",
            f"differ by {100 * late['other_seed']:.1f}%",
        ),
        strict=True,
    ):
        assert figure in part
    # What they are is said before minutes go by.
    assert "each chunk sees the others only through the cache" in parts[-1]
    commands = [shlex.split(line, comments=True) for line in result.stderr.splitlines() if "  mlaconvert " in line]
    assert [words[1] for words in commands] == ["generate", "heal", "analyze", "convert"]
    for _, name, *words in commands:
        assert options()[name].issuperset(word for word in words if word.startswith("--"))
    assert commands[0][2] == str(tmp_path / "my demo" / "tiny-mla")
    titles = ("Weight spectra", "converted layers", "Beside tiny", "tiny-mla: ")
    places = [result.stdout.index(title) for title in titles]
    assert places == sorted(places)
    assert " ".join(saved["verdict"]["why"].split()) in " ".join(result.stdout.split())
