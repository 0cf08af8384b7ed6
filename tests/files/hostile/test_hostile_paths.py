"""Broken and hostile model files: every one ends in one plain message and exit code 2, and changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hostile import Cases, Shelf, arguments, instead, refused
from hostile_cases import SHARDS, named, spoiled

from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.timeout(60)
PLACES: Cases = {
    "weights in a loop": (instead(WEIGHTS_NAME, "loop"), "holds no weights"),
    "weights to nowhere": (instead(WEIGHTS_NAME, "nowhere"), "holds no weights"),
    "weights a pipe": (instead(WEIGHTS_NAME, "pipe"), "holds no weights"),
    "weights a device": (instead(WEIGHTS_NAME, "device"), "holds no weights"),
    "weights a folder": (instead(WEIGHTS_NAME, "folder"), "holds no weights"),
    "config in a loop": (instead(CONFIG_NAME, "loop"), "config.json: it cannot be read"),
    "config to nowhere": (instead(CONFIG_NAME, "nowhere"), "config.json: is a link to nowhere"),
    "config a pipe": (instead(CONFIG_NAME, "pipe"), "config.json: it is a pipe"),
    "config a device": (instead(CONFIG_NAME, "device"), "config.json: it is a pipe, socket or device"),
    "config a folder": (instead(CONFIG_NAME, "folder"), "config.json: it is a folder"),
    "a file name that is no text": (
        lambda f: (f / WEIGHTS_NAME).rename(f / os.fsdecode(b"\xff.safetensors")),
        "plain UTF-8",
    ),
    "a file name with an escape": (
        lambda f: (f / WEIGHTS_NAME).rename(f / "\x1b[2J.safetensors"),
        "plain UTF-8",
    ),
    "two files": (
        lambda f: (
            (f / WEIGHTS_NAME).rename(f / "a.safetensors") and shutil.copy(f / "a.safetensors", f / "b.safetensors")
        ),
        "several weight files",
    ),
    "nothing": (lambda f: (f / WEIGHTS_NAME).unlink(), "holds no weights"),
    "experts without themselves": (
        lambda f: (
            [(f / n).mkdir() or (f / n / "a.safetensors").write_bytes(b"") for n in ("transformer", "transformer_2")]
            and None
        ),
        "two experts|truncated|experts",
    ),
}


@pytest.mark.parametrize(("case", "command"), named(PLACES))
def test_places(tmp_path: Path, shelf: Shelf, case: str, command: str) -> None:
    spoil, says = PLACES[case]
    source = shelf.dense if command in ("analyze", "convert") else shelf.converted
    model = spoiled(tmp_path, source, spoil)
    refused(tmp_path, *arguments(command, model, shelf, tmp_path / "out"), says=says)


SOURCES: dict[str, tuple[str, str]] = {
    "nothing": ("", "not a path"),
    "blank": (" ", "not a path"),
    "gone": ("gone.safetensors", "no such file"),
    "absolute": ("/nowhere/at/all", "no such file"),
    "a long name": ("x" * 5000, "is not a path"),
    "a long path": ("x/" * 3000, "is not a path|no such file"),
    "a NUL": ("a\0b", "plain UTF-8"),
    "a line break": ("a\nb/c", "plain UTF-8"),
    "an escape": ("\x1b[2J/a", "plain UTF-8"),
    "undecoded bytes": ("\udcff/model", "plain UTF-8"),
    "a text turned round": ("user/\u202emodel", "plain UTF-8"),
    "an unknown home": ("~nobody-is-called-this/model", "not a path|no such file"),
    "a loop": ("loop", "leads nowhere"),
    "a loop like a Hub id": ("links/loop", "leads nowhere"),
    "a pipe": ("pipe", "a pipe, socket or device"),
    "a device": ("/dev/zero", "a pipe, socket or device"),
    "a text file": ("notes.txt", "not a weight file"),
    "a shard alone": (SHARDS[0], "one shard of several"),
    "an archive": ("model.zip", "not a weight file"),
    "an empty folder": ("empty", "holds no weights"),
    "an address": ("https://huggingface.co/user/repo", "no such file"),
    "a Hub id above itself": ("user/repo/../other", "leads outside its repository"),
    "a Hub id that is all dots": ("user/..", "leads outside its repository"),
    "a Hub id with a dot": ("user/repo/./a", "leads outside its repository"),
    "a Hub id above the Hub": ("user/repo/../../../../etc", "leads outside its repository"),
    "a Hub id with a backslash": ("user/repo\\..\\..", "no such file"),
    "a Hub id with a query": ("user/repo?x=1", "no such file"),
    "a Hub id with a fragment": ("user/repo#x", "no such file"),
    "a Hub id in percents": ("user/%2e%2e", "no such file"),
    "a Hub id that begins with a dash": ("-user/repo", "no such file|No such option|Usage"),
    "a Hub id with blanks": ("us er/repo", "no such file"),
    "a Hub id of one name": ("repo", "no such file"),
    "a Hub id with two dots inside": ("user/re..po", "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id with dashes": ("user/--repo", "neither a path here nor a Hub id"),
    "a Hub id that ends in .git": ("user/repo.git", "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id of other letters": ("\u00fcser/r\u00e9po", "neither a path|no such file"),
    "a long Hub id": ("user/" + "x" * 97, "neither a path here nor a Hub id|cannot be fetched"),
    "a Hub id": ("user/repo", "cannot be fetched"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    source, says = SOURCES[case]
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("links").mkdir()
    Path("links/loop").symlink_to("../loop")
    Path("empty").mkdir()
    for name in ("notes.txt", SHARDS[0], "model.zip"):
        Path(name).write_bytes(b"notes")
    before = arguments(("analyze", "convert")[len(case) % 2], source, shelf, tmp_path / "out")
    command = [before[0], *before[2:], "--", source]
    refused(tmp_path, *command, says=says)


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        f"revision {i}": (("user/repo", "--revision", revision), "no branch, tag or commit")
        for i, revision in enumerate(
            ("../../etc", "a/../b", "a b", "", "-x", "a?b=c", "a#b", "a\\b", "/main", "a\nb", "\t")
        )
    },
    "a revision of this disk": (("MODEL", "--revision", "main"), "has no revision"),
    **{
        f"subfolder {i}": ((source, "--subfolder", folder), "leads outside|no folder")
        for i, (source, folder) in enumerate(
            [(s, f) for s in ("MODEL", "user/repo") for f in ("..", "../other", "a/../../b", "/etc")]
            + [("MODEL", "x" * 5000), ("MODEL", "gone"), ("MODEL", "a\nb"), ("MODEL", "a\0b"), ("MODEL", "config.json")]
        )
    },
    "a subfolder of a file": (("WEIGHTS", "--subfolder", "a"), "a file has no subfolder"),
    "a state key": (("MODEL", "--state-key", "generator"), "no state key 'generator'"),
    "a state key with an escape": (("MODEL", "--state-key", "\x1b[2J"), "no state key"),
    **{
        f"layers {i}": (("MODEL", "--layers", layers), "layer")
        for i, layers in enumerate(
            ("", "a", "-1", "1-0", "0-", "2", "0-999999", "9" * 50, "0,,1", "0;1", "\u0663", "1e3", "0\n1")
        )
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tmp_path: Path, shelf: Shelf, case: str) -> None:
    (source, *rest), says = OPTIONS[case]
    known = {"MODEL": str(shelf.dense), "WEIGHTS": str(shelf.dense / WEIGHTS_NAME)}
    refused(tmp_path, "analyze", known.get(source, source), *rest, says=says)
