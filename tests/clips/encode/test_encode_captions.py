"""Videos and captions to clips: real files in, shards out that the other commands read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from encode_cases import SMALL, invoke

from mlaconvert.base.repository import open_base
from mlaconvert.clips import encode as encoding
from mlaconvert.clips import videos as videos_module
from mlaconvert.clips.encode import Encoding, encode
from mlaconvert.clips.videos import find_videos
from mlaconvert.errors import ConfigError, InputError, OutputError


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions_from_a_table(folder: Path, tmp_path: Path, form: str) -> None:
    rows = [("a.mp4", 'one, "two"'), ("deep/a.mp4", "drei"), (str(folder / "deep" / "b c.mp4"), "é\nü")]
    table = folder / f"captions.{form}"
    if form == "jsonl":
        table.write_text(
            "\n".join(json.dumps({"file": file, "caption": text, "fps": 1}) for file, text in rows) + "\n\n"
        )
    else:
        quoted = ['"{}","{}"'.format(*(part.replace('"', '""') for part in row)) for row in rows]
        table.write_text("\n".join(("file,caption", *quoted)))
    found = find_videos([folder], table)
    assert [(video.name, video.caption) for video in found] == [
        ("a.mp4", 'one, "two"'),
        ("deep/a.mp4", "drei"),
        ("deep/b c.mp4", "é\nü"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", "{", "line 1: not JSON"),
        ("c.jsonl", '\n{"file": "a.mp4"}', "line 2: expected file and caption, both text"),
        ("c.jsonl", '[1]', "line 1: expected file and caption"),
        ("c.csv", "name,text\na,b", "first line must name the columns file and caption"),
        ("c.csv", "file,caption\na.mp4", "line 2: expected file and caption"),
        ("c.csv", "file,caption\na.mp4,x\na.mp4,y", "line 3: a.mp4 has two captions"),
        ("c.csv", "file,caption\nb.mp4,x", r"a.mp4 has no caption in .*c.csv; add a line"),
    ],
)  # fmt: skip
def test_wrong_captions_are_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        find_videos([folder], folder / name)


def test_wrong_sources_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.mp4 has no caption: write one into a\.txt beside it"):
        find_videos([folder])
    with pytest.raises(InputError, match="there is no such file or folder"):
        find_videos([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no videos there"):
        find_videos([tmp_path / "empty"])
    shutil.copytree(folder / "deep", tmp_path / "other")
    with pytest.raises(InputError, match=r"two videos are called a\.mp4"):
        find_videos([folder / "deep", tmp_path / "other"])
    one = find_videos([folder / "deep" / "a.mp4", folder / "deep" / "a.mp4"])
    assert [video.name for video in one] == ["a.mp4"]


def test_only_its_own_folder_is_written(folder: Path, base: Path, tmp_path: Path) -> None:
    videos, components = find_videos([folder]), open_base(str(base))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(OutputError, match="holds no encoded clips"):
        encode(videos, tmp_path / "mine", components, SMALL)
    with pytest.raises(OutputError, match="create it first"):
        encode(videos, tmp_path / "a" / "b", components, SMALL)
    encode(videos[:1], tmp_path / "out", components, SMALL)
    with pytest.raises(OutputError, match="holds clips of other settings"):
        encode(videos, tmp_path / "out", components, Encoding(height=32, width=48, frames=2))
    with pytest.raises(ConfigError, match="device 'abacus' is none that torch knows"):
        encode(videos, tmp_path / "new", components, SMALL, text_device="abacus")
    with pytest.raises(ConfigError, match="height is 40 pixels: give a multiple of 16"):
        encode(videos, tmp_path / "new", components, Encoding(height=40, width=48, frames=2))
    assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path / "mine") == ["x"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "frames is 0: give 1 or more"),
        (["--fps", "0"], "fps is 0.0"),
        (["--clips", "-1"], "clips is -1"),
        (["--bad-videos", "eat"], "--bad-videos is 'eat': give refuse or skip"),
        (["--captions", "none.csv"], "none.csv: there is no such file"),
        (["--base", "./nowhere"], "nowhere: there is no such file or folder"),
    ],
)
def test_wrong_usage_is_one_sentence(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(folder, "-o", tmp_path / "out", "--base", tmp_path, *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_names_make_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b.mp4", "a-b.mp4", "a b.mp4", "a.b.mp4", "a-b.mov", "é.mp4", "x" * 300 + ".mp4"]
    videos = [videos_module.Video(name=name, path=tmp_path, caption="") for name in names]
    paths = {encoding._shard(tmp_path, video, clip) for video in videos for clip in (0, 1)}
    assert len(paths) == 2 * len(names)
    assert all(len(path.name) < 120 and path.name.isascii() for path in paths)
