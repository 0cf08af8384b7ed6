"""Publishing and reading back, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hub_cases import ALL, REPO, edit_json, states
from hub_server import Blob, Hub

from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, InputError, OutputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.listener import Listener
from mlaconvert.publishing.hub import push

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SECRET = b"a key of mine"


def outside(folder: Path, content: bytes = SECRET) -> Path:
    """A file beside the folder that nobody means to publish."""
    secret = folder.parent / "mine"
    secret.write_bytes(content)
    return secret


def refused(hub: Hub, folder: Path, link: str) -> None:
    """Neither sent nor shown, and the Hub is not even asked."""
    pattern = re.escape(f"{folder / link} is a link, and only files of the folder itself are taken")
    for options in ({}, {"dry_run": True}, {"update": True}):
        with pytest.raises(InputError, match=pattern) as caught:
            push(folder, REPO, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["sample.png", "clip.MP4", "report.html", "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "healing.json",
     "evaluation.json", "conversion.json", "config.json", WEIGHTS_NAME],
)  # fmt: skip
def test_nothing_outside_the_folder_is_sent(hub: Hub, folder: Path, name: str) -> None:
    """A link to a file of the user's, whatever it is called, to another link, and to a file inside that stays here."""
    path = folder / name
    content = path.read_bytes() if path.exists() else b"{}"
    first = outside(folder, content)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(content)
    second = folder.parent / "second"
    second.symlink_to(first)
    for target in (first, Path("../mine"), second, Path(".git/config")):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        refused(hub, folder, name)


def test_a_linked_index_shard_and_expert(hub: Hub, golden: Path, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        shutil.copytree(golden, tmp_path / "pair" / name)
    folder = tmp_path / "out"
    convert(tmp_path / "pair", folder, ConvertRecipe(init="svd", kv_rank=5))
    inner = folder / "transformer_2"
    (inner / "sample.png").symlink_to(outside(folder))
    refused(hub, folder, "transformer_2/sample.png")
    (inner / "sample.png").unlink()
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    refused(hub, folder, "transformer_2")


def test_links_that_are_not_sent_and_the_folders_own(hub: Hub, folder: Path) -> None:
    """What stays here may be a link, the folder may be given by one, and a hard link is a file like any other."""
    secret = outside(folder)
    for name in ("notes.txt", ".hidden.png"):
        (folder / name).symlink_to(secret)
    (folder / "nowhere.png").symlink_to(folder.parent / "none")
    (folder / "logs").symlink_to(folder.parent)
    os.link(folder.parent / "mine", folder / "hard.png")
    given = folder.parent / "given"
    given.symlink_to(folder)
    push(given, REPO)
    assert set(hub.repos[REPO].files) == ALL | {"hard.png"}
    for name in (CONFIG_NAME, "conversion.json", WEIGHTS_NAME):
        assert hub.repos[REPO].files[name].data == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["conversion.json", WEIGHTS_NAME])
def test_a_file_that_becomes_a_link_meanwhile(hub: Hub, folder: Path, name: str) -> None:
    """Once it is opened to be sent, what was opened is sent; before that, it is refused."""
    content = (folder / name).read_bytes()
    secret = outside(folder, bytes(len(content)))
    (folder / "kept").write_bytes(content)

    def swap(method: str, path: str) -> None:
        if moment in path:
            (folder / name).unlink()
            (folder / name).symlink_to(secret)
            hub.before = None

    moment, hub.before = "repos/create", swap
    with pytest.raises(InputError, match=f"{name} is a link"):
        push(folder, REPO)
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    (folder / name).unlink()
    (folder / "kept").rename(folder / name)
    moment, hub.before = "/preupload/", swap
    push(folder, REPO)
    assert (folder / name).is_symlink()
    assert hub.repos[REPO].files[name].data == content


def test_the_hubs_cache_is_read_through_its_links_but_not_published(hub: Hub, folder: Path) -> None:
    push(folder, REPO)
    with open_checkpoint(REPO) as found:
        cached = found.store.files[0]
        config = found.config
    if not cached.is_symlink():
        pytest.skip("the Hub's client makes no links here")
    with open_checkpoint(cached.parent) as again:
        assert again.config == config
    hub.requests.clear()
    refused(hub, cached.parent, CONFIG_NAME)


def test_a_second_push_sends_only_what_changed(hub: Hub, folder: Path) -> None:
    push(folder, REPO)
    sent, requests = hub.uploaded, len(hub.requests)
    report = push(folder, REPO)  # the same again needs no --update, and does nothing
    assert (report.commit_url, report.plan.changes) == (None, ())
    assert set(states(report).values()) == {"same"}
    assert {method for method, _ in hub.requests[requests:]} <= {"GET", "HEAD"}

    conversion = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps(conversion | {"remark": "changed"}))
    with pytest.raises(OutputError, match="pass --update"):
        push(folder, REPO)
    assert len(hub.repos[REPO].commits) == 2
    report = push(folder, REPO, update=True)
    assert [file.path for file in report.plan.changes] == ["conversion.json"]
    assert report.plan.upload_bytes == (folder / "conversion.json").stat().st_size
    assert hub.uploaded == sent
    assert hub.repos[REPO].files["conversion.json"].data == (folder / "conversion.json").read_bytes()


