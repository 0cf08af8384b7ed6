"""Publishing and reading back, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
from command_line import invoke
from hub_cases import ALL, REPO, once, states
from hub_server import TOKEN, Blob, Hub
from huggingface_hub import HfApi, constants

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import InputError, MLAConvertError
from mlaconvert.families.source import Source
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_model
from mlaconvert.publishing.hub import Stated, push

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_push_is_one_commit_in_a_private_repository(hub: Hub, folder: Path) -> None:
    report = push(folder, REPO)
    repo = hub.repos[REPO]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert set(repo.files) == ALL
    for name in (CONFIG_NAME, "conversion.json", WEIGHTS_NAME):
        assert repo.files[name].data == (folder / name).read_bytes()
    assert repo.files["README.md"].data.decode() == report.plan.card
    assert report.commit_url == f"{hub.url}/{REPO}/commit/{repo.head}"
    assert set(states(report).values()) == {"new"}
    assert hub.uploaded == (folder / WEIGHTS_NAME).stat().st_size


def test_public_is_a_choice(hub: Hub, folder: Path) -> None:
    push(folder, REPO, public=True)
    assert not hub.repos[REPO].private


def test_only_what_belongs_to_a_model_is_sent(hub: Hub, folder: Path) -> None:
    belongs = ("report.html", "losses.PNG", "LICENSE", "healing.json", "evaluation.json")
    junk = (
        "state.pt",
        "optimizer.safetensors",
        ".hidden.png",
        "notes.txt",
        "logs/run.png",
        "draft.safetensors.partial",
    )
    (folder / "logs").mkdir()
    for name in (*belongs, *junk):
        (folder / name).write_text("{}")
    report = push(folder, REPO)
    assert set(hub.repos[REPO].files) == ALL | set(belongs)
    assert set(report.plan.left_out) == set(junk)


@pytest.mark.parametrize("layout", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_two_experts_go_together(hub: Hub, golden: Path, tmp_path: Path, layout: tuple[str, str]) -> None:
    for name in layout:
        shutil.copytree(golden, tmp_path / "pair" / name)
    convert(tmp_path / "pair", tmp_path / "out", ConvertRecipe(init="svd", kv_rank=5))
    report = push(tmp_path / "out", REPO)
    assert {f"{name}/{WEIGHTS_NAME}" for name in layout} < set(hub.repos[REPO].files)
    assert f'subfolder="{layout[0]}"' in report.plan.card
    assert load_model(Source(REPO, subfolder=layout[1])).config.cached_scalars() == (11, 11, 11)
    assert push(tmp_path / "out", REPO).plan.changes == ()


def test_large_files_go_in_parts(hub: Hub, folder: Path) -> None:
    hub.part_size = 300_000
    push(folder, REPO)
    size = (folder / WEIGHTS_NAME).stat().st_size
    assert hub.count("PUT", "/storage/") == -(-size // 300_000) > 3
    assert hub.repos[REPO].files[WEIGHTS_NAME].data == (folder / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("trouble", [503, "drop"])
def test_a_part_that_fails_is_sent_again_after_a_wait(
    hub: Hub, folder: Path, waits: list[float], trouble: int | str
) -> None:
    hub.part_size = 300_000
    hub.before = once(r"PUT /storage/\w+/3$", trouble)
    push(folder, REPO)
    assert hub.count("PUT", r"/3$") == 2
    assert waits == [1]
    assert hub.repos[REPO].files[WEIGHTS_NAME].data == (folder / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("trouble", [503, "drop"])
def test_a_hub_that_stays_away_leaves_nothing_visible_and_the_next_push_goes_on(
    hub: Hub, folder: Path, waits: list[float], trouble: int | str
) -> None:
    (folder / "losses.png").write_bytes(b"p" * hub_server.LARGE)
    weights = (folder / WEIGHTS_NAME).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    hub.before = lambda method, path: trouble if method == "PUT" and digest in path else None
    with pytest.raises(MLAConvertError, match=r"status 503|connection to the Hub failed") as caught:
        push(folder, REPO)
    assert caught.value.exit_code == 1
    assert waits == [1, 2, 4, 8, 8]
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    hub.before, uploaded = None, hub.uploaded
    push(folder, REPO)  # what is there is empty, so no --update is asked for
    assert set(hub.repos[REPO].files) == ALL | {"losses.png"}
    assert hub.uploaded == uploaded + len(weights)  # the picture was there already


def test_a_commit_that_fails_publishes_nothing_and_no_byte_is_sent_twice(hub: Hub, folder: Path) -> None:
    hub.before = once("POST .*/commit/", 500)
    with pytest.raises(MLAConvertError, match="status 500; nothing is half published") as caught:
        push(folder, REPO)
    assert caught.value.exit_code == 1
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    sent = hub.uploaded
    push(folder, REPO)
    assert hub.uploaded == sent
    assert set(hub.repos[REPO].files) == ALL


def test_a_commit_whose_answer_is_lost_is_found_done(hub: Hub, folder: Path) -> None:
    hub.before = once("POST .*/commit/", "drop-after")
    with pytest.raises(MLAConvertError, match="connection to the Hub failed"):
        push(folder, REPO)
    report = push(folder, REPO)
    assert report.commit_url is None
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.slow
def test_an_interrupted_process_leaves_nothing_visible(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C during the upload, of the program itself, told of the Hub and the token as users tell it."""
    reached: list[str] = []

    def hold(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/3"):
            reached.append(path)
            time.sleep(20)

    hub.part_size, hub.before = 300_000, hold
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    # A shell's background jobs ignore Ctrl-C, and so would a program that one of them starts.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import mlaconvert.cli as c; c.main()"
    )
    command = [sys.executable, "-c", code, "push", str(folder), REPO]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while not reached and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].startswith("interrupted: nothing of it is visible")
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    hub.before = None
    push(folder, REPO)
    assert set(hub.repos[REPO].files) == ALL


