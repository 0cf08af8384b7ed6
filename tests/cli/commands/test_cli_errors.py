"""The command line: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from command_line import invoke
from typer.main import get_command

from mlaconvert.cli import app
from mlaconvert.cli.help import KEPT
from mlaconvert.errors import MLAConvertError
from mlaconvert.files.shipped import recipe_folder
from mlaconvert.model.load import load_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["analyze", "bench"])
def test_a_gpu_is_used_where_there_is_one(golden: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = invoke(command, golden)
    assert result.exit_code == 2
    assert "device 'cuda' is not there" in result.stderr.replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "words", [("analyze", "tiny"), ("generate", "tiny"), ("bench", "tiny"), ("evaluate", "{golden}")]
)
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_not_advised(golden: Path, words: tuple[str, str], name: str) -> None:
    result = invoke(words[0], words[1].format(golden=golden), "--device", name)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"device '{name}' is not there: this torch" in message
    assert "give cpu, or auto for a GPU where there is one" in message


def test_heal_takes_the_device_as_other_commands_do(golden: Path, tmp_path: Path) -> None:
    given = ("heal", golden, "-o", tmp_path / "out", "--stage", "distill", "--device")
    assert "device 'abacus' is none that torch knows" in invoke(*given, "abacus").stderr
    assert "--cpu and --device cuda are two devices" in invoke(*given, "cuda", "--cpu").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{golden}", "-o", "{out}", "--kv-rank", "97"], "error: kv_rank is 97"),
        (["convert", "{golden}", "-o", "{out}", "--q-rank", "some"], "error: options: q_rank is 'some'"),
        (
            ["convert", "{golden}", "-o", "{out}", "--init", "magic"],
            "error: options: init is 'magic': give svd",
        ),
        (["convert", "{golden}", "-o", "{out}", "--recipe", "none.yaml"], "error: none.yaml: no such recipe"),
        (["convert", "{golden}", "-o", "{out}", "--layers", "7"], "layer 7 does not exist"),
        (
            ["convert", "{golden}", "-o", "{out}", "--device", "abacus"],
            "error: device 'abacus' is none that torch knows",
        ),
        (
            ["heal", "tiny", "-o", "{out}"],
            "tiny is not converted; run `mlaconvert convert tiny -o DIR`, then `mlaconvert",
        ),
        (["heal", "tiny", "-o", "{out}", "--stage", "distill"], "tiny is not converted; run `mlaconvert convert tiny"),
        (
            ["evaluate", "tiny"],
            "tiny is not converted; run `mlaconvert convert tiny -o DIR`, then `mlaconvert evaluate",
        ),
        (["convert", "tiny", "-o", "{out}", "--recipe", "tiny-dmd"], "tiny-dmd is a recipe of `mlaconvert heal`"),
        (
            ["convert", "tiny", "-o", "{out}", "--recipe", "{recipes}/heal/tiny-dmd.yaml"],
            "is a recipe of `mlaconvert heal`",
        ),
        (
            ["heal", "{golden}", "-o", "{out}", "--recipe", "tiny"],
            "tiny is a recipe of `mlaconvert convert`, not of heal",
        ),
        (["sweep", "tiny", "-o", "{out}", "--recipe", "{recipes}/tiny.yaml"], "is a recipe of `mlaconvert convert`"),
        (["recipes", "show", "nonsense"], "no recipe 'nonsense' ships; `mlaconvert recipes list` shows those that do"),
        (["convert", "{out}", "-o", "{out}2"], "there is no such file or folder"),
        (["convert", "{golden}", "-o", "{out}/a/b"], "does not exist; create it first"),
        (["convert", "{golden}"], "give one with -o DIR"),
        (["demo", "-o", "{golden}/config.json"], "cannot be made a folder"),
        (["convert", "{golden}", "-o", "{out}", "--kv-rank", "many"], "'--kv-rank': give a whole number"),
        (["bench", "tiny", "--batch", "1.5"], "'--batch': give a whole number"),
        (["analyze", "tiny", "--threshold", "most"], "'--threshold': give a number"),
        (["convert", "{golden}", "-o", "{out}", "--no-such-option"], "No such option"),
        (["analyze", "{golden}", "--threshold", "2"], "error: "),
        (["analyze", "{golden}", "--height", "481"], "error: height is 481"),
        (["analyze", "{golden}", "--layers", "x"], "error: layers is 'x'"),
        (["analyze", "{golden}", "--subfolder", "x"], "error: "),
        (["analyze", "{golden}", "--revision", "main"], "error: "),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_two(
    golden: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"golden": golden, "out": tmp_path / "out", "recipes": recipe_folder()}
    result = invoke(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "should be" not in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (MLAConvertError("it broke"), 1, "error: it broke"),
        (ZeroDivisionError("by zero\nmore"), 1, "error: unexpected ZeroDivisionError: by zero (--debug shows where)"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted: no layer is kept; the same command begins again; an output that is there is whole",
        ),
    ],
)
def test_exceptions_become_one_line(
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("mlaconvert.conversion.from_weights.convert_layer", fail)
    result = invoke("convert", golden, "-o", tmp_path / "out", "--init", "svd")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == message
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = invoke("--debug", "convert", golden, "-o", tmp_path / "out", "--init", "svd")
    assert result.exit_code == code
    assert ("Traceback" in result.stderr) == (code != 130)


@pytest.mark.slow
def test_a_killed_process_cleans_up(golden: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of the first layer, while the output is half written."""
    code = (
        "import os, sys, time, mlaconvert.conversion.from_weights as c, mlaconvert.cli as cli\n"
        # One write for each of the layers that are converted side by side: their lines do not mix.
        "c.convert_layer = lambda *a: (os.write(1, b'ready\\n'), time.sleep(5))\n"
        f"sys.argv = ['mlaconvert', 'convert', {str(golden)!r}, '-o', {str(tmp_path / 'out')!r}, '--init', 'svd']\n"
        "cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert (tmp_path / ".out.partial").is_dir()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_module_runs(tmp_path: Path) -> None:
    """`python -m mlaconvert`, quiet on stdout about errors."""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "mlaconvert", "--help"], capture_output=True, text=True, check=True, env=environment
    )
    assert "Usage: " in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "mlaconvert", "analyze", str(tmp_path / "none")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


