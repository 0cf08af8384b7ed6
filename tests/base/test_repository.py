"""Text encoder and VAE of a base repository: found, read in both layouts, and equal to diffusers' own use of them."""

from __future__ import annotations

import gc
import json
import shutil
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
import wan_base
from safetensors.torch import load_file
from support import relative
from torch import Tensor

from mlaconvert.base.repository import NATIVE_TEXT, NATIVE_TOKENIZER, NATIVE_VAE, find_base, open_base
from mlaconvert.base.text import clean, embed_texts
from mlaconvert.base.vae import Vae
from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.source import Source

WAN22 = {
    "z_dim": 48,
    "is_residual": True,
    "base_dim": 4,
    "decoder_base_dim": 6,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * i for i in range(48)],
    "latents_std": [0.5 + 0.02 * i for i in range(48)],
}
TEXTS = ["a cat   and dog", "", "red &amp;amp; blue\n at night", "walks slowly in the snow " * 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_base.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def native(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in Wan's own files."""
    path = tmp_path_factory.mktemp("native")
    shutil.copytree(folder / "tokenizer", path / NATIVE_TOKENIZER)
    text = wan_base.native_text(load_file(folder / "text_encoder" / "model.safetensors"))
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, path / NATIVE_TEXT)
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(wan_base.native_vae(vae), path / NATIVE_VAE)
    return path


# --- text ------------------------------------------------------------------------------------------------------------


def pipeline_embeddings(folder: Path, texts: list[str], length: int) -> Tensor:
    """What diffusers' pipeline makes of them in bfloat16, as [N, length, D] float32 with zeros at the end."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16).requires_grad_(False)
    pipe: Any = types.SimpleNamespace(
        text_encoder=encoder, tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), _execution_device="cpu"
    )
    return WanPipeline._get_t5_prompt_embeds(pipe, texts, max_sequence_length=length).float()


@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_embeddings_are_the_pipelines(folder: Path, native: Path, layout: str) -> None:
    base = open_base(str(folder if layout == "diffusers" else native))
    assert base.is_native == (layout == "native")
    found = list(embed_texts(base, TEXTS, max_tokens=12))
    expected = pipeline_embeddings(folder, TEXTS, 12)
    assert [len(text) for text in found] == [5, 1, 6, 12]  # the last is cut off
    for text, row in zip(found, expected, strict=True):
        assert text.dtype == torch.bfloat16
        assert relative(text.float(), row[: len(text)]) < 0.02  # bfloat16 without padding; another prompt's differ by 1
        assert not row[len(text) :].any()
    assert relative(found[0][:1].float(), expected[2, :1]) > 0.3


def test_cleaning_is_the_pipelines() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in (*TEXTS, "  café — â€œquotedâ€\x9d\t x ", "&lt;b&gt;"):
        assert clean(text) == prompt_clean(text)


def test_the_encoder_is_gone_after_its_last_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlaconvert.base import text

    alive: list[Any] = []
    load = text._load_encoder
    monkeypatch.setattr(text, "_load_encoder", lambda *a: alive.append(weakref.ref(found := load(*a))) or found)
    texts = embed_texts(open_base(str(folder)), ["a cat", "a dog"])
    assert not alive  # nothing is loaded before it is needed
    assert len(list(texts)) == 2
    assert [reference() for reference in alive] == [None]
    assert list(embed_texts(open_base(str(folder)), [])) == []
    assert len(alive) == 1


# --- the VAE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, WAN22], ids=["wan2.1", "wan2.2"])
def test_streaming_is_the_whole(config: dict[str, Any]) -> None:
    """Frame by frame against diffusers' own decode and encode, which hold everything."""
    model = wan_base.make_vae(**config)
    vae = Vae(model)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    z = torch.randn(vae.channels, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    expected = model.decode((z * std + mean)[None]).sample[0]
    found = torch.stack(list(vae.decode(z.unbind(1))), 1)
    assert found.shape == (3, 13, 3 * vae.stride, 5 * vae.stride)
    assert float((found - expected).abs().max()) < 1e-5
    pixels = torch.rand(3, 11, 3 * vae.stride, 5 * vae.stride, generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = (model.encode(pixels[None, :, :9]).latent_dist.mode()[0] - mean) / std
    found = vae.encode(iter(pixels.unbind(1)))  # two frames do not fill another latent one
    assert found.shape == (vae.channels, 3, 3, 5)
    assert float((found - expected).abs().max()) < 1e-5


def test_interleaved_videos_do_not_mix() -> None:
    vae = Vae(wan_base.make_vae())
    z = torch.randn(2, 16, 3, 2, 3, generator=torch.Generator().manual_seed(5))
    whole = [torch.stack(list(vae.decode(video.unbind(1)))) for video in z]
    both = list(zip(*(vae.decode(video.unbind(1)) for video in z), strict=True))
    for i in range(2):
        assert torch.equal(torch.stack([pair[i] for pair in both]), whole[i])


def test_what_is_held_does_not_depend_on_the_length() -> None:
    """Latents are read and frames let go one by one."""
    vae = Vae(wan_base.make_vae())

    def most_held(length: int) -> tuple[int, int]:
        read, frames, most, ahead = 0, 0, 0, 0
        alive: weakref.WeakSet[Any] = weakref.WeakSet()

        def latents() -> Iterator[Tensor]:
            nonlocal read
            for _ in range(length):
                read += 1
                yield torch.zeros(16, 2, 2)

        for frame in vae.decode(latents()):
            frames += 1
            alive.add(frame.untyped_storage())
            most, ahead = max(most, len(alive)), max(ahead, 1 + 4 * (read - 1) - frames)
        assert frames == 1 + 4 * (length - 1)
        return most, ahead

    before = len(gc.get_objects())
    assert most_held(3) == most_held(24)
    assert most_held(24)[1] < 4
    assert len(gc.get_objects()) - before < 1000


def test_the_native_vae_is_the_same(folder: Path, native: Path) -> None:
    ours, theirs = (Vae.load(open_base(str(path))) for path in (native, folder))
    state = theirs.model.state_dict()
    assert ours.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())
    assert torch.equal(ours._std, theirs._std)


# --- finding ---------------------------------------------------------------------------------------------------------


def record(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "conversion.json").write_text(json.dumps({"source": {"name": name}}))
    return folder


def test_the_base_is_found_where_the_model_came_from(folder: Path, native: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(folder, tmp_path / "Wan-Diffusers"))
    (repo / "transformer").mkdir()
    (repo / "transformer" / "model.safetensors").touch()
    for model in (repo, repo / "transformer", repo / "transformer" / "model.safetensors"):
        assert Path(find_base(model).source) == repo
    mla = record(tmp_path / "mla", "Wan-Diffusers")  # beside its source
    assert Path(find_base(mla).source) == repo
    assert find_base(record(tmp_path / "far" / "mla", str(native))).source == str(native)
    record(tmp_path / "pair" / "transformer", "Wan-Diffusers")
    assert Path(find_base(Source(tmp_path / "pair", subfolder="transformer")).source) == repo
    with pytest.raises(InputError, match="its text encoder and VAE are not known"):
        find_base(record(tmp_path / "other" / "mla", "Wan-Diffusers"))


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no text encoder and VAE .*name its base repository with --base"):
        open_base(str(tmp_path))
    (tmp_path / "Wan2.2_VAE.pth").touch()
    with pytest.raises(CheckpointError, match=r"Wan2\.2_VAE\.pth is not read; .*Wan2\.2-TI2V-5B-Diffusers"):
        open_base(str(tmp_path))
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        open_base(str(tmp_path / "none"))
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    shutil.rmtree(half / "tokenizer")
    with pytest.raises(CheckpointError, match="half has no tokenizer"):
        list(embed_texts(open_base(str(half)), ["a"]))


def test_damaged_files_are_named(folder: Path, native: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    for part, name in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        path = bad / part / name
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"bad/vae: not a Wan VAE that can be loaded"):
        Vae.load(open_base(str(bad)))
    with pytest.raises(CheckpointError, match=r"bad/text_encoder: not a umT5 text encoder"):
        list(embed_texts(open_base(str(bad)), ["a"]))
    (bad / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad/tokenizer: not a tokenizer"):
        list(embed_texts(open_base(str(bad)), ["a"]))
    wrong = Path(shutil.copytree(native, tmp_path / "wrong"))
    torch.save({"x": torch.zeros(1)}, wrong / NATIVE_VAE)
    torch.save({"x": torch.zeros(1)}, wrong / NATIVE_TEXT)
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth: no tensor 'encoder\.conv1\.weight'"):
        Vae.load(open_base(str(wrong)))
    with pytest.raises(CheckpointError, match="no tensor 'token_embedding"):
        list(embed_texts(open_base(str(wrong)), ["a"]))


def test_pickles_of_a_diffusers_layout_are_not_read(folder: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    weights = bad / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="bad/vae: not a Wan VAE"):
        Vae.load(open_base(str(bad)))


def test_packages_that_are_missing_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    base = open_base(str(folder))
    with pytest.raises(InputError, match=r"need transformers, ftfy: pip install 'mlaconvert\[wan\]'"):
        next(embed_texts(base, ["a"]))
    with pytest.raises(InputError, match=r"need diffusers: pip install"):
        Vae.load(base)


def test_a_hub_repo_is_fetched_part_by_part(hub: hub_server.Hub, folder: Path, tmp_path: Path) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files |= {"transformer/diffusion_pytorch_model.safetensors": b"huge", "vae/old.bin": b"pickle"}
    blobs = {name: hub_server.Blob(data, name.endswith(".safetensors")) for name, data in files.items()}
    hub.repos["alice/wan"] = hub_server.Repo(private=False)
    hub.repos["alice/wan"].commit(blobs)
    base = find_base(record(tmp_path / "mla", "alice/wan"))
    assert Vae.load(base).channels == 16
    cached = {p.name for p in (tmp_path / "hf" / "hub").rglob("*") if p.is_symlink()}
    assert cached == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert len(list(embed_texts(base, ["a cat"]))) == 1
    hub.repos["alice/wan-mla"] = hub_server.Repo(private=False)
    named = (tmp_path / "mla" / "conversion.json").read_bytes()
    hub.repos["alice/wan-mla"].commit({"conversion.json": hub_server.Blob(named, False)})
    assert find_base("alice/wan-mla") == base  # a published model leads there too
    hub.repos["alice/wan"].commit({"vae/config.json": hub_server.Blob(b"{}", False)})
    source = {"name": "alice/wan", "revision": hub.repos["alice/wan"].commits[0][0]}
    (tmp_path / "mla" / "conversion.json").write_text(json.dumps({"source": source}))
    assert Vae.load(find_base(tmp_path / "mla")).channels == 16  # of the recorded commit
    source["revision"] = "0" * 40
    (tmp_path / "mla" / "conversion.json").write_text(json.dumps({"source": source}))
    assert find_base(tmp_path / "mla").names == ("vae/config.json",)  # or of the newest
    hub.repos["alice/other"] = hub_server.Repo(private=False)
    hub.repos["alice/other"].commit({"model.safetensors": hub_server.Blob(b"", True)})
    with pytest.raises(InputError, match="alice/other: its text encoder and VAE are not known; name its base"):
        find_base("alice/other")
    assert not list((tmp_path / "hf" / "hub").rglob("old.bin"))
    assert not list((tmp_path / "hf" / "hub").rglob("transformer"))
