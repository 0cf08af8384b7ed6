"""The losses of healing, each against the same thing written longhand with the public model and its cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from heal_cases import LAYER, STREAMING, STUDENT, beside_present, make_batch, model, recipe
from torch import Tensor

from mlaconvert.healing.stages.teacher_forcing import TeacherForcing
from mlaconvert.healing.state import Trained, choose_trained


def test_frozen_parts_get_no_gradients() -> None:
    net, batch = model(STUDENT, 2), make_batch()
    counts = {}
    for train in ("latent", "attention", "all"):
        names = choose_trained(net, train)  # type: ignore[arg-type]
        net.zero_grad(set_to_none=True)
        TeacherForcing(net, recipe("teacher-forcing"), STREAMING).loss(batch, 0).backward()
        assert sorted(names) == sorted(name for name, p in net.named_parameters() if p.grad is not None)
        counts[train] = len(names)
        if train != "all":
            assert all(".self_attn." in name for name in names)
    assert counts == {"latent": 2 * 5, "attention": 2 * 12, "all": len(list(net.parameters()))}


@pytest.mark.parametrize(("rope", "count"), [("head", 5), ("latent", 8), ("cached", 6)])
def test_of_a_layer_beside_an_exact_present_latent_is_what_its_past_is_read_with(rope: Any, count: int) -> None:
    """The teacher's own keys, values and queries stay; whatever leads from latents to the output learns."""
    net = model(beside_present(rope), 2)
    names = choose_trained(net, "latent")
    TeacherForcing(net, recipe("teacher-forcing"), STREAMING).loss(make_batch(), 0).backward()
    assert sorted(names) == sorted(name for name, p in net.named_parameters() if p.grad is not None)
    assert all(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)
    assert len(names) == 2 * count
    owned = {name.split(".")[3] for name, _ in net.named_parameters() if ".self_attn." in name}
    learning = {name.split(".")[3] for name in names}
    assert owned - learning == {"q_a_proj", "q_a_layernorm", "k_norm_proj", "k_norm", "v_proj", "o"}


@pytest.mark.parametrize("rank", [7, 8])
@pytest.mark.parametrize("rope", ["cached", "latent", "head"])
@pytest.mark.parametrize("key_norm", ["token", "latent"])
@pytest.mark.parametrize("present", ["latent", "exact"])
def test_gradients_reach_every_kind_of_layer(present: Any, rope: Any, key_norm: Any, rank: int) -> None:
    """Held to a finite difference along the gradient, in float64, whatever the channels' places in memory."""
    layer = dataclasses.replace(LAYER, kv_lora_rank=rank)
    if rope == "head":
        layer = dataclasses.replace(layer, rope_components=(), qk_nope_head_dim=12)
    assert STUDENT.mla is not None
    mla = dataclasses.replace(STUDENT.mla, rope=rope, key_norm=key_norm, present=present, layers=(layer, layer))
    net = model(dataclasses.replace(STUDENT, mla=mla), 2)
    names = choose_trained(net, "attention")
    parameters = [p for p in net.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return TeacherForcing(net, recipe("teacher-forcing"), STREAMING).loss(make_batch(), 0).double()

    loss().backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(names)
    size = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    values = []
    for step in (0.05, -0.05):
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=step / size)
            values.append(loss().item())
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=step / size)
    assert (values[0] - values[1]) / 0.1 == pytest.approx(size, rel=2e-2)


class Scalars(torch.nn.Module):
    """Two trained parameters of a student, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.student = torch.nn.ParameterDict({"a": torch.zeros(3), "b": torch.zeros(()), "frozen": torch.ones(2)})
        self.student["frozen"].requires_grad_(False)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_keeps_most_of_itself_and_takes_in_little_of_the_weights(decay: float) -> None:
    """By hand: after step t it keeps min(decay, (1 + t) / (10 + t)) of itself; the rest comes from the weights."""
    objective = Scalars()
    trained = Trained(objective, torch.optim.AdamW(objective.parameters()), decay)
    expected = 0.0
    for step, value in ((0, 1.0), (1, -2.0), (8, 5.0), (200, 7.0), (201, 3.0)):
        for parameter in trained.parameters.values():
            parameter.data.fill_(value)
        trained.follow(step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        assert {name: found.unique().tolist() for name, found in trained.weights().items()} == {
            name: [pytest.approx(expected, rel=1e-6)] for name in ("a", "b")
        }
    with trained.averaged():
        assert objective.student["a"].tolist() == [pytest.approx(expected, rel=1e-6)] * 3
    assert objective.student["a"].tolist() == [3.0] * 3


def test_without_an_average_the_weights_are_what_counts() -> None:
    objective = Scalars()
    trained = Trained(objective, torch.optim.AdamW(objective.parameters()), 0.0)
    objective.student["a"].data.fill_(2.0)
    trained.follow(0)
    with trained.averaged():
        assert trained.weights()["a"].tolist() == objective.student["a"].tolist() == [2.0] * 3