def test_a_file_that_the_hub_leaves_out_is_noticed(hub: Hub, folder: Path) -> None:
    repo = hub.create(REPO, private=True)
    repo.commit({**repo.files, ".gitignore": Blob(b"conversion.json", False)})
    with pytest.raises(MLAConvertError, match=r"left out conversion\.json; remove the \.gitignore"):
        push(folder, REPO, update=True)


def test_a_missing_login_ends_in_how_to_log_in(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = invoke("push", folder, REPO)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: nobody is logged in to the Hub; log in with `hf auth login`")
    assert hub.requests == []


def test_a_login_in_the_token_file_serves(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TOKEN)
    push(folder, REPO)
    assert set(hub.repos[REPO].files) == ALL


def test_a_rejected_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    result = invoke("push", folder, REPO)
    assert result.exit_code == 2
    assert "error: the Hub rejected the login; log in with `hf auth login`" in result.stderr
    assert hub.repos == {}


def test_a_client_of_ones_own_brings_endpoint_and_token(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    push(folder, REPO, api=HfApi(endpoint=hub.url, token=TOKEN))
    with pytest.raises(InputError, match="rejected the login"):
        push(folder, "alice/other", api=HfApi(endpoint=hub.url, token="hf_expired"))


def test_somebody_elses_namespace(hub: Hub, folder: Path) -> None:
    with pytest.raises(InputError, match="your login may not do this to bob/wan; log in"):
        push(folder, "bob/wan")


@pytest.mark.parametrize(
    "name", ["wan-mla", "a/b/c", "alice/wan--mla", "alice/wan.git", "alice/", "./wan", "alice/w n"]
)
def test_impossible_names_never_reach_the_hub(hub: Hub, folder: Path, name: str) -> None:
    for arguments in ({"repo": name}, {"repo": REPO, "stated": Stated(base_model=name)}):
        with pytest.raises(InputError, match="give user/name"):
            push(folder, **arguments)
    assert hub.requests == []
