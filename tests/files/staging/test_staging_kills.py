"""One staging for every command: whose a hidden folder is, who may write, and what a kill leaves at any step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Forks a run for each operation that it asks of the disk, kills it there, and lets the next one go to its end.
KILLED_ANYWHERE = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
place, overwrite = Path(sys.argv[1]), sys.argv[2] == "overwrite"
{job}

def die_at(step):
    seen = itertools.count()
    def dying(plain):
        def call(*given, **options):
            if next(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given, **options)
        return call
    for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))

def in_child(step):
    pid = os.fork()
    if pid == 0:
        try:
            if step is not None:
                die_at(step)
            run()
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for step in itertools.count():
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    prepare()
    status = in_child(step)
    between = look()
    aside = (place / f".{{OUT.name}}.replaced").exists()
    if status != 0 and between == NEW and not overwrite:  # it is there: nothing is left to do
        again = 0
    else:
        again = in_child(None)
    left = sorted(path.name for path in place.iterdir())
    print(json.dumps([status, between, aside, again, look(), left]), flush=True)
    if status == 0:
        break
"""
SMALL_JOB = """
from mlaconvert.files.staging import Staging
OUT, NEW = place / NAME, "new"
def prepare():
    if overwrite and MOVIE:
        OUT.write_text("old")
    elif overwrite:
        OUT.mkdir()
        (OUT / "file").write_text("old")
def look():
    path = OUT if MOVIE else OUT / "file"
    return path.read_text() if path.exists() else None
def run():
    staging = Staging(OUT, "generate", overwrite=overwrite)
    staging.open()
    staging.clear()
    staging.content.mkdir()
    (staging.content / "file").write_text("new")
    staging.publish("file" if MOVIE else None)
"""
VIDEO_JOB = """
import torch
from mlaconvert.generation import run as generation
from mlaconvert.model.load import load_model
from safetensors.torch import load_file
torch.set_num_threads(1)
OUT, NEW = place / NAME, "new"
model = load_model("tiny")
generation.Runtime.load = lambda *_, **__: model
generation.free_memory = lambda *_: None  # nothing of it is on the disk
def prepare():
    if overwrite and MOVIE:
        OUT.write_text("old")
    elif overwrite:
        OUT.mkdir()
        (OUT / "generation.json").write_text("{{}}")
def look():
    if not OUT.exists():
        return None
    if MOVIE:
        return "new" if OUT.read_bytes().startswith(b"GIF") else "old"
    whole = sorted(path.name for path in OUT.iterdir()) == ["frames.png", "generation.json", "latents.safetensors",
                                                            "video-0.gif"]
    if whole:
        load_file(OUT / "latents.safetensors")
    return "new" if whole else "old"
def run():
    wanted = generation.Generation(frames=4, steps=1, guidance=1.0, height=8, width=12)
    generation.generate("tiny", OUT, wanted, movie="gif", overwrite=overwrite)
"""


def killed_anywhere(job: str, folder: Path, *, movie: bool, overwrite: bool) -> list[list[Any]]:
    """(exit status, what is at the output, whether the old one is aside, the next run's status, the output, names)."""
    folder.mkdir()
    head = f"NAME, MOVIE = {'out.gif' if movie else 'out'!r}, {movie}\n"
    code = KILLED_ANYWHERE.format(job=head + job.replace("{{}}", "{}"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "overwrite" if overwrite else ""],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    assert rows[-1][0] == 0, done.stderr
    return rows


@pytest.mark.skipif(os.name != "posix", reason="kills forks")
@pytest.mark.parametrize("movie", [False, True])
@pytest.mark.parametrize(
    ("job", "overwrite"), [("small", False), ("small", True), pytest.param("video", True, marks=pytest.mark.slow)]
)
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, job: str, movie: bool, overwrite: bool) -> None:
    script = {"small": SMALL_JOB, "video": VIDEO_JOB}[job]
    rows = killed_anywhere(script, tmp_path / "place", movie=movie, overwrite=overwrite)
    assert len(rows) > 10
    for status, between, aside, again, after, left in rows[:-1]:
        assert status == -9
        assert between in (("old", "new") if overwrite else (None, "new")) or (overwrite and aside)
        assert (again, after) == (0, "new")
        name = "out.gif" if movie else "out"
        # What a killed run left goes with the next one.
        assert left == [name] or (between == "new" and not overwrite and set(left) <= {name, f".{name}.partial"})
    assert {row[1] for row in rows} >= ({"old", "new"} if overwrite else {None, "new"})
