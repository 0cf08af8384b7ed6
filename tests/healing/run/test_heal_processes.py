"""Whole healing runs: interrupted and resumed, diverged, on two processes, sharded, and from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import succeed
from heal_cases import STREAMING
from heal_run_cases import HANG, in_processes, settings, with_bad_clips
from safetensors.torch import load_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.healing.stages.distill import Distill
from mlaconvert.healing.state import LAST, load, save
from mlaconvert.model.load import load_model


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(home: Path, tmp_path: Path) -> None:
    """Through the launcher, as users start it, and without the bad clips, which both leave out."""
    clips = with_bad_clips(home, tmp_path / "clips", 1, 7)
    flags = ["--data", str(clips), "--bad-shards", "skip", "--stage", "teacher-forcing", "--steps", "4", "--cpu"]
    flags += ["--lr", "2e-3"]
    flags += ["--save-every", "2", "--validate-every", "2", "--tracker", "none"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = tmp_path / "pair"
    done = subprocess.run(
        [*launch, "-m", "mlaconvert", "heal", str(home / "student"), "-o", str(output), *flags, "--batch", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 4/4") == done.stderr.count("are left out") == 1  # only one process speaks
    succeed("heal", home / "student", "-o", tmp_path / "alone", *flags, "--batch", "4")
    ours, theirs = (load_file(folder / WEIGHTS_NAME) for folder in (output, tmp_path / "alone"))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours)
    assert load(tmp_path / "pair.state" / LAST)["processes"] == 2


def sharded(home: Path, folder: Path, student: str) -> None:
    """One of two processes: train with torch's fully_shard, save, restore into a fresh objective, and train on."""
    from torch.distributed.fsdp import fully_shard

    from mlaconvert.clips.folder import ClipFolder
    from mlaconvert.healing.batches import Batches, StoredClips
    from mlaconvert.healing.models import trainable
    from mlaconvert.healing.state import Trained, choose_trained, make_optimizer

    together = torch.distributed.is_initialized()
    world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if together else (1, 0)
    recipe = settings("distill", batch=2, train="attention", attention_steps=2).resolved()
    with open_checkpoint(home / student) as pupil, open_checkpoint(home / "teacher") as teacher:
        clips = ClipFolder(home / "clips", pupil.config)
        # Alone, one process does what the two would: each loss is over its own clips.
        shares = [
            Batches(StoredClips(clips, None, held=1, seed=0), recipe, STREAMING, rank=r, world=2)
            for r in ((rank,) if together else (0, 1))
        ]
        frozen = load_model(teacher)

        def start() -> tuple[Trained, Any]:
            objective = Distill(trainable(pupil), frozen, recipe, STREAMING)
            choose_trained(objective.student, recipe.train)
            if world > 1:
                units = [m for m in objective.modules() if type(m).__name__ in objective._no_split_modules]
                for module in [*reversed(units), objective]:
                    fully_shard(module)
            optimizer = make_optimizer(objective, recipe, 2e-3)
            return Trained(objective, optimizer, 0.9), objective

        trained, objective = start()
        losses = []
        for step in range(4):
            if step == 3:  # a fresh start from a saved state in the middle
                state = trained.state()
                trained, objective = start()
                trained.restore(state)
            loss = torch.stack([objective.call(objective.loss, share.batch(step), step) for share in shares]).mean()
            loss.backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            trained.follow(step)
            losses.append(loss.item())
        with torch.no_grad(), trained.averaged():
            value = objective.call(objective.loss, shares[0].batch(9), 9).item()
        kinds = {type(p).__name__ for p in trained.parameters.values()}
        state = {"weights": trained.state()["weights"], "average": trained.weights()}
    if rank == 0:
        save(folder / f"{world}.pt", {"state": state, "losses": losses, "value": value, "kinds": sorted(kinds)})


@pytest.mark.slow
@pytest.mark.parametrize("student", ["student", "exact"])
def test_a_sharded_run_is_the_whole_run(home: Path, tmp_path: Path, student: str) -> None:
    if student == "exact":  # its present
        recipe = ConvertRecipe(
            init="svd", kv_rank=7, present="exact", rope="latent", v_dim=9, height=4, width=6, vae_stride=1
        )
        convert(home / "teacher", home / student, recipe)
    sharded(home, tmp_path, student)
    assert in_processes(_in_group, *((rank, home, tmp_path, student) for rank in range(2))) == [0, 0]
    one, two = load(tmp_path / "1.pt"), load(tmp_path / "2.pt")
    assert (one["kinds"], two["kinds"]) == (["Parameter"], ["DTensor"])
    assert two["value"] == pytest.approx(one["value"], rel=1e-4)
    for kind in ("weights", "average"):
        for name, tensor in one["state"][kind].items():
            assert torch.allclose(two["state"][kind][name], tensor, atol=2e-5), name


def _in_group(rank: int, home: Path, folder: Path, student: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    sharded(home, folder, student)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
