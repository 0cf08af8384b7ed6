"""Kills and failing disks: does a run lose work, or leave half an output? Prints a Markdown table. Linux only.

    python benchmarks/kill.py [--kills 40] [--write BENCHMARKS.md]

Small models in the published layouts, one thread. Kills: SIGKILL at moments drawn evenly over a run of each command,
again and again until a run comes to its end; then from the start. What a command puts in place at its end must after
every kill be there whole, or not at all, or as it was before (--overwrite); of what it writes file by file (encode,
sweep), every file that is there must be as an uninterrupted run leaves it. In the end the bytes must be those of an
uninterrupted run, but for the times that a few records hold. Failing disks: an error at every write, fsync, rename and
the like that a conversion makes, one run each, then the same call again; a limit on the size of files; and a full file
system in memory, where one may be mounted. Exits with 1 when anything is lost.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tables import put_between

from mlaconvert.config.geometry import WanConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import OutputError
from mlaconvert.families.wan import WanFamily
from mlaconvert.files import staging, writer
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.files.output import Output
from mlaconvert.files.writer import ModelWriter, TensorSpec
from mlaconvert.generation.movies import save_movie

Operation = tuple[str, str, int]  # kind, file name, how many of that kind and name came before it
Snapshot = dict[str, bytes]

LARGE = WanConfig(
    dim=384, num_heads=3, num_layers=10, ffn_dim=1024, freq_dim=32, text_dim=64, in_dim=4, out_dim=4
)  # a run takes a few seconds
MIDDLE = WanConfig(dim=96, num_heads=3, num_layers=5, ffn_dim=64, freq_dim=16, text_dim=8, in_dim=2, out_dim=2)
SMALL = WanConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=16, freq_dim=6, text_dim=8, in_dim=2, out_dim=2)
SVD = ConvertRecipe(init="svd")
HEAL = [
    "heal",
    "--stage",
    "distill",
    "--steps",
    "40",
    "--batch",
    "2",
    "--save-every",
    "2",
    "--validate-every",
    "10",
    "--tracker",
    "none",
    "--cpu",
    "--lr",
    "0.001",
]
CONVERT_CLIPS = 3  # that the default conversion is calibrated on
MAIN = "from mlaconvert.cli import main; main()"
LIMITED = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); {MAIN}"
FORKER = """
import json, os, sys
import torch, mlaconvert.cli, mlaconvert.clips.encode, mlaconvert.conversion.run
import mlaconvert.generation.run, mlaconvert.healing.run
import imageio_ffmpeg, matplotlib.figure, mlaconvert.evaluation.sweep, mlaconvert.reports.plots
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel
torch.set_num_threads(1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        sys.argv = ["mlaconvert", *json.loads(line)]
        try:
            mlaconvert.cli.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


# --- the model ---------------------------------------------------------------------------------------------------


def write_model(folder: Path, config: WanConfig, seed: int = 0) -> None:
    """A native model folder with drawn weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = WanFamily().expected_shapes(config)
    specs = [TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()]
    names = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_dim", "in_dim", "out_dim")
    with ModelWriter(folder, specs, metadata={"format": "pt"}) as files:
        for spec in specs:
            tensor = torch.randn(spec.shape, generator=generator) * prod(spec.shape[1:] or (16,)) ** -0.5
            files.write(spec.name, tensor + 1 if "norm" in spec.name and spec.name.endswith("weight") else tensor)
        fields = {"_class_name": "WanModel", "model_type": "t2v", **{name: getattr(config, name) for name in names}}
        files.write_text(CONFIG_NAME, json.dumps(fields))
        files.commit()


def write_clips(folder: Path, config: WanConfig) -> None:
    """Noise in the layout of clips, to heal on."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    clips = {
        "latents": torch.randn(12, config.in_dim, 3, 4, 6, generator=generator),
        "context": torch.randn(12, 3, config.text_dim, generator=generator),
    }
    save_file(clips, folder / "clips.safetensors")


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- disks that fail ---------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """Counts what is asked of the disk; the operation `broken` fails."""

    broken: Operation | None = None
    error: int = errno.EIO
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def ask(self, kind: str, name: str) -> None:
        name = re.sub(r"\.[0-9a-f]{8}(?=\.partial$)", "", name)  # another one in each run
        operation = (kind, name, self.seen[kind, name])
        self.seen[kind, name] += 1
        if operation == self.broken:
            raise OSError(self.error, os.strerror(self.error))

    def operations(self) -> list[Operation]:
        return [(kind, name, i) for (kind, name), count in sorted(self.seen.items()) for i in range(count)]