def test_changed_weights_of_the_same_size_are_sent(hub: Hub, folder: Path) -> None:
    push(folder, REPO)
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)
    hashed: list[tuple[str, int, int]] = []
    report = push(folder, REPO, listener=Listener(progress=lambda *step: hashed.append(step)), update=True)
    assert [file.path for file in report.plan.changes] == [WEIGHTS_NAME]
    assert hub.repos[REPO].files[WEIGHTS_NAME].data == bytes(data)
    assert hashed[-1][0] == "hash"
    total = len(report.plan.card.encode())
    total += sum((folder / name).stat().st_size for name in (CONFIG_NAME, "conversion.json", WEIGHTS_NAME))
    assert hashed[-1][1:3] == (total, total)


def test_files_gone_from_the_folder_go_from_the_hub_and_others_stay(hub: Hub, folder: Path) -> None:
    (folder / "evaluation.json").write_text("{}")
    push(folder, REPO)
    repo = hub.repos[REPO]
    vae, samples = f"vae/{WEIGHTS_NAME}", "samples.png"
    stale = "diffusion_pytorch_model.safetensors.index.json"  # it would be read in place of the weights
    foreign = {vae: Blob(b"vae", True), samples: Blob(b"picture", False), stale: Blob(b"{}", False)}
    repo.commit({**repo.files, **foreign})
    (folder / "evaluation.json").unlink()
    with pytest.raises(OutputError, match="pass --update"):
        push(folder, REPO)
    report = push(folder, REPO, update=True)
    assert {file.path for file in report.plan.changes} == {"evaluation.json", stale}
    assert {file.state for file in report.plan.changes} == {"deleted"}
    assert set(repo.files) == ALL | {vae, samples}


def test_a_repository_of_something_else_keeps_its_files(hub: Hub, folder: Path) -> None:
    repo = hub.create(REPO, private=True)
    repo.commit({**repo.files, "healing.json": Blob(b"of another tool", False)})
    report = push(folder, REPO, update=True)
    assert "healing.json" not in states(report)
    assert repo.files["healing.json"].data == b"of another tool"


def test_a_repository_that_changes_underneath_is_left_alone(hub: Hub, folder: Path) -> None:
    push(folder, REPO)
    repo = hub.repos[REPO]
    edit_json(folder / "conversion.json", remark="ours")

    def interfere(method: str, path: str) -> None:
        if "/preupload/" in path:
            repo.commit({**repo.files, "theirs.txt": Blob(b"theirs", False)})

    hub.before = interfere
    with pytest.raises(OutputError, match="changed by somebody else just now, so nothing was published") as caught:
        push(folder, REPO, update=True)
    assert caught.value.exit_code == 2
    assert len(repo.commits) == 3
    assert b"ours" not in repo.files["conversion.json"].data


@pytest.mark.parametrize(
    "moment", ["POST /api/repos/create", f"GET /api/models/{REPO}$", "GET .*/tree/", "POST .*/preupload/"]
)
def test_a_repository_that_somebody_fills_at_the_same_time(hub: Hub, folder: Path, moment: str) -> None:
    def interfere(method: str, path: str) -> None:
        created = "models" not in moment or REPO in hub.repos
        if re.search(moment, f"{method} {path}") and created:
            hub.before = None
            repo = hub.repos.get(REPO) or hub.create(REPO, private=True)
            repo.commit({**repo.files, "theirs.txt": Blob(b"theirs", False)})

    hub.before = interfere
    with pytest.raises(OutputError, match="by somebody else just now"):
        push(folder, REPO)
    assert set(hub.repos[REPO].files) == {".gitattributes", "theirs.txt"}


def test_a_push_never_changes_who_can_see_it(hub: Hub, folder: Path) -> None:
    hub.create("alice/open")
    with pytest.raises(OutputError, match="is public: everybody would see"):
        push(folder, "alice/open")
    push(folder, "alice/open", public=True)
    hub.create("alice/closed", private=True)
    with pytest.raises(OutputError, match="is private: leave --public out"):
        push(folder, "alice/closed", public=True)


def test_folders_that_are_no_converted_model(hub: Hub, folder: Path, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        push(tmp_path / "none", REPO)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        push(folder / WEIGHTS_NAME, REPO)
    with pytest.raises(CheckpointError, match="it is a dense model; convert it first"):
        push(golden, REPO)
    with (folder / WEIGHTS_NAME).open("r+b") as stream:
        stream.truncate(1_000_000)
    with pytest.raises(CheckpointError, match="promises"):
        push(folder, REPO)
    assert hub.requests == []
