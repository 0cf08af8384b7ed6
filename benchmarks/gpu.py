"""Everything that only a GPU can show, in one run of at most ten minutes; what is measured is in `gpu_steps.py`.

    python benchmarks/gpu.py [--only LIST] [--skip LIST] [--again LIST] [--limit SECONDS] [--output FILE]
                             [--self-forcing DIR] [--commit TEXT]
    python benchmarks/gpu.py --small --output /tmp/small.json      # the same code on a CPU, in about two minutes
    python benchmarks/tables.py --write BENCHMARKS.md              # what was found, as tables

Nothing is downloaded. Where mlaconvert is not installed, `PYTHONPATH=.` in the folder of the checkout is enough beside
its dependencies; compiling needs a C compiler, the published code diffusers, the tests pytest and its plugins.

Steps are ordered by worth, and each runs in a process of its own within its own limit: one that hangs or runs out of
memory ends, and the next one begins. A result is written to the file as soon as it is there, with the device, torch,
CUDA, dtype and commit that it is of, so that a run that is cut short has what it had. Started again, only steps that
the file has no end of are run (`--again` names others, or `all`). A file holds the results of one device. Exits with 1
when a step failed, was cut short, or had no time left.

1. device: how fast matrix products and attention are by themselves
2. tests: `pytest -m gpu`
3. chunks-7, chunks-21: dense against latent attention with windows of 7 and 21 latent frames, by mode
4. compiled-7: the same with compiled blocks
5. healing: one step of each stage of training, at the size of Wan2.1 T2V 1.3B
6. batches: the largest that fit
7. conversion: a calibrated conversion of a file of that size, by part
8. compiled-21
9. published: beside the published Self-Forcing code, if --self-forcing names a clone of it
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mlaconvert.files.whole import write_whole

# Steps by worth, and how many seconds each may take on a GPU. The last ones have what the others leave.
LIMITS = {
    "device": 45.0,
    "tests": 75.0,
    "chunks-7": 90.0,
    "chunks-21": 110.0,
    "compiled-7": 90.0,
    "healing": 90.0,
    "batches": 60.0,
    "conversion": 150.0,
    "compiled-21": 90.0,
    "published": 90.0,
}
WHOLE_LIMIT, LEAST = 570.0, 8.0  # seconds of a run, and with fewer left no step begins
SLOWER = 4.0  # what a busy CPU takes for the small case, relative to a GPU for the real one
RESULTS = Path(__file__).parent / "results" / "gpu.json"
STEPS_FILE = Path(__file__).with_name("gpu_steps.py")
Take = Callable[[str, dict[str, Any]], None]  # is given each result with its name


class Record:
    """The file of results: {"device": ..., "steps": {step: {"status": ..., "results": {name: {...}}}}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"steps": {}}
        if path.exists():
            try:
                self.data = json.loads(path.read_text())
                for step in self.data["steps"].values():
                    step["results"].items()
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise _wrong(f"{path} holds no results of this program ({error}); name another --output") from None
        path.parent.mkdir(parents=True, exist_ok=True)

    def done(self, step: str) -> bool:
        """Whether the step came to its end."""
        return bool(self.data["steps"].get(step, {}).get("status") == "done")

    def begin(self, step: str) -> None:
        """A step starts. Results of an earlier try stay until there are new ones of their names, or it is done."""
        self.data["steps"][step] = {"results": {}} | self.data["steps"].get(step, {}) | {"status": "begun"}
        self.new: set[str] = set()

    def put(self, step: str, name: str, result: dict[str, Any]) -> None:
        """Keep one result. Ends the program when the file is another device's."""
        mine = {key: result["on"][key] for key in ("device", "small")}
        if self.data.setdefault("device", mine) != mine:
            raise _wrong(
                f"{self.path} holds results of {self.data['device']}, these are of {mine}; name another --output"
            )
        self.data["steps"][step]["results"][name] = result
        self.new.add(name)
        self._write()

    def end(self, step: str, status: str, message: str, seconds: float) -> None:
        """How a step ended."""
        kept = self.data["steps"][step]
        kept |= {"status": status, "message": message, "seconds": round(seconds, 1)}
        if status == "done":
            kept["results"] = {name: result for name, result in kept["results"].items() if name in self.new}
        self._write()

    def _write(self) -> None:
        write_whole(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


def stop(*_: Any) -> NoReturn:
    """What to do on SIGTERM, so that a step's process is ended, too."""
    sys.exit(128 + signal.SIGTERM)


def _wrong(message: str) -> SystemExit:
    """What ends the program when it was called wrongly."""
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


def run_child(command: Sequence[str], seconds: float, take: Take) -> tuple[str, str]:
    """How a process that prints results, a line of JSON each, ended within so many seconds, and why.

    It gets a group and a temporary folder of its own, which end with it.
    """
    deadline = time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory(prefix="mlaconvert-gpu-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"TMPDIR": scratch},
            start_new_session=True,
        )
        with process as child:
            try:
                _read_results(child, deadline, take)
                code = child.wait(max(0.0, deadline - time.monotonic()))
                status = "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status, code = "cut short", 0
            finally:
                with suppress(ProcessLookupError):  # none of its group is left
                    os.killpg(child.pid, signal.SIGKILL)
        errors.seek(0)
        text = errors.read()
    if status == "done":
        return status, ""
    print("\n".join(text.splitlines()[-40:]), file=sys.stderr, flush=True)
    if status == "cut short":
        return status, f"not finished within {seconds:.0f} s"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return status, f"killed by signal {-code}" if code < 0 else last[:300] or f"exit code {code}"


def _read_results(child: subprocess.Popen[bytes], deadline: float, take: Take) -> None:
    """Hand out results until the process closes its output. Raises TimeoutExpired after the deadline."""
    assert child.stdout is not None
    left = b""
    while select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        read = os.read(child.stdout.fileno(), 1 << 16)
        if not read:
            return
        *lines, left = (left + read).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # something else that was printed
                found = json.loads(line)
                take(found["name"], found["result"])
    raise subprocess.TimeoutExpired(child.args, 0)


def run(steps: dict[str, list[str]], limits: dict[str, float], record: Record, *, whole: float, again: set[str]) -> int:
    """Run each step's command in turn; 1 when one did not come to its end."""
    deadline, code = time.monotonic() + whole, 0
    for step, command in steps.items():
        if record.done(step) and step not in again:
            print(f"{step}: in {record.path} already", file=sys.stderr, flush=True)
            continue
        began = time.monotonic()
        if deadline - began < LEAST:
            print(f"{step}: no time left", file=sys.stderr, flush=True)
            code = 1
            continue
        seconds = min(limits[step], deadline - began)
        record.begin(step)

        def take(name: str, result: dict[str, Any], step: str = step, began: float = began) -> None:
            record.put(step, name, result)
            print(f"{step}: {name}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

        # A second before its end, a process that hangs shows where.
        status, message = run_child([*command, "--seconds", f"{seconds - 1:.1f}"], seconds, take)
        spent = time.monotonic() - began
        print(f"{step}: {status} after {spent:.0f} s{message and ': '}{message}", file=sys.stderr, flush=True)
        code = code if status == "done" else 1
        if step == "device" and not record.new:
            return 1  # nothing else could run either, and nothing is known of this device
        record.end(step, status, message, spent)
    return code


def names(text: str) -> list[str]:
    """The steps of a list with commas. Raises ArgumentTypeError for one that is none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in found if name not in LIMITS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no step; there are {', '.join(LIMITS)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=names, default=list(LIMITS), metavar="LIST", help="steps to run (default all)")
    parser.add_argument("--skip", type=names, default=[], metavar="LIST", help="steps to leave out")
    parser.add_argument(
        "--again",
        type=lambda text: list(LIMITS) if text == "all" else names(text),
        default=[],
        metavar="LIST",
        help="steps to run although the file has them, or all",
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"of the whole run (default {WHOLE_LIMIT:.0f})")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="FILE", help="default benchmarks/results/gpu.json"
    )
    parser.add_argument("--small", action="store_true", help="the same code at a size for a CPU")
    parser.add_argument("--self-forcing", type=Path, metavar="DIR", help="a clone of the published code")
    parser.add_argument("--commit", metavar="TEXT", help="what to note as the commit where git does not know")
    arguments = parser.parse_args()
    if arguments.small and arguments.output == RESULTS:
        parser.error("--small measures nothing that is worth keeping there; name another --output")
    if arguments.self_forcing is None:
        arguments.skip.append("published")
    slower = SLOWER if arguments.small else 1.0
    options = ["--small"] if arguments.small else []
    options += ["--commit", arguments.commit] if arguments.commit else []
    options += ["--self-forcing", str(arguments.self_forcing.resolve())] if arguments.self_forcing else []
    chosen = [step for step in LIMITS if step in arguments.only and step not in arguments.skip]
    steps = ["device", *(step for step in chosen if step != "device")]  # it says whose results these are
    signal.signal(signal.SIGTERM, stop)
    try:
        return run(
            {step: [sys.executable, str(STEPS_FILE), step, *options] for step in steps},
            {step: slower * limit for step, limit in LIMITS.items()},
            Record(arguments.output),
            whole=slower * WHOLE_LIMIT if arguments.limit is None else arguments.limit,
            again={"device", *arguments.again},
        )
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