class _Stream:
    """A file opened for writing, whose writes ask the disk."""

    def __init__(self, stream: Any, name: str, disk: Disk) -> None:
        self._stream, self._name, self._disk = stream, name, disk

    def write(self, data: Any) -> Any:
        self._disk.ask("write", self._name)
        return self._stream.write(data)

    def truncate(self, size: int) -> Any:
        self._disk.ask("truncate", self._name)
        return self._stream.truncate(size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Let everything that changes the disk ask `disk` first."""
    fsync, opened = os.fsync, Path.open
    plain: dict[str, Callable[..., Any]] = {
        name: getattr(Path, name) for name in ("mkdir", "rename", "replace", "touch", "unlink")
    }

    class Watched(FileIO):
        def write(self, data: Any) -> int:
            disk.ask("write", Path(os.fsdecode(self.name)).name)
            return super().write(data)

    def ask_first(name: str) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            disk.ask(name, path.name)
            return plain[name](path, *arguments, **options)

        return call

    def open_watched(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" not in mode:
            return opened(path, mode, *arguments, **options)
        disk.ask("open", path.name)
        return _Stream(opened(path, mode, *arguments, **options), path.name, disk)

    def fsync_watched(handle: int) -> None:
        disk.ask("fsync", Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    try:
        writer.FileIO = Watched  # type: ignore[attr-defined]
        Path.open, os.fsync = open_watched, fsync_watched  # type: ignore[assignment, method-assign]
        for name in plain:
            setattr(Path, name, ask_first(name))
        yield disk
    finally:
        writer.FileIO, Path.open, os.fsync = FileIO, opened, fsync  # type: ignore[attr-defined, method-assign]
        for name, method in plain.items():
            setattr(Path, name, method)


def break_everything(source: Path, folder: Path, expected: Snapshot, *, overwrite: bool) -> dict[str, int]:
    """One conversion for each operation that a conversion asks of the disk, which fails there; then the same again.

    Counts by what was found: operations that were "tried", runs that "ended well" in spite of it, and "lost" ones.
    `overwrite` puts another model in the output's place first.
    """
    output, other = folder / "out", {"config.json": b"{}", "old": b"1"}

    def fresh() -> None:
        for path in (output, folder / ".out.partial", folder / ".out.replaced"):
            if path.exists():
                _delete(path)
        if overwrite:
            output.mkdir()
            for name, data in other.items():
                (output / name).write_bytes(data)

    fresh()
    with watched(Disk()) as clean:
        convert(source, Output(output, overwrite=overwrite), SVD)
    found = Counter[str]()
    for operation in clean.operations():
        fresh()
        found["tried"] += 1
        allowed = [None, expected, *([other] if overwrite else [])]
        try:
            with watched(Disk(broken=operation, error=errno.ENOSPC)):
                convert(source, Output(output, overwrite=overwrite), SVD)
            found["ended well"] += 1
        except OutputError:
            pass
        between = snapshot(output) if output.exists() else None
        if between != expected:
            convert(source, Output(output, overwrite=overwrite), SVD)
        if between not in allowed or snapshot(output) != expected:
            found["lost"] += 1
            print(f"LOST: {operation}", file=sys.stderr)
    return dict(found)


def _delete(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


# --- processes that are killed -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command to be killed. `finished` counts what a killed run left to go on from; `plain` leaves out of a file's
    bytes what tells a time. With `whole`, all of the output appears at once, in the place of `before` if there is one.
    """

    what: str
    command: list[str]
    output: Path
    finished: Callable[[], int]
    kills: int
    whole: bool = True
    before: Snapshot = field(default_factory=dict)
    plain: Callable[[str, bytes], bytes] = lambda _, data: data

    def look(self) -> Snapshot:
        """The files of the output, without those that only a killed run leaves, and a sweep's models."""
        if self.output.is_file():
            return {"": self.output.read_bytes()}
        found = snapshot(self.output) if self.output.is_dir() else {}
        if not self.whole:
            found = {
                name: data
                for name, data in found.items()
                if not any(part[0] == "." or part == "models" or part.endswith(".partial") for part in Path(name).parts)
            }
        return {name: self.plain(name, data) for name, data in found.items()}

    def begin(self) -> None:
        """Delete all that a run leaves, and put back what it replaces."""
        hidden = self.output.parent.glob(f".{self.output.name}.*")
        for path in (self.output, *self.output.parent.glob(f"{self.output.name}.*"), *hidden):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name, data in self.before.items():
            path = self.output / name if name else self.output
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def is_sound(self, found: Snapshot, expected: Snapshot) -> bool:
        """Whether a kill may have left this."""
        if not self.whole:
            return all(expected.get(name) == data for name, data in found.items() if name not in _NOTES)
        aside = self.output.with_name(f".{self.output.name}.replaced")
        return found in (self.before, expected) or (not found and aside.is_dir() and snapshot(aside) == self.before)


_NOTES = {"sweep.json", "results.json"}  # a sweep's, that exist before it is at its end, or tell of a part


@dataclass
class Killed:
    """What became of a series of kills."""

    kills: int = 0
    completed: int = 0
    lost: int = 0
    resumed: int = 0  # runs that found something finished to go on from


class Runner:
    """Runs commands in forks of one process that has imported everything, and has one thread."""

    def __init__(self, folder: Path) -> None:
        self._stderr = folder / "stderr"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", FORKER, str(self._stderr)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, command: list[str], moment: float | None) -> tuple[bool, float, str]:
        """Run a command, and kill it after `moment` seconds: whether it ended itself, its seconds, its stderr."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(command) + "\n")
        self._parent.stdin.flush()
        pid, began = int(self._parent.stdout.readline()), time.monotonic()
        ended, _, _ = select.select([self._parent.stdout], [], [], 600 if moment is None else moment)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        status = int(self._parent.stdout.readline())
        return status != -signal.SIGKILL, time.monotonic() - began, self._stderr.read_text()

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()


def kill_at_random(runner: Runner, job: Job, seed: int = 0) -> Killed:
    """Kill a job as often as it says; the module's head tells when."""
    random_moment, found = random.Random(seed), Killed()
    job.begin()
    ended, seconds, said = runner.run(job.command, None)
    expected = job.look()
    if not expected or expected == job.before:
        sys.exit(f"it failed: {said}")
    job.begin()
    done = False
    while found.kills < job.kills or not done:
        found.resumed += job.finished() > 0
        moment = random_moment.uniform(0, seconds) if found.kills < job.kills else None
        ended, _, said = runner.run(job.command, moment)
        found.kills += not ended
        between = job.look()
        done = ended or (job.whole and between == expected)
        found.completed += done
        if between != expected if done else not job.is_sound(between, expected):
            found.lost += 1
            print(f"LOST after kill {found.kills} of {job.what}: {said}", file=sys.stderr)
        if done:
            job.begin()
    print(f"{job.what}, {seconds:.1f} s a run: {found}", file=sys.stderr, flush=True)
    return found


# --- what is killed ----------------------------------------------------------------------------------------------


def make_jobs(folder: Path, kills: int) -> list[Job]:
    """A job for each command, on inputs that are made in `folder`; `kills` of the quickest, fewer of the slow ones."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    wan_base = importlib.import_module("wan_base")
    small, middle, large = folder / "small", folder / "middle", folder / "large"
    write_model(middle, MIDDLE)
    write_model(large, LARGE)
    write_clips(folder / "clips", SMALL)
    write_clips(folder / "middle-clips", MIDDLE)
    convert(small, folder / "student", SVD)
    wan_base.save_base(folder / "base")
    write_videos(folder / "videos")
    output, fewer = folder / "out", -(-kills // 4)
    hidden = folder / ".out.partial"
    data, quick = ["--data", str(folder / "middle-clips")], ["--frames", "15", "--steps", "2"]

    def layers() -> int:
        return len([*hidden.glob("model-*.json"), *folder.glob("out.moments/layer-*.safetensors")])

    def frames(name: str) -> Callable[[], int]:
        def count() -> int:
            note = folder / f".{name}.partial" / "progress.json"
            return int(json.loads(note.read_bytes())["frames"]) if note.is_file() else 0

        return count

    old_video = {"generation.json": b"{}", "old": b"1"}
    svd = ["convert", str(large), "-o", str(output), "--init", "svd"]
    default = ["convert", str(middle), "-o", str(output), *data, "--clips", str(CONVERT_CLIPS)]
    old_model = {"config.json": b"{}", "old": b"1"}
    return [
        Job(what="`convert`", command=default, output=output, finished=layers, kills=kills),
        Job(
            what="`convert --overwrite`",
            command=[*default, "--overwrite"],
            output=output,
            finished=layers,
            kills=fewer,
            before=old_model,
        ),
        Job(what="`convert --init svd`", command=svd, output=output, finished=layers, kills=kills),
        Job(
            what="`heal`",
            command=[*HEAL, str(folder / "student"), "--teacher", str(small), "--data", str(folder / "clips"), "-o",
                     str(output)],
            output=output,
            finished=lambda: int((folder / "out.state" / "last.pt").is_file()),
            kills=kills,
        ),
        Job(
            what="`generate --overwrite`, a folder",
            command=["generate", "tiny", "-o", str(output), *quick, "--format", "mp4", "--overwrite"],
            output=output,
            finished=frames("out"),
            kills=kills,
            before=old_video,
            plain=without_times,
        ),
        Job(
            what="`generate --overwrite`, a movie",
            command=["generate", "tiny", "-o", str(folder / "out.mp4"), *quick, "--overwrite"],
            output=folder / "out.mp4",
            finished=frames("out.mp4"),
            kills=fewer,
            before={"": b"old"},
        ),
        Job(
            what="`encode`",
            command=["encode", str(folder / "videos"), "-o", str(output), "--base", str(folder / "base"), "--height",
                     "32", "--width", "48", "--frames", "3", "--clips", "4"],
            output=output,
            finished=lambda: len(list(output.glob("*-0*.safetensors"))),
            kills=kills,
            whole=False,
        ),
        Job(
            what="`sweep`",
            command=["sweep", str(middle), "-o", str(output), "--init", "calibrated,svd", "--kv-ranks", "8,16", *data,
                     "--clips", str(CONVERT_CLIPS), "--validation-clips", "2"],
            output=output,
            finished=lambda: len(list((output / "cells").glob("*.json"))),
            kills=kills,
            whole=False,
            plain=without_times,
        ),
    ]  # fmt: skip


def write_videos(folder: Path) -> None:
    """A few films of smooth noise, with captions."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, frames in enumerate((20, 38, 11)):
        coarse = torch.rand(frames, 3, 3, 5, generator=generator) * 2 - 1
        film = torch.nn.functional.interpolate(coarse, size=(36, 60), mode="bilinear")
        save_movie(film, folder / f"{number}.mp4", scale=1)
        (folder / f"{number}.txt").write_text("a cat in the snow")


def without_times(name: str, data: bytes) -> bytes:
    """A file's bytes without what tells how long something took, or what a run found there."""
    if name not in ("generation.json", "results.json") and not name.startswith("cells/"):
        return data
    found = json.loads(data)
    for part in (found, *found.get("cells", ())):
        for timed in ("elapsed", "video_fps", "resumed_frames", "seconds"):
            part.pop(timed, None)
    return json.dumps(found, sort_keys=True).encode()


# --- disks that are full -----------------------------------------------------------------------------------------


def limited_files(source: Path, folder: Path, expected: Snapshot) -> Counter[str]:
    """Runs that may write files of up to so many bytes, from none to almost enough; then one without a limit."""
    found, output = Counter[str](), folder / "out"
    size = max(len(data) for data in expected.values())
    for share in (0.0, 0.001, 0.25, 0.75, 0.999):
        found["tried"] += 1
        arguments = [str(int(size * share)), "convert", str(source), "-o", str(output), "--init", "svd"]
        failed = subprocess.run(
            [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        said = failed.stderr.strip().splitlines()
        spoken = failed.returncode == 2 and bool(said) and "writing failed" in said[-1]
        between = output.exists()
        convert(source, output, SVD)
        if between or not spoken or snapshot(output) != expected:
            found["lost"] += 1
            print(f"LOST at a limit of {share} of the file: {failed.stderr}", file=sys.stderr)
        _delete(output)
    return found


def full_file_systems(source: Path, folder: Path, expected: Snapshot) -> Counter[str] | None:
    """The same on file systems in memory that are a little too small, made larger afterwards. None: not permitted."""
    found, disk = Counter[str](), folder / "disk"
    disk.mkdir()
    size = sum(len(data) for data in expected.values())
    for share in (0.3, 0.6, 0.9, 0.99):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * share)}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return None
        try:
            found["tried"] += 1
            # The check of free space is what a disk that fills up meanwhile would have passed.
            with suppress(OutputError), _enough_space():
                convert(source, disk / "out", SVD)
            between = (disk / "out").exists()
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
            convert(source, disk / "out", SVD)
            if between or snapshot(disk / "out") != expected:
                found["lost"] += 1
                print(f"LOST on a disk of {share} of the size", file=sys.stderr)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return found


@contextmanager
def _enough_space() -> Iterator[None]:
    check = staging.Staging.check
    try:
        staging.Staging.check = lambda *_, **__: None  # type: ignore[method-assign]
        yield
    finally:
        staging.Staging.check = check  # type: ignore[method-assign]


# --- the table ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=40, help="kills of a command, a quarter while replacing (default 40)"
    )
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mlaconvert-") as name:
        rows = measure(Path(name), arguments.kills)
    lines = ["| what was done | times | outputs lost or partial | |", "|---|---|---|---|"]
    lines += [f"| {what} | {times} | {lost} | {note} |" for what, times, lost, note in rows]
    text = "\n".join(lines)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, "kill", text)
    sys.exit(any(lost for _, _, lost, _ in rows))


