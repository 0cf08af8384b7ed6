"""Models that are evaluated with a narrowed cache: a dense one is then its teacher's rival."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import invoke
from evaluate_cases import STREAMING

from mlaconvert.evaluation.conditions import tiny_conditions
from mlaconvert.evaluation.losses import batches_at, validation_loss
from mlaconvert.evaluation.request import Request
from mlaconvert.evaluation.run import evaluate
from mlaconvert.model.load import load_model
from mlaconvert.model.schedule import Sampler

QUICK = Request(clips=3, frames=8, videos=2, steps=2)


def test_a_dense_model_beside_itself_with_a_narrowed_cache() -> None:
    """Both losses against passes of one's own, the bytes by hand, and drift from the second chunk on."""
    report = evaluate(["tiny"], Request(teacher="tiny", clips=3, frames=9, videos=2, steps=2, cache_dtype="int4"))
    (found,) = report.models
    assert report.teacher == "tiny"
    assert found.path == "tiny, int4 cache"
    assert "The models' caches are narrowed to int4" in " ".join(report.conditions["notes"])
    # Seven frames of 48 tokens, six layers: 192 keys and values; two groups of 24 tokens, six of 32 channels.
    token = 2 * 96 + 192 * 4 * 2 / 48 + 6 * 4
    assert found.cache_bytes == {"teacher": 7 * 48 * 6 * 2 * 192 * 4, "student": 7 * 48 * 6 * token}
    dense, narrow, clips = (
        load_model("tiny"),
        load_model("tiny", cache_dtype="int4"),
        tiny_conditions(None, clips=3).clips,
    )
    assert found.fidelity.teacher_loss == pytest.approx(validation_loss(dense, clips), rel=1e-5)
    assert found.fidelity.student_loss == pytest.approx(validation_loss(narrow, clips), rel=1e-5)
    assert found.clean_past is not None
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for timestep in Sampler.many_step(8).timesteps:
        sigma = torch.zeros(3, 6)
        sigma[:, 3:] = timestep / 1000
        (batch,) = batches_at(narrow, clips, noise, sigma)
        with torch.no_grad():
            error = narrow(batch.noisy, batch.timestep, batch.context) - batch.target
        losses.append(float(error[:, :, 3:].square().mean()))
    assert found.clean_past.student_loss == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert found.clean_past.excess != 0
    assert found.drift is not None
    difference = found.drift.difference["student"]
    assert max(difference[:3]) == 0  # given
    assert 0 < min(difference[3:]) < max(difference[3:]) < 0.2


def test_only_the_models_caches_are_narrowed(made: Path) -> None:
    sources = [str(made / "small"), str(made / "exact")]
    plain, narrow = (evaluate(sources, Request(**(vars(QUICK) | {"cache_dtype": dtype}))) for dtype in (None, "int8"))
    for before, after in zip(plain.models, narrow.models, strict=True):
        assert after.fidelity.teacher_loss == before.fidelity.teacher_loss
        assert after.fidelity.student_loss != before.fidelity.student_loss
        assert after.fidelity.student_loss == pytest.approx(before.fidelity.student_loss, rel=1e-2)
        assert after.cache_bytes["teacher"] == before.cache_bytes["teacher"]
    # Five frames of 8 tokens, 3 layers: 9 channels and 6 rotary ones in a group each, or 9 alone; a float32 norm.
    assert [model.cache_bytes["student"] for model in narrow.models] == [120 * (9 + 4 + 6 + 4 + 4), 120 * (9 + 4 + 4)]
    assert STREAMING.window_frames == 5


def test_the_command_measures_and_never_saves_it_for_the_card(made: Path) -> None:
    flags, before = ("--clips", 2, "--frames", 0, "--cache-dtype"), sorted((made / "small").iterdir())
    done = invoke("evaluate", made / "small", *flags, "fp8", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["models"][0]["path"] == "small, fp8 cache"
    for value, extra, message in (
        ("int5", (), "cache_dtype is 'int5': give fp8, int8, int4, int3, int2, qvg4, qvg3, qvg2 or qvg2-2stages"),
        ("int4", ("--save",), "the card quotes"),
    ):
        refused = invoke("evaluate", made / "small", *flags, value, *extra)
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert sorted((made / "small").iterdir()) == before
