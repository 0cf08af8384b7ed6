"""One staging for every command: whose a hidden folder is, who may write, and what a kill leaves at any step."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from safetensors.torch import load_file

from mlaconvert.clips.encode import encode
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import OutputError
from mlaconvert.files import staging as module
from mlaconvert.files.output import Output
from mlaconvert.files.staging import Staging, claim
from mlaconvert.generation import chunks as chunks_module
from mlaconvert.generation import passes
from mlaconvert.generation import run as generation
from mlaconvert.generation.request import Generation
from mlaconvert.generation.run import generate
from mlaconvert.listener import Listener


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny model, and clips for it."""
    folder = tmp_path_factory.mktemp("shelf")
    convert("tiny", folder / "student", ConvertRecipe(init="svd", height=24, width=32, vae_stride=1))
    return folder


def command(name: str, shelf: Path, output: Path) -> list[object]:
    """The arguments with which a command writes `output` at all costs."""
    (output.parent / "prompts.txt").write_text("large red disc right, sky\n")
    quick = ["--frames", 3, "--steps", 1]
    return {
        "convert": ["convert", "tiny", "-o", output, "--init", "svd", "--overwrite", "--restart"],
        "generate": ["generate", "tiny", "-o", output, *quick, "--format", "none", "--overwrite"],
        "vbench": ["generate", "tiny", "-o", output, *quick, "--samples", 1, "--vbench-names", "--overwrite",
                   "--prompts", output.parent / "prompts.txt"],
        "heal": ["heal", shelf / "student", "-o", output, "--stage", "distill", "--steps", 1, "--batch", 1, "--cpu",
                 "--tracker", "none", "--overwrite", "--restart"],
        "sweep": ["sweep", "tiny", "-o", output, "--init", "svd", "--kv-ranks", 4, "--restart"],
        "evaluate": ["evaluate", output, "--frames", 0, "--clips", 1, "--save"],
        "demo": ["demo", "-o", output],
    }[name]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


COMMANDS = ("convert", "generate", "vbench", "heal", "sweep", "evaluate", "demo")


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        (name, owner)
        for name in COMMANDS
        for owner in ("convert", "generate", "heal", "encode", "sweep", "evaluate", "demo")
        if owner != ("generate" if name == "vbench" else name)
    ],
)
def test_what_another_command_left_is_never_taken(shelf: Path, tmp_path: Path, name: str, owner: str) -> None:
    output = tmp_path / "out"
    if name == "evaluate":
        shutil.copytree(shelf / "student", output)
    killed = Staging(output, owner)
    killed.open()
    killed.content.mkdir()
    (killed.content / "hours").write_text("of work")
    killed.close()
    arguments = command(name, shelf, output)
    before = tree(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.stderr
    said = result.stderr.strip().splitlines()[-1]
    assert f".out.partial is what an interrupted mlaconvert {owner} left: go on with that command, delete it" in said
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("owner", ["convert", "generate", "heal", "sweep"])
def test_a_second_run_is_told_of_the_first(shelf: Path, tmp_path: Path, name: str, owner: str) -> None:
    """Of the same command or another."""
    output = tmp_path / "out"
    if name == "evaluate":
        shutil.copytree(shelf / "student", output)
    arguments = command(name, shelf, output)
    with Staging(output, owner).held():
        before = tree(tmp_path)
        result = invoke(*arguments)
        assert result.exit_code == 2, result.stderr
        said = result.stderr.strip().splitlines()[-1]
        assert f"another run is writing {output}; wait for it" in said
        assert f"(it is mlaconvert {owner})" in said
        assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_healing_runs_do_not_share_a_state(shelf: Path, tmp_path: Path) -> None:
    state = tmp_path / "mine"
    with claim(state, "heal"):
        result = invoke(*command("heal", shelf, tmp_path / "out"), "--state", state)
    assert result.exit_code == 2, result.stderr
    assert f"another run is writing {state}; wait for it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_encode_takes_part(tmp_path: Path) -> None:
    base: Any = type("Base", (), {"source": "base"})()
    for owner, message in (("encode", "another run is writing"), ("convert", "another run is writing")):
        with Staging(tmp_path / "out", owner).held(), pytest.raises(OutputError, match=message):
            encode([], tmp_path / "out", base)
    killed = Staging(tmp_path / "out", "sweep")
    killed.open()
    killed.close()
    with pytest.raises(OutputError, match="an interrupted mlaconvert sweep left"):
        encode([], tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_a_folder_that_is_removed_while_others_want_it(tmp_path: Path) -> None:
    """Runs in a row and at once: at no time do two of them hold one output."""
    inside, most, refused = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(40):
            try:
                with claim(tmp_path / "out", "encode"):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except OutputError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert refused[0] < 160
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("note", ["{", "[]", '{"command": 3}', '{"command": ""}', '{"command": "a\\u0007b"}'])
def test_a_note_that_names_nobody_is_in_the_way(tmp_path: Path, note: str) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "owner.json").write_text(note)
    with pytest.raises(OutputError, match=r"\.out\.partial is in the way: delete it"):
        Staging(tmp_path / "out", "convert").open()
    assert [path.name for path in (tmp_path / ".out.partial").iterdir()] == ["owner.json"]


@pytest.mark.parametrize("name", ["x" * 250, "/"])
def test_names_that_no_output_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="an output cannot have this name"):
        Staging(tmp_path / name, "convert")


