"""Scores out of VBench's result files, as its `save_json` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import options

from mlaconvert.errors import InputError
from mlaconvert.evaluation.vbench import SIX, load_vbench


def write(folder: Path, name: str, data: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_eval_results.json"
    path.write_text(json.dumps(data))
    return path


def videos(*scores: Any) -> list[dict[str, Any]]:
    return [{"video_path": f"videos/a cat-{i}.mp4", "video_results": score} for i, score in enumerate(scores)]


def test_scores_of_several_files_are_one_set(tmp_path: Path) -> None:
    """One run for each dimension, a folder for some, and VBench-Long's third entry; meta data is no result."""
    write(tmp_path, "results_1", {"subject_consistency": [0.9861, videos(0.9, 0.99, 1.0)]})
    write(tmp_path / "long", "results_2", {"dynamic_degree": [0.25, videos(True, False), {"a cat": 0.5}]})
    (tmp_path / "results_1_full_info.json").write_text("[]")
    found = load_vbench(tmp_path)
    assert found.scores == {"subject_consistency": 0.9861, "dynamic_degree": 0.25}
    assert found.videos == {"subject_consistency": 3, "dynamic_degree": 2}
    assert found.mean_of_six is None


def test_the_mean_is_that_of_the_six(tmp_path: Path) -> None:
    scores = dict(zip(SIX, (0.95, 0.93, 0.98, 0.55, 0.61, 0.70), strict=True))
    path = write(tmp_path, "r", {name: [score, []] for name, score in scores.items()} | {"human_action": [0.1, []]})
    found = load_vbench(path)
    assert found.mean_of_six == pytest.approx((0.95 + 0.93 + 0.98 + 0.55 + 0.61 + 0.70) / 6)
    assert json.loads(json.dumps(found.to_json()))["scores"]["human_action"] == 0.1


def test_percent_of_early_versions(tmp_path: Path) -> None:
    """Imaging quality alone was left in percent."""
    assert load_vbench(write(tmp_path, "r", {"imaging_quality": [66.9, []]})).scores["imaging_quality"] == 0.669


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"motion_smoothness": [98.0, []]}, "the score 98.0, expected 0 to 1"),
        ({"motion_smoothness": [float("nan"), []]}, "'motion_smoothness' has no score"),
        ({"motion_smoothness": [True, []]}, "has no score"),
        ({"motion_smoothness": []}, "has no score"),
        ({"motion_smoothness": 0.98}, "has no score"),
        ([0.98], "JSON object"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, data: Any, message: str) -> None:
    path = write(tmp_path, "r", data)
    with pytest.raises(InputError, match=message) as caught:
        load_vbench(tmp_path)
    assert str(path) in str(caught.value)


def test_no_results_and_two_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output_path"):
        load_vbench(tmp_path)
    for name in ("results_1", "results_2"):
        write(tmp_path, name, {"aesthetic_quality": [0.6, []]})
    with pytest.raises(InputError, match=r"aesthetic_quality is scored in .*results_1.* and in .*results_2"):
        load_vbench(tmp_path)


# --- the example ---------------------------------------------------------------------------------------------------

EXAMPLE = (Path(__file__).parents[2] / "docs" / "walkthroughs" / "vbench.md").read_text()


def test_the_example_names_the_six_dimensions_and_real_flags() -> None:
    for line in re.findall(r"--dimension ([a-z_ ]+)", EXAMPLE):
        assert tuple(line.split()) == SIX
    shown = re.findall(r"^mlaconvert (\w+) (.*)$", EXAMPLE, re.MULTILINE)
    assert {name for name, _ in shown} == {"generate", "evaluate"}
    for name, arguments in shown:
        assert options()[name].issuperset(re.findall(r"--[a-z-]+", arguments))
