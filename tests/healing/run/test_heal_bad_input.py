"""Whole healing runs: interrupted and resumed, diverged, on two processes, sharded, and from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_run_cases import run, save_teacher, settings
from safetensors.torch import load_file, save_file

from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.files.inputs import refuse_foreign_links
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.output import plot_curves
from mlaconvert.healing.run import heal
from mlaconvert.healing.state import LAST, load


def test_what_does_not_fit_is_refused_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", WEIGHTS_NAME):
        (bare / name).symlink_to(home / "student" / name)
    poor = tmp_path / "poor"
    poor.mkdir()
    save_file(load_file(home / "clips" / "0.safetensors"), poor / "0.safetensors")
    both = save_teacher(tmp_path / "bidirectional", None)
    few = save_teacher(tmp_path / "few")
    (few / "config.json").write_text(json.dumps(json.loads((few / "config.json").read_text()) | {"few_step": True}))
    distill, shared, out = settings("distill"), settings("distill", data_share=0.2), tmp_path / "out"
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (InputError, "does not record what it was converted from", lambda: heal(bare, out, distill)),
        (InputError, "no such folder of clips", lambda: run(home, out, distill, data=tmp_path / "none")),
        (ConfigError, "data_share is 0.2, .* --data", lambda: run(home, out, shared, data=None)),
        (ConfigError, "generates in a few steps", lambda: run(home, out, shared, teacher=few)),
        (ConfigError, "needs clips", lambda: run(home, out, settings("dmd"), data=None)),
        (ConfigError, "null_context", lambda: run(home, out, settings("dmd"), data=poor)),
        (ConfigError, "needs a streaming teacher", lambda: run(home, out, settings("consistency"), teacher=both)),
        (InputError, "has dim 48, the teacher .* 192", lambda: run(home, out, distill, teacher="tiny")),
        (OutputError, "exists", lambda: run(home, bare, distill)),
        (OutputError, "does not exist", lambda: run(home, tmp_path / "a" / "b", distill)),
        (OutputError, "no healing run's state", lambda: run(home, out, distill, state=poor, restart=True)),
    ]
    before = sorted(tmp_path.rglob("*"))
    for error, message, call in cases:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "conversion.json", "healing.json"])
def test_what_a_link_leads_to_is_not_copied_into_the_output(home: Path, tmp_path: Path, name: str) -> None:
    """Whoever made the folder would else have a file of the user's in a model that is published next."""
    folder = shutil.copytree(home / "student", tmp_path / "student")
    (tmp_path / "mine").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=f"{name} is a link, and what it leads to would be copied"):
        heal(folder, tmp_path / "out", settings("distill", steps=1), teacher=home / "teacher")
    assert {path.name for path in tmp_path.iterdir()} == {"student", "mine"}
    # In the Hub's cache, all files are links: those to its own blobs are read.
    cache = tmp_path / "models--alice--student"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(home / "student", snapshot)
    shutil.copy(home / "student" / "README.md", cache / "blobs" / "1")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../blobs/1")
    refuse_foreign_links(snapshot, ["README.md", "conversion.json"])
    (cache / "blobs" / "1").unlink()
    (cache / "blobs" / "1").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"README\.md is a link"):
        refuse_foreign_links(snapshot, ["README.md"])


def test_a_bidirectional_teacher_distills_what_it_sees(home: Path, tmp_path: Path) -> None:
    both = save_teacher(tmp_path / "bidirectional", None)
    report = run(home, tmp_path / "out", settings("distill", attention_steps=1), teacher=both)
    assert len(report.curves.losses) == 4


def test_mixed_precision_trains_float32_weights(home: Path, tmp_path: Path) -> None:
    recipe = settings("distill", precision="bf16", gradient_checkpointing=True, steps=2)
    report = run(home, tmp_path / "out", recipe)
    exact = run(home, tmp_path / "exact", settings("distill", steps=2))
    assert load(tmp_path / "out.state" / LAST)["parts"]["student"]["weights"].popitem()[1].dtype == torch.float32
    assert report.curves.losses[0][1] == pytest.approx(exact.curves.losses[0][1], rel=0.05)
    assert report.curves.losses[0][1] != exact.curves.losses[0][1]


def test_saved_moments_are_those_of_what_is_trained(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", settings("distill", train="latent", steps=2))
    part = load(tmp_path / "out.state" / LAST)["parts"]["student"]
    assert set(part["optimizer"]) == set(part["weights"])
    assert all("self_attn" in name and "k_norm_proj" not in name for name in part["weights"])


def test_the_plot_draws_short_and_long_runs() -> None:
    from mlaconvert.healing.loop import Curves

    for steps in (1, 50):
        curves = Curves(losses=[[i + 1, 1.0, 0.1, 1.0] for i in range(steps)], validation=[[0, 1.0], [steps, 0.5]])
        assert plot_curves(curves, settings("dmd")).startswith(b"\x89PNG")


def test_a_tracker_that_is_not_installed_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would leave it out without a word."""
    monkeypatch.setattr("mlaconvert.healing.loop.get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"tracker wandb is not installed; install it \(pip install wandb\)"):
        run(home, tmp_path / "out", settings("distill", tracker="wandb"))
    with pytest.raises(ConfigError, match=r"tracker is 'abacus': give .*wandb.* or none"):
        run(home, tmp_path / "out", settings("distill", tracker="abacus"))
    assert list(tmp_path.iterdir()) == []