def test_a_mounted_folder_holds_its_own_hidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the inside of the output may be written."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    (tmp_path / "out").mkdir()
    with claim(tmp_path / "out", "encode"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".out.partial"]
        assert module.visible(tmp_path / "out") == []
        with pytest.raises(OutputError, match="another run"), claim(tmp_path / "out", "sweep"):
            pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_demo_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "demo"
    (output / "tiny-mla").mkdir(parents=True)
    result = invoke("demo", "-o", output)
    assert result.exit_code == 2
    assert "tiny-mla exists; choose another folder with -o DIR, or delete it" in result.stderr
    killed = Staging(output, "demo")
    killed.open()
    killed.close()

    def run(*_: object, overwrite: bool) -> None:
        raise OutputError(f"overwrites: {overwrite}")

    monkeypatch.setattr("mlaconvert.demo.run_demo", run)
    assert "overwrites: True" in invoke("demo", "-o", output).stderr


def test_an_earlier_conversion_is_gone_on_with_by_convert_only(tmp_path: Path) -> None:
    """A lock file and no note of the owner."""

    def stop(stage: str, done: int, total: int, _note: str = "") -> None:
        if stage == "convert" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("tiny", tmp_path / "out", ConvertRecipe(init="svd"), listener=Listener(progress=stop))
    (tmp_path / ".out.partial" / "owner.json").unlink()
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="an interrupted mlaconvert convert left"):
            generate("tiny", tmp_path / "out", Generation(frames=3, steps=1), overwrite=overwrite)
    assert tree(tmp_path) == before
    said: list[str] = []
    convert("tiny", tmp_path / "out", ConvertRecipe(init="svd"), listener=Listener(say=said.append))
    assert said[0].startswith("going on after ")


WANTED = Generation(frames=7, steps=1, seed=2)


def earlier_video(folder: Path, monkeypatch: pytest.MonkeyPatch, *, chunks: int) -> Path:
    """An unfinished video as earlier versions kept it: everything beside the note, no lock, no owner."""
    left, original = [chunks], chunks_module.ChunkFile.write

    def write(self: Any, start: int, chunk: torch.Tensor) -> None:
        original(self, start, chunk)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chunks_module.ChunkFile, "write", write)
        with pytest.raises(KeyboardInterrupt):
            generate("tiny", folder / "out", WANTED, movie="none")
    hidden = folder / ".out.partial"
    for path in [*(hidden / "video").iterdir()]:
        path.rename(hidden / path.name)
    (hidden / "video").rmdir()
    for name in ("lock", "owner.json"):
        (hidden / name).unlink()
    return hidden


def test_an_earlier_unfinished_video_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = earlier_video(tmp_path, monkeypatch, chunks=2)
    assert sorted(path.name for path in hidden.iterdir()) == ["latents.safetensors", "progress.json"]
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="an interrupted mlaconvert generate left"):
        convert("tiny", Output(tmp_path / "out", overwrite=True, restart=True), ConvertRecipe(init="svd"))
    assert tree(tmp_path) == before
    report = generate("tiny", tmp_path / "out", WANTED, movie="none")
    assert report.resumed_frames == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    generate("tiny", tmp_path / "whole", WANTED, movie="none")
    files = [load_file(tmp_path / name / "latents.safetensors")["latents"] for name in ("out", "whole")]
    assert torch.equal(*files)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_earlier_finished_video_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Its note was gone before it was in place; what it replaces is set aside."""
    hidden = earlier_video(tmp_path, monkeypatch, chunks=3)
    settings = json.loads((hidden / "progress.json").read_text())["settings"]
    (hidden / "progress.json").unlink()
    (hidden / "generation.json").write_text(json.dumps({"settings": settings, "frames": 7}))
    if replaced:
        (tmp_path / ".out.replaced").mkdir()
        (tmp_path / ".out.replaced" / "generation.json").write_text("{}")
        with pytest.raises(OutputError, match=r"\.out\.replaced is the video that an interrupted run was replacing"):
            generate("tiny", tmp_path / "out", WANTED, movie="none")
    monkeypatch.setattr(passes, "rollout", lambda *_, **__: pytest.fail("it is finished"))
    report = generate("tiny", tmp_path / "out", WANTED, movie="none", overwrite=replaced)
    assert report.resumed_frames == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(os.listdir(tmp_path / "out")) == {"latents.safetensors", "generation.json"}  # noqa: PTH208


def test_a_replaced_video_that_was_left_does_not_block(tmp_path: Path) -> None:
    generate("tiny", tmp_path / "out", WANTED, movie="none")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")
    generate("tiny", tmp_path / "out", WANTED, movie="none", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate("tiny", folder / "out", WANTED, **options)


def test_overwriting_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, movie="none")
    assert generate("tiny", tmp_path / "out", WANTED, movie="none", overwrite=True).resumed_frames == 7


def test_what_another_kind_of_movie_left_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, movie="gif")
    (tmp_path / ".out.partial" / "video" / ".77.partial.mp4").write_text("half")
    report = generate("tiny", tmp_path / "out", WANTED, movie="none")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
    assert set(report.files) == {"latents.safetensors", "generation.json"}


def test_a_video_that_has_appeared_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the end; the work is kept too."""
    original: Callable[..., Any] = passes.run_passes

    def run(*given: Any) -> Any:
        (tmp_path / "out.gif").write_text("mine")
        return original(*given)

    monkeypatch.setattr(generation, "run_passes", run)
    with pytest.raises(OutputError, match=r"writing failed \(File exists\); finished frames are kept"):
        generate("tiny", tmp_path / "out.gif", WANTED)
    assert (tmp_path / "out.gif").read_text() == "mine"
    assert (tmp_path / ".out.gif.partial" / "video" / "latents.safetensors").is_file()
