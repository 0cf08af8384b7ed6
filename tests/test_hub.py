"""Publishing and reading back, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
import yaml
from conftest import randomize
from hub_server import TOKEN, Blob, Hub
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from mlaconvert.cli import app
from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, InputError, MLAConvertError, OutputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files import names
from mlaconvert.files.names import CONFIG_NAME, HEALING_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_model
from mlaconvert.model.wan import WanModel
from mlaconvert.publishing.hub import push
from mlaconvert.publishing.plan import PushReport
from mlaconvert.reports.card import CardFacts, CardModel, is_generated, write_card

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SaveFolder = Callable[..., Path]
REPO = "alice/wan-mla"
WEIGHTS = rf"/{WEIGHTS_NAME}$"
ALL = {".gitattributes", "README.md", CONFIG_NAME, "conversion.json", WEIGHTS_NAME}


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "wan-mla"
    convert(golden, path, ConvertRecipe(init="svd", kv_rank=10))
    return path


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted model folder of this test's own."""
    return Path(shutil.copytree(converted, tmp_path / "wan-mla"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client waited, without waiting them."""
    seconds: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", seconds.append)
    return seconds


def states(report: PushReport) -> dict[str, str]:
    return {file.path: file.state for file in report.plan.files}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def once(pattern: str, verdict: int | str) -> Callable[[str, str], int | str | None]:
    """Do `verdict` to the first request whose "METHOD path" matches."""
    left = [verdict]

    def before(method: str, path: str) -> int | str | None:
        return left.pop() if left and re.search(pattern, f"{method} {path}") else None

    return before


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- the first push ----------------------------------------------------------------------------------------------


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
    assert load_model(REPO, subfolder=layout[1]).config.cached_scalars() == (11, 11, 11)
    assert push(tmp_path / "out", REPO).plan.changes == ()


# --- links -------------------------------------------------------------------------------------------------------


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


# --- transfers that go wrong -------------------------------------------------------------------------------------


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
    assert err.splitlines()[-1] == "interrupted"
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    hub.before = None
    push(folder, REPO)
    assert set(hub.repos[REPO].files) == ALL


def test_a_file_that_the_hub_leaves_out_is_noticed(hub: Hub, folder: Path) -> None:
    repo = hub.create(REPO, private=True)
    repo.commit({**repo.files, ".gitignore": Blob(b"conversion.json", False)})
    with pytest.raises(MLAConvertError, match=r"left out conversion\.json; remove the \.gitignore"):
        push(folder, REPO, update=True)


# --- who may -----------------------------------------------------------------------------------------------------


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
    for arguments in ({"repo": name}, {"repo": REPO, "base_model": name}):
        with pytest.raises(InputError, match="give user/name"):
            push(folder, **arguments)
    assert hub.requests == []


# --- updates -----------------------------------------------------------------------------------------------------


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
    report = push(folder, REPO, update=True, progress=lambda *step: hashed.append(step))
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


# --- what is pushed ----------------------------------------------------------------------------------------------


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


# --- the card ----------------------------------------------------------------------------------------------------


def test_metadata_and_licence_come_from_the_base_model(hub: Hub, folder: Path) -> None:
    hub.create("Wan-AI/Wan2.1-T2V-1.3B", card={"license": "apache-2.0"})
    source = {"name": "Wan-AI/Wan2.1-T2V-1.3B/transformer", "subfolder": "", "sha256": "ab12"}
    edit_json(folder / "conversion.json", source=source)
    card = ModelCard(push(folder, REPO).plan.card)
    assert card.data.to_dict() == {
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B",
        "base_model_relation": "finetune",
        "library_name": "mlaconvert",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-video",
        "tags": ["multi-head-latent-attention", "mla", "kv-cache", "video-diffusion", "wan"],
    }
    assert "# wan-mla\n" in card.text
    assert "[Wan-AI/Wan2.1-T2V-1.3B](https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B)" in card.text
    assert "caches 48 scalars instead of 576 (91.7% less)" in card.text
    assert f"`mlaconvert evaluate {REPO}` measures it again" in card.text
    assert "SHA-256 of the source's weight files, in order of their names: `ab12`" in card.text


@pytest.mark.parametrize(
    ("rope", "said", "cached"),
    [
        ("cached", "one of 4 scalars for all heads of a layer, cached beside the latent", "9 to 96"),
        ("latent", "one of 4 scalars for all heads of a layer, read from the latent", "5 to 96"),
        ("head", "each head's own content keys", "5 to 96"),
    ],
)
def test_the_geometry_says_where_the_rotary_key_is(rope: Any, said: str, cached: str) -> None:
    pairs = () if rope == "head" else ((0, 1), (3, 1))
    layer = MLALayer(kv_lora_rank=5, qk_nope_head_dim=12, v_head_dim=16, rope_components=pairs)
    mla = MLAConfig(q_lora_rank=7, key_norm="latent", softmax_scale=0.25, layers=(layer, None), rope=rope)
    config = WanConfig(dim=48, num_heads=3, num_layers=2, ffn_dim=20, mla=mla)
    model = CardModel(subfolder="", config=config, description="", conversion={}, healing={}, evaluation={})
    card = write_card(CardFacts(repo=REPO, models=(model,), base_model=None, license={}))
    assert f"| rotary key | {said}" in card
    assert f"| cached for a token, a layer | {cached} scalars, dense 96 |" in card
    assert "| converted layers | 1 of 2 |" in card


def test_a_licence_is_inherited_whole_or_not_invented(hub: Hub, folder: Path) -> None:
    own = {"license": "other", "license_name": "skywork", "license_link": "https://example.org/licence"}
    hub.create("sky/work", card=own | {"language": "en"})
    hub.create("sky/silent")

    def metadata(**options: Any) -> tuple[dict[str, Any], str]:
        plan = push(folder, REPO, dry_run=True, **options).plan
        return ModelCard(plan.card).data.to_dict(), " ".join(plan.notes)

    data, notes = metadata(base_model="sky/work")
    assert own.items() <= data.items()
    assert notes == ""
    for base in ("sky/silent", "sky/gone"):
        data, notes = metadata(base_model=base)
        assert "license" not in data
        assert "give --license ID" in notes
    data, notes = metadata()
    assert {"license", "base_model", "base_model_relation"}.isdisjoint(data)
    assert "give --base-model USER/REPO" in notes
    assert metadata(base_model="sky/work", license="mit")[0]["license"] == "mit"
    hub.before = once("GET /api/models/sky/work", 503)
    with pytest.raises(MLAConvertError, match="sky/work: the Hub answered with status 503"):
        metadata(base_model="sky/work")


def test_a_licence_that_the_hub_does_not_know(hub: Hub, folder: Path) -> None:
    with pytest.raises(InputError, match="the Hub refused the files or the card"):
        push(folder, REPO, license="nonsense")
    assert set(hub.repos[REPO].files) == {".gitattributes"}


def test_the_recipe_in_the_card_makes_the_same_model(hub: Hub, folder: Path, golden: Path, tmp_path: Path) -> None:
    card = push(folder, REPO, dry_run=True).plan.card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = invoke("convert", golden, "-o", tmp_path / "again", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


EVALUATION = {
    "teacher": "wan_tiny",
    "data": {"from": "somewhere", "clips": 7, "seeds": list(range(40))},
    "conditions": {"seed": 3, "notes": ["a note"]},
    "versions": {"torch": "2.6"},
    "models": [
        {
            "path": "wan-mla",
            "teacher_loss": 0.25,
            "student_loss": 0.28,
            "excess": 0.12,
            "velocity_error": 0.0345,
            "velocity_by_timestep": [{"timestep": 1000.0}] * 40,
            "attention_errors": [0.1, 0.3, 0.2],
            "cache_bytes": {"teacher": 4096, "student": 512},
            "frames_per_second": {"teacher": 2.0, "student": 3.5, "ratio": 1.75},
            "vbench": {"scores": {"imaging_quality": 0.61}},
        }
    ],
    "teacher_vbench": {"scores": {"imaging_quality": 0.64}},
}


def test_figures_stand_with_their_conditions(hub: Hub, folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    stage = {"recipe": {"stage": "distill", "steps": 300, "ema": None}, "teacher": "wan_tiny", "written": {"step": 250}}
    last = {"recipe": {"stage": "dmd", "betas": [0.0, 0.9]}, "losses": {"rows": [[1, 0.5]] * 400}, "before": [stage]}
    (folder / "healing.json").write_text(json.dumps(last))
    card = push(folder, REPO, dry_run=True).plan.card
    for row in (
        "| validation loss | 0.25 | 0.28 (+12.0%) |",
        "| velocity, relative error |  | 3.45% |",
        "| attention output of a layer, relative error |  | mean 20.00%, worst 30.00% (layer 1) |",
        "| KV cache of one video, measured | 4 KiB | 512 B (-87.5%) |",
        "| video frames per second, without the VAE | 2 | 3.5 |",
        "| VBench imaging_quality | 0.6400 | 0.6100 |",
    ):
        assert row in card
    conditions, recipe, first, second = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", card, re.DOTALL))
    expected = {name: EVALUATION[name] for name in ("teacher", "data", "conditions", "versions")}
    assert conditions == expected | {"data": {"from": "somewhere", "clips": 7, "seeds": "40 values"}}
    assert recipe["kv_rank"] == 10
    assert first == {"stage": "distill", "steps": 300}
    assert second == last["recipe"]
    assert "teacher wan_tiny, the weights of step 250, with this recipe" in card
    assert "healed by training" in card
    assert "not been trained since" not in card
    assert "not been evaluated" not in card


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"models": "none"},
        {"models": [{"teacher_loss": 0.1, "student_loss": 0.2}] * 2},
        {"models": [{"teacher_loss": "low", "attention_errors": [None], "cache_bytes": 3, "velocity_error": True}]},
    ],
)
def test_records_of_another_shape_do_not_break_the_card(hub: Hub, folder: Path, evaluation: dict[str, Any]) -> None:
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    edit_json(folder / "conversion.json", recipe=None, source="unknown")
    card = push(folder, REPO, dry_run=True).plan.card
    assert "| validation loss" not in card
    assert "its recipe is not known" in card
    (folder / "conversion.json").unlink()
    push(folder, REPO)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json: it is not readable JSON"):
        push(folder, REPO)


def test_an_edited_card_is_kept_and_a_generated_one_renewed(hub: Hub, folder: Path) -> None:
    """Edited in the folder, edited on the Hub, and left as generated."""

    def repo() -> str:
        return hub.repos[REPO].files["README.md"].data.decode()

    first = push(folder, REPO).plan.card
    report = push(folder, REPO, license="mit", update=True)
    assert [file.path for file in report.plan.changes] == ["README.md"]
    assert repo() != first

    mine = repo().replace("## Known limits", "## Known limits\n\n- My own remark.")
    hub.repos[REPO].files["README.md"] = Blob(mine.encode(), False)
    edit_json(folder / "conversion.json", remark="to have something to commit")
    report = push(folder, REPO, license="apache-2.0", update=True)
    assert states(report)["README.md"] == "kept"
    assert "edited on the Hub" in " ".join(report.plan.notes)
    assert repo() == report.plan.card == mine

    (folder / "README.md").write_text("# My model\n")
    report = push(folder, REPO, update=True)
    assert [file.path for file in report.plan.changes] == ["README.md"]
    assert repo() == report.plan.card == "# My model\n"


def test_what_counts_as_generated(hub: Hub, folder: Path) -> None:
    stub = (folder / "README.md").read_text()
    card = push(folder, REPO, dry_run=True).plan.card
    for text in (stub, card):
        assert is_generated(text)
        for edited in (text + "more\n", "more\n" + text, text.replace("Attention", "attention"), text[:-3]):
            assert not is_generated(edited)
    assert not is_generated("")
    assert not is_generated("# My model\n")


@pytest.mark.parametrize("init", ["lossless", "random"])
def test_every_stub_of_convert_counts_as_generated(golden: Path, tmp_path: Path, init: Any) -> None:
    convert(golden, tmp_path / "out", ConvertRecipe(init=init, layers="0,2"))
    assert is_generated((tmp_path / "out" / "README.md").read_text())


STUB = """\
# my.model, with latent attention

Converted from my.model, transformer (wan t2v, native layout, 3 layers) by mlaconvert 0.0.9.dev3.

Self-attention in layers 0,2-3 is Multi-Head Latent Attention (init svd). A token caches 1,234 scalars instead of \
12,345 (-3.0% less). All other tensors are the source's. `conversion.json` records the recipe, the source's hash and \
each layer's spectrum and errors.

Healed by mlaconvert 0.1.0: stage distill, 300 steps of batch 8 a process, teacher Wan-AI/Wan2.1-T2V-1.3B; \
`healing.json` has the recipe and the curves, `healing.png` draws them. The weights are those of step 250.

Healed by mlaconvert 0.1.1: stage few-step-ode, 20 steps of batch 1 a process, teacher wan; \
`healing.json` has the recipe and the curves, `healing.png` draws them. The weights are those of step 0.
"""


def test_a_stub_of_an_earlier_version_counts_as_generated() -> None:
    """As it stands in folders that were written before; a word more or less is somebody's own."""
    assert is_generated(STUB)
    untrained = STUB.split("\n\nHealed", maxsplit=1)[0] + " The model has not been trained since.\n"
    assert is_generated(untrained)
    for old, new in (
        ("1,234 scalars", "only 1,234 scalars"),
        ("of 12,345 (", "of about 12,345 ("),
        ("300 steps", "300 good steps"),
        ("step 0.", "step 0. Enjoy!"),
        ("init svd", "init: svd"),
        ("my.model, with", "my\nmodel, with"),
        (" the curves", " curves"),
    ):
        assert old in STUB
        assert not is_generated(STUB.replace(old, new)), new


def test_what_heal_adds_to_the_stub_counts_as_generated(folder: Path, tmp_path: Path) -> None:
    from mlaconvert.healing import output
    from mlaconvert.healing.loop import Curves
    from mlaconvert.healing.recipe import HealRecipe

    report = output.HealReport(
        output=tmp_path / "healed",
        recipe=HealRecipe(stage="teacher-forcing"),
        teacher="Wan-AI/Wan2.1-T2V-1.3B",
        curves=Curves(),
        best=(250, 0.125),
        occupancy={},
    )
    for _ in range(2):
        (folder / "README.md").write_text(output._readme(folder, report))
        assert is_generated((folder / "README.md").read_text())
    assert (folder / "README.md").read_text().count("Healed by") == 2
    assert names.HEALING_NAME == HEALING_NAME


@pytest.mark.parametrize(("few_step", "sampler"), [(False, "many_step(20)"), (True, "few_step()")])
def test_the_snippet_samples_as_the_model_was_trained(hub: Hub, folder: Path, few_step: bool, sampler: str) -> None:
    edit_json(folder / CONFIG_NAME, streaming={}, few_step=few_step)
    assert f"Sampler.{sampler}" in push(folder, REPO, dry_run=True).plan.card


def image_to_video(save_folder: SaveFolder) -> Path:
    """A converted image-to-video model with a CLIP branch and three latent channels."""
    config = WanConfig(
        dim=36, num_heads=3, num_layers=2, ffn_dim=20, freq_dim=14, text_dim=18, in_dim=7, out_dim=3, image_dim=10
    )
    model = WanModel(config)
    randomize(model)
    raw = {"_class_name": "WanModel", "model_type": "i2v", "num_heads": 3}
    source = save_folder(model.state_dict(), raw, "i2v")
    convert(source, source.with_name("i2v-mla"), ConvertRecipe(init="svd"))
    return source.with_name("i2v-mla")


@pytest.mark.parametrize("kind", ["streaming", "bidirectional", "image"])
def test_the_usage_snippets_run_as_printed(
    hub: Hub, folder: Path, tmp_path: Path, save_folder: SaveFolder, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "streaming":
        folder = tmp_path / "tiny-mla"
        convert("tiny", folder, ConvertRecipe(init="svd"))
    elif kind == "image":
        folder = image_to_video(save_folder)
    card = push(folder, REPO).plan.card
    assert f"pipeline_tag: {'image' if kind == 'image' else 'text'}-to-video" in card
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(python, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    shape = {"streaming": [1, 3, 3, 24, 32], "bidirectional": [1, 16, 3, 60, 104], "image": [1, 3, 3, 24, 32]}[kind]
    assert printed == [f"torch.Size({shape})"] * (2 if kind == "streaming" else 1)
    (bash,) = re.findall(r"```bash\nmlaconvert (.*?)\n```", card, re.DOTALL)
    result = invoke(*bash.split())
    assert result.exit_code == 0, result.stderr


# --- from the Hub's side -----------------------------------------------------------------------------------------


def test_what_was_pushed_loads_from_the_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, REPO)
    with open_checkpoint(REPO) as found, open_checkpoint(folder) as local:
        assert found.config == local.config
        assert found.raw_config == local.raw_config
        assert "hf/hub" in found.store.path.as_posix()
    ours, theirs = load_file(folder / WEIGHTS_NAME), load_model(REPO, revision=hub.repos[REPO].head).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(CheckpointError, match="log in with `hf auth login`"):
        open_checkpoint(REPO)


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
    excess = 100 * (local["student_loss"] / local["teacher_loss"] - 1)
    row = f"| validation loss | {local['teacher_loss']:.4g} | {local['student_loss']:.4g} ({excess:+.1f}%) |"
    assert row in report.plan.card
    assert f"velocity, relative error |  | {100 * local['velocity_error']:.2f}% |" in report.plan.card
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


# --- the command line --------------------------------------------------------------------------------------------


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