CUT = re.compile(r"error: stdout cannot be written to \((.+)\), so what it got is cut off; files .* stay")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def run(
    *arguments: object, stdout: Any = None, buffered: bool = True, shell: str = 'exec "$@"'
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a stdout as Python has it by default, or unbuffered as in images."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "mlaconvert", *map(str, arguments)]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=300
    )


@needs_full
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["convert", "--help"]])
def test_a_full_disk_under_stdout_is_one_line_and_exit_code_one(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert CUT.fullmatch(done.stderr.strip()), done.stderr


@needs_full
@pytest.mark.parametrize("flags", [["--json"], pytest.param([], marks=pytest.mark.slow)])
def test_finished_work_outlives_a_full_stdout(golden: Path, tmp_path: Path, flags: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run("convert", golden, "-o", tmp_path / "out", "--init", "svd", *flags, stdout=full)
    assert done.returncode == 1
    assert CUT.fullmatch(done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert len(list(load_model(tmp_path / "out").parameters())) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
def test_a_disk_that_takes_only_a_part(golden: Path, tmp_path: Path, buffered: bool) -> None:
    """A file that may not grow takes the beginning of the one write, which is no error yet."""
    path = tmp_path / "out.json"
    with path.open("w") as file:
        done = run("analyze", golden, "--json", stdout=file, buffered=buffered, shell='ulimit -f 1; exec "$@"')
    assert path.stat().st_size in (512, 1024)  # a block, as the shell counts them
    assert done.returncode == 1
    assert CUT.fullmatch(done.stderr.splitlines()[-1])


@needs_full
def test_what_is_left_for_the_end_is_not_lost_in_silence() -> None:
    code = "import sys; from mlaconvert.cli.stdout import checked_stdout\nwith checked_stdout(): sys.stdout.write('x')"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert CUT.fullmatch(done.stderr.strip())


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    [
        (["--help"], True),
        (["--help"], False),
        (["analyze", "{golden}", "--json"], True),
        pytest.param(["analyze", "{golden}", "--json"], False, marks=pytest.mark.slow),
        pytest.param(["analyze", "{golden}"], True, marks=pytest.mark.slow),
        pytest.param(["analyze", "{golden}"], False, marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(
    golden: Path, arguments: list[str], buffered: bool
) -> None:
    """As `head` does to `cat`, which SIGPIPE ends without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*(part.format(golden=golden) for part in arguments), stdout=writer, buffered=buffered)
    finally:
        os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stdout_that_is_closed() -> None:
    """And the next file that is opened does not become stdout."""
    done = run("--version", shell='exec "$@" >&-')
    assert done.returncode == 1
    found = CUT.fullmatch(done.stderr.strip())
    assert found
    assert found[1] == "Bad file descriptor"


@pytest.mark.parametrize("command", sorted(KEPT))
def test_an_interrupted_command_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Whatever the run itself has not said; what it says goes first."""
    root = get_command(app)
    for said, shown in ((), KEPT[command]), (("3 layers are kept",), "3 layers are kept"):

        def interrupt(*_: object, said: tuple[str, ...] = said, **__: object) -> None:
            raise KeyboardInterrupt(*said)

        monkeypatch.setattr(command_line._ROOT.commands[command], "invoke", interrupt)
        needed = {
            "encode": ("video", "-o", "x"),
            "push": ("x", "a/b"),
            "demo": (),
            "bench": (),
            "sweep": ("x", "-o", "y"),
        }
        result = invoke(command, *needed.get(command, ("x",)))
        assert result.exit_code == 130
        assert result.stderr == f"interrupted: {shown}\n"
    assert set(KEPT) == set(root.commands) - {"recipes"}  # type: ignore[attr-defined]
