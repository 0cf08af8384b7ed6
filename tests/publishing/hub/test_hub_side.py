"""Publishing and reading back, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import invoke
from hub_cases import ALL, REPO, once
from hub_server import Hub
from safetensors.torch import load_file

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.model.load import load_model
from mlaconvert.publishing.hub import push

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
WEIGHTS = rf"/{WEIGHTS_NAME}$"


def test_what_was_pushed_loads_from_the_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, REPO)
    with open_checkpoint(REPO) as found, open_checkpoint(folder) as local:
        assert found.config == local.config
        assert found.raw_config == local.raw_config
        assert "hf/hub" in found.store.path.as_posix()
    ours, theirs = (
        load_file(folder / WEIGHTS_NAME),
        load_model(Source(REPO, revision=hub.repos[REPO].head)).state_dict(),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(CheckpointError, match="log in with `hf auth login`"):
        open_checkpoint(REPO)


@pytest.mark.slow
def test_evaluation_goes_along_and_can_be_repeated_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """What evaluate saves is what the card says, and evaluating the published model finds it again."""
    folder = tmp_path / "tiny-mla"
    convert("tiny", folder, ConvertRecipe(init="svd"))
    flags = ("--clips", 1, "--frames", 0, "--json")
    result = invoke("evaluate", folder, "--save", *flags)
    assert result.exit_code == 0, result.stderr
    (local,) = json.loads(result.stdout)["models"]
    report = push(folder, REPO)
    assert {"evaluation.json", "report.html"} < set(hub.repos[REPO].files)
    for pasts, measured in (("with noisy pasts", local), ("behind clean pasts", local["clean_past"])):
        teacher, student = measured["teacher_loss"], measured["student_loss"]
        row = f"| loss {pasts} | {teacher:.4g} | {student:.4g} ({100 * (student / teacher - 1):+.1f}%) |"
        assert row in report.plan.card
        error = f"| velocity {pasts}, relative error |  | {100 * measured['velocity_error']:.2f}% |"
        assert error in report.plan.card
    assert "not been evaluated" not in report.plan.card
    assert str(tmp_path) not in report.plan.card
    assert str(tmp_path).encode() not in hub.repos[REPO].files["evaluation.json"].data
    shutil.rmtree(folder)
    result = invoke("evaluate", REPO, *flags)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["models"]
    assert found | {"path": "tiny-mla"} == local


def test_a_download_that_is_cut_goes_on(hub: Hub, folder: Path, waits: list[float]) -> None:
    push(folder, REPO)
    hub.before = once(rf"GET .*/{WEIGHTS_NAME}$", "drop")
    model = load_model(REPO)
    assert model.config.cached_scalars() == (16, 16, 16)
    assert hub.count("GET", WEIGHTS) == 2


def test_the_command_prints_the_commit_and_says_what_it_does(hub: Hub, folder: Path) -> None:
    (folder / "notes.txt").write_text("private")
    result = invoke("push", folder, REPO)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].head}\n"
    assert f"{REPO} (private, will be created)" in result.stderr
    assert re.search(rf"new +1\.41 MiB  {WEIGHTS_NAME}", result.stderr)
    assert re.search(r"left out +notes\.txt", result.stderr)
    assert "note: the card names no base model" in result.stderr
    result = invoke("push", folder, REPO)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"{REPO} holds all of this already: nothing to do" in result.stderr


@pytest.mark.parametrize("login", [True, False])
def test_a_dry_run_lists_files_and_card_and_changes_nothing(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, login: bool
) -> None:
    if not login:
        monkeypatch.delenv("HF_TOKEN")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = invoke("push", folder, REPO, "--dry-run", "--license", "apache-2.0")
    assert result.exit_code == 0, result.stderr
    for text in (WEIGHTS_NAME, "conversion.json", "1.41 MiB", "license: apache-2.0", "## Known limits"):
        assert text in result.stdout
    assert ("not logged in" in result.stdout) != login
    assert result.stderr.splitlines()[-1] == "dry run: nothing was sent"
    assert {method for method, _ in hub.requests} == ({"GET"} if login else set())
    assert hub.repos == {}
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_json_is_only_json(hub: Hub, folder: Path) -> None:
    plan = json.loads(invoke("push", folder, REPO, "--public", "--dry-run", "--json").stdout)
    assert (plan["repo"], plan["private"], plan["exists"], plan["commit_url"]) == (REPO, False, False, None)
    assert {file["path"]: file["state"] for file in plan["files"]} == dict.fromkeys(ALL - {".gitattributes"}, "new")
    assert plan["upload_bytes"] == sum(file["bytes"] for file in plan["files"])
    data = json.loads(invoke("push", folder, REPO, "--public", "--json").stdout)
    assert data["commit_url"].endswith(hub.repos[REPO].head)
    assert data["card"] == hub.repos[REPO].files["README.md"].data.decode()