def measure(folder: Path, kills: int) -> list[tuple[str, int, int, str]]:
    """Rows: what, times, lost, a note."""
    rows = []
    small = folder / "small"
    write_model(small, SMALL)
    convert(small, folder / "reference", SVD)
    expected = snapshot(folder / "reference")
    for overwrite, what in (
        (False, "an error at every operation on the disk"),
        (True, "the same while replacing a model"),
    ):
        broken = break_everything(small, folder, expected, overwrite=overwrite)
        print(f"{what}: {broken}", file=sys.stderr, flush=True)
        note = f"{broken.get('ended well', 0)} ended well all the same"
        rows.append((what, broken["tried"], broken.get("lost", 0), note))
        _delete(folder / "out")
    limited = limited_files(small, folder, expected)
    rows.append(("files may not grow beyond a limit", limited["tried"], limited["lost"], ""))
    full = full_file_systems(small, folder, expected)
    rows.append(("a full file system", *((full["tried"], full["lost"], "") if full else (0, 0, "not permitted here"))))
    if not kills:
        return rows
    runner = Runner(folder)
    for job in make_jobs(folder, kills):
        found = kill_at_random(runner, job)
        kept = f"{found.completed} completed; {found.resumed} runs went on from finished work"
        rows.append((f"SIGKILL of {job.what}", found.kills, found.lost, kept))
        job.begin()
    runner.close()
    return rows


if __name__ == "__main__":
    main()
