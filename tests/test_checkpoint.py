"""Reading checkpoints: files, folders, shards, pickles, the Hub; and every way in which they can be bad."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import pickle
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from mlaconvert.errors import CheckpointError
from mlaconvert.files import select
from mlaconvert.files.find import experts, open_store
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.files.store import check_finite

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
INDEX = f"{WEIGHTS_NAME}.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def save_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, name in zip(SHARDS, STATE, strict=True):
        save_file({name: STATE[name]}, folder / shard)
    mapping = weight_map if weight_map is not None else dict(zip(STATE, SHARDS, strict=True))
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    return folder


def read_all(source: str | Path, **options: Any) -> dict[str, torch.Tensor]:
    with open_store(source, **options) as store:
        found = {name: store.read(name).clone() for name in store.tensors}
        for name, info in store.tensors.items():
            assert (info.name, info.shape, info.dtype) == (name, tuple(found[name].shape), found[name].dtype)
            assert info.nbytes == found[name].nbytes
    return found


def assert_state(found: dict[str, torch.Tensor], prefix: str = "") -> None:
    assert set(found) == {prefix + name for name in STATE}
    for name, tensor in STATE.items():
        assert torch.equal(found[prefix + name], tensor)


# --- what can be read --------------------------------------------------------------------------------------------


def test_single_file_and_its_config(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "odd name.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 7}')
    assert_state(read_all(tmp_path / "odd name.safetensors"))
    with open_store(str(tmp_path)) as store:
        assert store.config == {"dim": 7}
        assert store.source == str(tmp_path)
        assert store.files == (tmp_path / "odd name.safetensors",) == (store.path,)
        kept = store.read("a.weight")
    assert torch.equal(kept, STATE["a.weight"])  # a tensor outlives its store


def test_shards(tmp_path: Path) -> None:
    assert_state(read_all(save_shards(tmp_path)))
    with open_store(tmp_path) as store:
        assert [file.name for file in store.files] == SHARDS
        assert store.path == tmp_path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_flattened(tmp_path: Path, suffix: str, zipped: bool) -> None:
    nested = {
        "generator": OrderedDict(STATE),
        "deep": {"er": {"a": STATE["b"]}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 1e-4},
        "step": 3,
        "bare": torch.nn.Parameter(torch.ones(1)),
    }
    torch.save(nested, tmp_path / f"model{suffix}", _use_new_zipfile_serialization=zipped)
    found = read_all(tmp_path)
    assert sorted(found) == ["bare", "deep/er/a", "generator/a.weight", "generator/b"]
    assert torch.equal(found["generator/a.weight"], STATE["a.weight"])
    assert not found["bare"].requires_grad


def test_diffusers_repo_reads_its_transformer(tmp_path: Path) -> None:
    save_shards(tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 1}')
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "vae" / WEIGHTS_NAME)
    assert_state(read_all(tmp_path))
    with open_store(tmp_path) as store:
        assert store.config == {"num_layers": 1}
    assert set(read_all(tmp_path, subfolder="vae")) == {"x"}


def test_native_repo_prefers_the_transformer_to_the_pickles_beside_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / WEIGHTS_NAME)
    save_file({"x": torch.ones(1)}, tmp_path / "golden.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    assert_state(read_all(tmp_path))


@pytest.mark.parametrize("pair", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_experts(tmp_path: Path, pair: tuple[str, str]) -> None:
    for folder in pair:
        save_shards(tmp_path / folder)
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    assert experts(tmp_path) == experts(str(tmp_path)) == pair
    assert experts(tmp_path / pair[0]) == ()
    with pytest.raises(CheckpointError, match=f"two experts; give --subfolder {pair[0]} or --subfolder {pair[1]}"):
        open_store(tmp_path)
    with pytest.raises(CheckpointError, match=f"no folder 'medium'; it has {pair[0]} and {pair[1]}"):
        open_store(tmp_path, subfolder="medium")
    assert_state(read_all(tmp_path, subfolder=pair[1]))


def test_tiny_is_built_in_but_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards(tmp_path / "shipped")
    monkeypatch.setattr(select, "TINY", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert_state(read_all("tiny"))
    save_file({"mine": torch.ones(1)}, tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"tiny: not a weight file"):
        open_store("tiny")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_maps_rather_than_copies(tmp_path: Path) -> None:
    def anonymous_kb() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    state = {f"w{i}": torch.full((4, 1 << 20), float(i)) for i in range(2)}  # 16 MiB each
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    del state
    for name in ("m.safetensors", "m.pt"):
        before = anonymous_kb()
        with open_store(tmp_path / name) as store:
            tensors = [store.read(f"w{i}") for i in range(2)]
            assert [float(t[3, 5]) for t in tensors] == [0.0, 1.0]
            assert anonymous_kb() - before < 8 * 1024


def test_sha256_covers_names_and_contents(tmp_path: Path) -> None:
    folders = [save_shards(tmp_path / name) for name in ("one", "two", "three", "four")]
    data = (folders[2] / SHARDS[1]).read_bytes()
    (folders[2] / SHARDS[1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    swapped = {"a.weight": SHARDS[1], "b": SHARDS[0]}
    save_shards(folders[3], swapped)
    first, second = ((folders[3] / shard).read_bytes() for shard in SHARDS)
    (folders[3] / SHARDS[0]).write_bytes(second)
    (folders[3] / SHARDS[1]).write_bytes(first)
    sums, told = [], []
    for folder in folders:
        with open_store(folder) as store:
            sums.append(store.sha256(lambda *of: told.append(of[:3])))
            size = sum(file.stat().st_size for file in store.files)
            assert told[-1] == ("hash", size, size)
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3
    data = (folders[0] / SHARDS[0]).read_bytes()
    for name in ("x.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(data)
        with open_store(tmp_path / name) as store:
            sums.append(store.sha256())
    assert len(set(sums)) == 5
    assert len(sums[0]) == hashlib.sha256().digest_size * 2


def test_tensors_are_met_while_their_file_is_hashed(tmp_path: Path) -> None:
    state = {
        "wide": torch.randn(3, 131_075, generator=torch.Generator().manual_seed(0)),  # more than one piece
        "half": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "empty": torch.zeros(0, 4),
        "left": torch.arange(11),
    }
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    longhand = hashlib.sha256(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes()).hexdigest()
    met: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def visit(name: str) -> Iterator[Callable[[torch.Tensor], None] | None]:
        met[name] = []
        yield None if name == "left" else lambda part: met[name].append(part.clone())

    with open_store(file) as store:
        assert store.sha256() == store.sha256(visit=visit) == longhand
    assert met.pop("left") == []
    assert set(met) == {"wide", "half", "empty"}
    assert len(met["wide"]) == 2
    for name, parts in met.items():
        found = torch.cat(parts) if parts else state[name].flatten()
        assert torch.equal(found, state[name].flatten())
        assert found.dtype == state[name].dtype


def test_a_file_that_becomes_shorter_while_it_is_hashed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"wide": torch.zeros(3, 1 << 20)}, file)
    with open_store(file) as store, pytest.raises(CheckpointError, match="has become shorter while it was read"):
        store.sha256(lambda *_: os.truncate(file, 1_500_000))


def test_check_finite(tmp_path: Path) -> None:
    check_finite(STATE["b"], "b", "f")
    check_finite(torch.tensor([3]), "count", "f")
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
        tensor[2, 1] = bad
        with pytest.raises(CheckpointError, match=r"model\.pt: tensor 'b\.weight' holds NaN or infinite"):
            check_finite(tensor, "b.weight", Path("model.pt"))


# --- what is refused ---------------------------------------------------------------------------------------------


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "zero length": (b"", "truncated"),
    "seven bytes": (b"\x01" * 7, "truncated"),
    "header longer than the file": (safetensors_bytes({}, length=1 << 60), "truncated"),
    "data cut off": (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 7), "promises 8 bytes of data, the file has 7"),
    "data to spare": (safetensors_bytes({"a": entry(0, 8)}, b"\0" * 9), "promises 8"),
    "not JSON": (safetensors_bytes(b"{nonsense"), "header cannot be read"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "header cannot be read"),
    "nested beyond reason": (safetensors_bytes(b"[" * 100_000), "header cannot be read"),
    "a list": (safetensors_bytes([1]), "not a JSON object"),
    "no tensors": (safetensors_bytes({"__metadata__": {}}), "no tensors"),
    "the same name twice": (
        safetensors_bytes(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": 2}', b"\0"),
        "'a' is in it twice",
    ),
    "overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "'b' overlaps"),
    "gap": (safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "'b' overlaps .* or leaves a gap"),
    "shape that lies": (safetensors_bytes({"a": entry(0, 8, [3])}, b"\0" * 8), r"'a' of shape \[3\] .* 12 bytes"),
    "negative size": (safetensors_bytes({"a": entry(0, 8, [-2])}, b"\0" * 8), "'a' has a malformed"),
    "boolean size": (safetensors_bytes({"a": entry(0, 4, [True])}, b"\0" * 4), "'a' has a malformed"),
    "offsets reversed": (safetensors_bytes({"a": entry(8, 0, [2])}, b"\0" * 8), "gives it -8"),
    "entry of text": (safetensors_bytes({"a": "b"}), "'a' has a malformed"),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 8, dtype="F6_E2M3")}, b"\0" * 8), "'a' has dtype 'F6_E2M3'"),
    "dtype of a wrong type": (safetensors_bytes({"a": entry(0, 8, dtype=["F32"])}, b"\0" * 8), "'a' has dtype"),
    "empty name": (safetensors_bytes({"": entry(0, 8)}, b"\0" * 8), "named ''"),
    "control character": (safetensors_bytes({"a\n": entry(0, 8)}, b"\0" * 8), "printable"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": {}}'), "printable"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", "truncated or not safetensors"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path: Path, case: str) -> None:
    data, message = BAD_SAFETENSORS[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    for zipped in (True, False):
        state = {"generator": STATE, "args": RunsCode(tmp_path / "owned")}
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"m\.pt: it pickles more than tensors") as caught:
            open_store(tmp_path / "m.pt")
        assert "weights_only" not in str(caught.value)  # torch's own advice is to run it
    (tmp_path / "m.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_store(tmp_path / "m.pt")
    assert not (tmp_path / "owned").exists()


def test_bad_pickles(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {}
    cyclic["again"] = cyclic
    cases = {
        "no tensors": ({"step": 1, "names": ["a"]}, "no tensors"),
        "a bare list": ([torch.ones(1)], "no tensors"),
        "cyclic": (cyclic, "nested too deeply"),
        "sparse": ({"w": torch.eye(3).to_sparse()}, "'w' is not a plain dense"),
        "ambiguous": ({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, "two tensors are named 'a/b'"),
        "odd name": ({"a\0": torch.ones(1)}, "printable"),
    }
    for case, (content, message) in cases.items():
        file = tmp_path / f"{case}.pt"
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_store(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 500, -1, -200])
def test_truncated_and_foreign_pickles(tmp_path: Path, keep: int) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for content in (data[:keep], b"PK\x03\x04" + data[4:keep], b"\x80\x02." + bytes(50), b"<html>no</html>"):
        (tmp_path / "m.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.pt: "):
            open_store(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "../evil.safetensors", "b": SHARDS[1]}, "'a.weight' points to '../evil.safetensors'"),
        ({"a.weight": "/etc/evil.safetensors"}, "not a .safetensors file beside it"),
        ({"a.weight": "c:\\evil.safetensors"}, "not a .safetensors file beside it"),
        ({"a.weight": 3}, "points to 3"),
        ({"a.weight": "evil.pt"}, "points to 'evil.pt'"),
        ({"a.weight": SHARDS[0], "b": "gone.safetensors"}, "gone.safetensors: there is no such file"),
        ({"a.weight": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "lists 'c', against its shards"),
        ({"a.weight": SHARDS[0], "c": SHARDS[1]}, "against its shards"),
        ({}, "no weight_map"),
    ],
)
def test_bad_indexes(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "evil.safetensors")
    folder = save_shards(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_store(folder)
    assert str(folder) in str(caught.value)


def test_a_tensor_that_the_index_leaves_out(tmp_path: Path) -> None:
    folder = save_shards(tmp_path, {"a.weight": SHARDS[0]})
    save_file(STATE, folder / SHARDS[0])
    with pytest.raises(CheckpointError, match="it leaves out 'b', against its shards"):
        open_store(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_shards(tmp_path)
    save_file(STATE, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]}: tensor 'a.weight' is in {SHARDS[0]} too"):
        open_store(tmp_path)


def test_bad_folders_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_shards(tmp_path / "shards")
    (tmp_path / "shards" / INDEX).unlink()
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(STATE, tmp_path / "two" / name)
    (tmp_path / "broken").mkdir()
    save_file(STATE, tmp_path / "broken" / WEIGHTS_NAME)
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "notes.txt").write_text("hello")
    cases: list[tuple[str | Path, dict[str, str], str]] = [
        ("empty", {}, "empty: it holds no weights"),
        ("shards", {}, r"no \*.safetensors.index.json"),
        (f"shards/{SHARDS[0]}", {}, "one shard of several; give its folder shards"),
        ("two", {}, r"several weight files \(a.safetensors, b.safetensors\)"),
        ("broken", {}, r"broken.config\.json: it is not readable JSON"),
        ("notes.txt", {}, r"notes\.txt: not a weight file"),
        ("gone.safetensors", {}, r"gone\.safetensors: there is no such file"),
        ("folder/gone.pt", {}, r"folder/gone\.pt: there is no such file"),
        (tmp_path / "user" / "repo", {}, "there is no such file"),
        (Path("user/repo"), {}, "there is no such file"),
        ("x" * 5000, {}, "is not a path|no such file"),
        ("nul\0", {}, "is not a path|no such file"),
        ("two", {"subfolder": "../broken"}, "leads outside"),
        ("two", {"subfolder": "gone"}, "two: it has no folder 'gone'"),
        ("notes.txt", {"subfolder": "gone"}, "a file has no subfolder"),
        ("two", {"revision": "main"}, "no revision 'main'"),
    ]
    for source, options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            open_store(source, **options)


def test_unknown_tensor(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / WEIGHTS_NAME)
    with open_store(tmp_path) as store, pytest.raises(CheckpointError, match="no tensor 'c'"):
        store.read("c")


# --- the Hub, with the real client against a server on this machine ------------------------------------------------


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
        ("user/lfs", {}, f"{WEIGHTS_NAME}: truncated or not safetensors"),
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
