"""Reading checkpoints: files, folders, shards, pickles, the Hub; and every way in which they can be bad."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_cases import INDEX, SHARDS, STATE, assert_state, read_all, save_shards

from mlaconvert.errors import CheckpointError
from mlaconvert.files.find import experts, open_store
from mlaconvert.files.names import WEIGHTS_NAME


class Hub:
    """A few repos in memory, the requests that were made, and the client that talks to them."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.sha = "5" * 40

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        parts = handler.path.lstrip("/").split("?")[0].split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        revision = "/".join(parts[5:]) if api else parts[3]
        files = self.repos.get(repo)
        if files is None:
            return self._send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", self.sha):
            return self._send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api:
            siblings = [{"rfilename": name} for name in files]
            body = {"_id": "1", "id": repo, "sha": self.sha, "siblings": siblings, "private": False}
            return self._send(handler, 200, json.dumps(body).encode(), {})
        if repo in self.gated:
            return self._send(handler, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        name = "/".join(parts[4:])
        data = files[name]
        if handler.command == "GET":
            self.fetched.append(name)
        etag = hashlib.sha256(data).hexdigest()
        return self._send(handler, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha})

    def _send(self, handler: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def do_HEAD(self) -> None:
            served.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    client = functools.partial(
        huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_address[1]}", token=False
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", client)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_hub_fetches_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    save_shards(tmp_path / "repo" / "transformer")
    (tmp_path / "repo" / "transformer" / "config.json").write_text('{"num_layers": 4}')
    extra = {"model_index.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"x", "README.md": b"#"}
    hub.repos["user/wan"] = folder_bytes(tmp_path / "repo") | extra
    assert_state(read_all("user/wan"))
    assert sorted(hub.fetched) == sorted(f"transformer/{name}" for name in ("config.json", INDEX, *SHARDS))
    with open_store("user/wan", revision="main", subfolder="transformer") as store:
        assert store.source == "user/wan"
        assert store.config == {"num_layers": 4}
    with open_store("user/wan/transformer", revision=hub.sha):
        assert len(hub.fetched) == 4  # all of it from the cache


def test_hub_file_inside_a_repo(hub: Hub, tmp_path: Path) -> None:
    torch.save({"generator_ema": STATE}, tmp_path / "m.pt")
    hub.repos["user/forcing"] = {"checkpoints/m.pt": (tmp_path / "m.pt").read_bytes(), "checkpoints/n.pt": b""}
    assert_state(read_all("user/forcing/checkpoints/m.pt"), "generator_ema/")
    with pytest.raises(
        CheckpointError, match=r"user/forcing/checkpoints: it holds several weight files \(m.pt, n.pt\)"
    ):
        open_store("user/forcing/checkpoints")
    with pytest.raises(CheckpointError, match="user/forcing on the Hub has no file or folder 'nowhere'"):
        open_store("user/forcing/nowhere")


def test_hub_experts(hub: Hub, tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        save_shards(tmp_path / "repo" / name)
    hub.repos["user/a14b"] = folder_bytes(tmp_path / "repo")
    assert experts("user/a14b") == ("high_noise_model", "low_noise_model")
    assert experts("user/a14b/low_noise_model") == ()
    with pytest.raises(CheckpointError, match="two experts; give --subfolder high_noise_model"):
        open_store("user/a14b")
    assert_state(read_all("user/a14b", subfolder="low_noise_model"))
    assert all(name.startswith("low_noise_model/") for name in hub.fetched)


def test_hub_errors_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.repos["user/gated"] = {WEIGHTS_NAME: b"x"}
    hub.gated.add("user/gated")
    hub.repos["user/lfs"] = {WEIGHTS_NAME: b"version https://git-lfs.github.com/spec/v1\n"}
    cases: list[tuple[str, dict[str, str], str]] = [
        ("user/nobody", {}, "user/nobody: no such path here and no such model on the Hub; .*hf auth login"),
        ("user/lfs", {"revision": "v9"}, "user/lfs on the Hub has no revision 'v9'; check --revision"),
        ("user/gated", {}, "user/gated is gated: accept its terms"),
        ("user/lfs", {}, f"{WEIGHTS_NAME}: a Git LFS pointer"),
        ("user/--bad..name", {}, "neither a path here nor a Hub id"),
    ]
    for source, options, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_store(source, **options)
        assert len(str(caught.value).splitlines()) == 1


def test_offline_reads_the_cache_or_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards(tmp_path / "repo")
    hub.repos["user/wan"] = folder_bytes(tmp_path / "repo")
    assert_state(read_all("user/wan"))
    dead = functools.partial(huggingface_hub.HfApi.func, endpoint="http://127.0.0.1:9", token=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(huggingface_hub, "HfApi", dead)
    assert_state(read_all("user/wan"))
    with pytest.raises(CheckpointError, match=r"user/other: no such path here, and it cannot be fetched .*network"):
        open_store("user/other")
