"""Videos and captions to clips: real files in, shards out that the other commands read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_base
from encode_cases import SMALL, decoded, invoke, movie, scramble
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.base.repository import open_base
from mlaconvert.base.text import embed_texts
from mlaconvert.base.vae import Vae
from mlaconvert.clips import encode as encoding
from mlaconvert.clips.encode import Encoding, encode
from mlaconvert.clips.folder import ClipFolder, load_clips, load_null_context
from mlaconvert.clips.footage import Footage
from mlaconvert.clips.videos import find_videos
from mlaconvert.config.geometry import WanConfig
from mlaconvert.errors import InputError, OutputError
from mlaconvert.listener import Listener

CONFIG = WanConfig(dim=24, num_heads=2, num_layers=1, ffn_dim=8, text_dim=wan_base.TEXT_DIM)


def flags(base: Path) -> tuple[object, ...]:
    return ("--base", base, "--height", 32, "--width", 48, "--frames", 3)


def test_shards_hold_what_the_components_make(folder: Path, base: Path, tmp_path: Path) -> None:
    """Against the whole video through diffusers' own encode, and the encoder's embedding."""
    report = encode(find_videos([folder]), tmp_path / "out", open_base(str(base)), SMALL)
    assert (report.videos, report.made, report.kept, report.skipped) == (3, 3, 0, ())
    clips = ClipFolder(tmp_path / "out", CONFIG)
    assert (len(clips), clips.clip_shape) == (3, (16, 3, 4, 6))
    vae = Vae.load(open_base(str(base)))
    for shard in clips.shards:
        with safe_open(shard, framework="pt") as file:
            header = json.loads(file.metadata()["clip"])
            latents, context = file.get_tensor("latents"), file.get_tensor("context")
        pixels = torch.stack(decoded(folder / header["file"])[:9], 1)
        expected = (vae.model.encode(pixels[None]).latent_dist.mode()[0] - vae._mean) / vae._std
        assert relative(latents[0], expected) < 1e-5
        (text,) = embed_texts(open_base(str(base)), [header["caption"]])
        assert (context.dtype, context.shape) == (torch.bfloat16, (1, 512, wan_base.TEXT_DIM))
        assert torch.equal(context[0, : len(text)], text)
        assert not context[0, len(text) :].any()
        assert header["caption"] == (folder / header["file"]).with_suffix(".txt").read_text().strip()
    empty = load_null_context(tmp_path / "out", CONFIG)
    (text,) = embed_texts(open_base(str(base)), [""])
    assert empty is not None
    assert torch.equal(empty[0, : len(text)], text.float())
    assert shard.stat().st_mode == (tmp_path / "out" / "encoding.json").stat().st_mode
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}


def test_several_clips_follow_each_other(folder: Path, base: Path, tmp_path: Path) -> None:
    wanted = Encoding(height=32, width=48, frames=3, clips=2)
    report = encode(find_videos([folder]), tmp_path / "out", open_base(str(base)), wanted)
    assert report.made == 2 + 1 + 2  # the second video has one, of the others none is left over
    vae = Vae.load(open_base(str(base)))
    second = vae.encode(decoded(folder / "a.mp4")[9:18])
    (path,) = (tmp_path / "out").glob("a-*-0001.safetensors")
    assert relative(load_file(path)["latents"][0], second) < 1e-5
    more = Encoding(height=32, width=48, frames=3, clips=5)
    report = encode(find_videos([folder]), tmp_path / "out", open_base(str(base)), more)
    assert (report.made, report.kept) == (1, 5)  # the first video's third
    assert len(load_clips(tmp_path / "out", CONFIG, 9).latents) == 6


def test_what_is_there_is_kept(folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (tmp_path / "out", open_base(str(base)), SMALL)
    encode(find_videos([folder]), *arguments)
    with monkeypatch.context() as patched:
        patched.setattr(Vae, "load", lambda *_: pytest.fail("nothing is left to do"))
        report = encode(find_videos([folder]), *arguments)
        assert (report.made, report.kept) == (0, 3)
    # A caption or a video that changed is made again, and nothing else.
    (folder / "a.txt").write_text("the sea")
    movie(folder / "deep" / "a.mp4", 12, seed=9)
    report = encode(find_videos([folder]), *arguments)
    assert (report.made, report.kept) == (2, 1)
    (path,) = (tmp_path / "out").glob("a-*")
    (text,) = embed_texts(open_base(str(base)), ["the sea"])
    assert torch.equal(load_file(path)["context"][0, : len(text)], text)
    # So is a shard that is torn, or not ours.
    path.write_bytes(path.read_bytes()[:50])
    (other,) = (tmp_path / "out").glob("deep-a-*")
    save_file({"latents": torch.zeros(1)}, other, {"clip": "[1"})
    assert encode(find_videos([folder]), *arguments).made == 2
    assert len(ClipFolder(tmp_path / "out", CONFIG)) == 3


def test_an_interrupted_run_goes_on(folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, arguments = find_videos([folder]), (tmp_path / "out", open_base(str(base)), SMALL)
    original = Vae.encode
    left = [2]

    def stop(self: Vae, frames: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, frames)

    with monkeypatch.context() as patched:
        patched.setattr(Vae, "encode", stop)
        with pytest.raises(KeyboardInterrupt):
            encode(videos, *arguments)
    assert len(ClipFolder(tmp_path / "out", CONFIG)) == 1
    assert not list((tmp_path / "out").rglob("*.partial"))
    seen: list[tuple[str, int, int, str]] = []
    said: list[str] = []
    with monkeypatch.context() as patched:  # captions were embedded before
        patched.setattr("mlaconvert.base.text._load_encoder", lambda *_: pytest.fail("no text is left"))
        report = encode(
            videos, *arguments, listener=Listener(progress=lambda *state: seen.append(state), say=said.append)
        )
    assert (report.made, report.kept) == (2, 1)
    assert said == [f"going on after 1 finished clips in {tmp_path / 'out'}; 2 of 3 videos are left"]
    parts = [done / total for stage, done, total, _ in seen if stage == "video"]
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert any(0 < part < 0.5 for part in parts)  # within a video too
    whole = encode(videos, tmp_path / "whole", *arguments[1:])
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert whole.made == 3


def test_how_long_it_will_take_is_said_before_hours_of_it(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a small clip of five frames, 32 x 48 pixels here, that takes 200 s: the clips have nine frames each."""
    videos, original, arguments = find_videos([folder]), Vae.encode, (open_base(str(base)), SMALL)
    said: list[str] = []
    told = Listener(say=said.append)
    encode(videos, tmp_path / "few", *arguments, listener=told)
    assert said == []
    made: list[int] = []

    def measured(work: Callable[[], object], _device: torch.device) -> float:
        work()
        return 200.0

    def count(self: Vae, frames: Any) -> Tensor:
        found = list(frames)
        made.append(len(found))
        return original(self, found)

    monkeypatch.setattr(encoding, "measured_seconds", measured)
    monkeypatch.setattr(encoding, "_FEW", 0)
    monkeypatch.setattr(Vae, "encode", count)
    encode(videos, tmp_path / "out", *arguments, listener=told)
    slow = "; a GPU takes a small part of that (--device cuda)"
    assert said == [f"3 clips will take about 18 min on cpu, captions aside{slow}"]  # 3 x 9 / 5 of 200 s
    assert made == [5, 9, 9, 9]
    for path in (tmp_path / "few").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_an_embedding_that_was_torn_is_made_again(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, arguments = find_videos([folder]), (tmp_path / "out", open_base(str(base)), SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(Vae, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(videos, *arguments)
    texts = list((tmp_path / "out" / ".text").iterdir())
    assert texts
    for text in texts:
        text.write_bytes(text.read_bytes()[:40])
    encode(videos, *arguments)
    encode(videos, tmp_path / "whole", *arguments[1:])
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_bad_videos_are_refused_or_skipped(folder: Path, base: Path, tmp_path: Path) -> None:
    movie(folder / "b.mp4", 8).with_suffix(".txt").write_text("a dog")
    (folder / "c.mp4").write_text("no video")
    (folder / "c.txt").write_text("a dog")
    result = invoke(folder, "-o", tmp_path / "out", *flags(base))
    assert result.exit_code == 2
    assert "b.mp4: it is shorter than a clip of 9 frames (0.6 s); mend or remove it, or pass --bad-videos skip" in (
        result.stderr
    )
    result = invoke(folder, "-o", tmp_path / "out", *flags(base), "--bad-videos", "skip", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["made"], data["kept"], data["videos"]) == (2, 1, 5)
    assert [message.split(":")[0].rsplit("/", 1)[1] for message in data["skipped"]] == ["b.mp4", "c.mp4"]
    assert "skipped: " in result.stderr
    assert len(ClipFolder(tmp_path / "out", CONFIG)) == 3


def clips_of(folder: Path, name: str) -> list[int]:
    """Numbers of the clips that are there of a video."""
    return sorted(int(path.stem.rsplit("-", 1)[1]) for path in folder.glob(f"{name}-*.safetensors"))


@pytest.mark.slow
def test_no_shard_of_a_skipped_video_stays(folder: Path, base: Path, tmp_path: Path) -> None:
    """One that is damaged after its first clips, and one that was fine in an earlier run."""
    wanted = Encoding(height=32, width=48, frames=3, clips=5)
    long = movie(folder / "long.mp4", 200, seed=7)
    long.with_suffix(".txt").write_text("a dog")
    scramble(long, 0.8, 0.99)
    with Footage(long, height=32, width=48, fps=16) as footage:  # its first clips can be decoded
        assert len([frame for frame, _ in zip(footage, range(18), strict=False)]) == 18
    arguments = (tmp_path / "out", open_base(str(base)))
    with pytest.raises(InputError, match=r"long\.mp4: .*--bad-videos skip"):
        encode(find_videos([long]), *arguments, Encoding(height=32, width=48, frames=3, clips=30))
    assert clips_of(tmp_path / "out", "long") == []
    encode(find_videos([folder / "a.mp4", long]), *arguments, SMALL)  # one clip of each is fine
    assert (clips_of(tmp_path / "out", "a"), clips_of(tmp_path / "out", "long")) == ([0], [0])
    many = Encoding(height=32, width=48, frames=3, clips=30)
    with pytest.raises(InputError, match=r"long\.mp4: "):
        encode(find_videos([folder / "a.mp4", long]), *arguments, many)
    assert clips_of(tmp_path / "out", "long") == [0]  # from before, and still what its file shows
    report = encode(find_videos([folder / "a.mp4", long]), *arguments, many, on_bad=lambda _message: None)
    assert clips_of(tmp_path / "out", "long") == []
    assert clips_of(tmp_path / "out", "a") == [0, 1, 2]
    assert (len(report.skipped), report.kept) == (1, 3)
    (folder / "a.mp4").write_text("no video")
    long.unlink()
    report = encode(find_videos([folder]), *arguments, wanted, on_bad=lambda _message: None)
    assert [report.made, report.kept, len(report.skipped)] == [3, 0, 1]
    assert clips_of(tmp_path / "out", "a") == []
    assert len(ClipFolder(tmp_path / "out", CONFIG)) == 3


@pytest.mark.slow
def test_no_clip_of_an_older_state_of_a_video_stays(folder: Path, base: Path, tmp_path: Path) -> None:
    """It has become shorter, or fewer of its clips are wanted now."""
    arguments = (tmp_path / "out", open_base(str(base)))
    many = Encoding(height=32, width=48, frames=3, clips=5)
    encode(find_videos([folder]), *arguments, many)
    assert clips_of(tmp_path / "out", "a") == [0, 1, 2]
    encode(find_videos([folder]), *arguments, SMALL)
    assert clips_of(tmp_path / "out", "a") == [0, 1, 2]  # fewer are asked for, and these are still true
    movie(folder / "a.mp4", 20, seed=5)
    assert encode(find_videos([folder]), *arguments, SMALL).made == 1
    assert clips_of(tmp_path / "out", "a") == [0]
    encode(find_videos([folder]), *arguments, many)
    movie(folder / "a.mp4", 11, seed=6)
    assert encode(find_videos([folder]), *arguments, many).made == 1
    assert clips_of(tmp_path / "out", "a") == [0]


def test_a_clip_that_is_missing_before_the_last_is_made(folder: Path, base: Path, tmp_path: Path) -> None:
    arguments = (tmp_path / "out", open_base(str(base)), Encoding(height=32, width=48, frames=3, clips=5))
    encode(find_videos([folder]), *arguments)
    (path,) = (tmp_path / "out").glob("a-*-0001.safetensors")
    before = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.name}.partial").write_bytes(before[:99])  # of a run that was killed
    assert encode(find_videos([folder]), *arguments).made == 1
    assert path.read_bytes() == before
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_full_disk_is_not_a_bad_video(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def full(path: Path, target: Path) -> Path:
        if "0000" in path.name:
            raise OSError(28, "No space left on device")
        return original(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        encode(find_videos([folder]), tmp_path / "out", open_base(str(base)), SMALL, on_bad=lambda _message: None)
    assert not list((tmp_path / "out").rglob("*.partial"))
