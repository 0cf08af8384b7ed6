"""One kind of progress callback, one counter, and what a terminal shows of it."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mlaconvert
from mlaconvert.cli.show import print_tables, progress_bar, progress_lines
from mlaconvert.progress import Counter, silent

ROOT = Path(mlaconvert.__file__).parent
KIND = re.compile(r"Progress( \| None)?")


def other_kinds(tree: ast.Module) -> list[str]:
    """What is called progress in a module and is not of the one kind: aliases, parameters, attributes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found += [ast.unparse(target) for target in node.targets if ast.unparse(target).endswith("Progress")]
        if isinstance(node, ast.ClassDef) and node.name.endswith("Progress"):
            found.append(node.name)
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            kind = ast.unparse(node.annotation)
            if name.rpartition(".")[2] in ("progress", "_progress") and not KIND.fullmatch(kind):
                found.append(f"{name}: {kind}")
    return found


def test_there_is_one_kind_of_progress() -> None:
    found = {
        str(path.relative_to(ROOT)): kinds
        for path in ROOT.rglob("*.py")
        if path != ROOT / "progress.py" and (kinds := other_kinds(ast.parse(path.read_text())))
    }
    assert found == {}


def test_another_kind_shows() -> None:
    code = "Progress = Callable\ndef f(progress: Callable[[int], None]): pass\nclass A:\n progress: int"
    assert sorted(other_kinds(ast.parse(code))) == ["Progress", "progress: Callable[[int], None]", "progress: int"]


def test_a_counter_reports_what_it_counts() -> None:
    told: list[tuple[object, ...]] = []
    count = Counter(lambda *state: told.append(state), "hash", 70)
    assert told == []
    count.show()
    count.step(30)
    count.step(note="slow")
    assert told == [("hash", 0, 70, ""), ("hash", 30, 70, ""), ("hash", 31, 70, "slow")]
    Counter(silent, "hash", 70).step()


def counters(tree: ast.AST) -> dict[str, bool]:
    """The counters of stages that a module's functions make, and whether each reports before its first unit is done."""
    found: dict[str, bool] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        code = ast.unparse(function)
        for name in re.findall(r"(\w+) = .*?Counter\(\w*progress|(\w+) = .*?Counter\(\w+, ['\"]\w", code):
            one = name[0] or name[1]
            found[f"{function.name}: {one}"] = f"{one}.show()" in code
    return found


def test_every_stage_is_shown_before_its_first_unit_is_done() -> None:
    """A unit may be a pass of minutes, and until it is over a log would say nothing."""
    silent_ones = {
        f"{path.relative_to(ROOT)}, {counter}"
        for path in ROOT.rglob("*.py")
        for counter, shown in counters(ast.parse(path.read_text())).items()
        if not shown
    }
    assert silent_ones == set()
    assert sum(len(counters(ast.parse(path.read_text()))) for path in ROOT.rglob("*.py")) > 12
    assert counters(ast.parse("def f(progress):\n count = Counter(progress, 'a', 3)")) == {"f: count": False}


def test_a_terminal_shows_stages_with_the_time_that_is_left() -> None:
    shown = io.StringIO()
    with progress_bar(Console(file=shown, force_terminal=True, width=100)) as progress:
        for done in range(4):
            progress("generate", done, 4, "3 frames/s" if done else "")
        progress("decode", 1, 2)
        progress("decode", 0, 2)  # the next model
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"generate .* 75% \d:\d\d:\d\d 3 frames/s", lines)
    assert re.search(r"decode .* 0% ", lines)


def test_a_log_shows_the_start_of_each_stage_and_a_line_a_minute() -> None:
    said: list[str] = []
    now = [1000.0]
    report = progress_lines(said.append, lambda: now[0])
    for done in range(11):  # 20 s a unit
        report("losses", done, 10, "busy")
        now[0] += 20
    assert said == [
        "losses ...",
        "losses: 3 of 10, 30%, about 2 min left, busy",
        "losses: 6 of 10, 60%, about 80 s left, busy",
        "losses: 9 of 10, 90%, about 20 s left, busy",
    ]
    del said[:]
    report("losses", 0, 10)  # the next model
    report("rollouts", 1, 744)
    now[0] += 7000
    report("rollouts", 2, 744)
    assert said == ["losses ...", "rollouts ...", "rollouts: 2 of 744, 0%, about 1442.8 h left"]


def test_a_log_is_no_terminal() -> None:
    shown = io.StringIO()
    with progress_bar(Console(file=shown)) as progress:
        progress("generate", 1, 4)
        progress("generate", 2, 4)
    assert shown.getvalue() == "generate ...\n"


def test_tables_never_break_a_word() -> None:
    """However narrow the terminal is; nothing is cut off."""
    words = {"self-forcing-1.3b", "4,096", "-92.7%,", "13.7x", "unquestionable", "[K;V]", "at", "20"}
    for width in (10, 25, 40, 120):
        shown = io.StringIO()
        table = Table(title="one of several")
        for name in ("unquestionable", "at\n20", "\\[K;V]"):
            table.add_column(name)
        table.add_row("self-forcing-1.3b", "4,096", "-92.7%, 13.7x")
        print_tables(Console(file=shown, width=width), table)
        assert words <= set(re.findall(r"[^\s│┃┏┓┡┩┗┛└┘━─┴┳╇]+", shown.getvalue())), width
