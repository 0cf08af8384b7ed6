"""What benchmarks measured, as tables in a page, between the two markers of each.

    python benchmarks/tables.py [FILE] [--write BENCHMARKS.md]     # of what gpu.py found

FILE is by default benchmarks/results/gpu.json; what it does not have is said to be not measured yet.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlaconvert.units import format_bytes

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MISSING = "Not measured yet, for want of a GPU."
Steps = Mapping[str, Mapping[str, Any]]  # by name, each with its status and results


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- name -->` and `<!-- end of name -->`; ends the program without."""
    old = page.read_text()
    marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not marked.search(old):
        sys.exit(f"{page} has no lines <!-- {name} --> and <!-- end of {name} -->")
    page.write_text(marked.sub(lambda _: f"{text}\n", old))


def step_table(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """A row for each step of healing, of the fields of `healing.RealStep`."""
    lines = [
        "| stage | tokens | FLOPs | s a step | tokens/s | peak memory | of bf16 peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        share = "-" if step["of_peak"] is None else f"{step['of_peak']:.0%}"
        lines.append(
            f"| {step['stage']} | {step['tokens']:,} | {step['flops']:.3g} | {step['seconds']:.2f} | "
            f"{step['tokens'] / step['seconds']:,.0f} | {_size(step['peak_bytes'])} | {share} |"
        )
    return lines


# --- what gpu.py found ----------------------------------------------------------------------------------------------


def gpu_tables(data: Mapping[str, Any]) -> dict[str, str]:
    """The text of each marker, from a file of results."""
    steps: Steps = data.get("steps", {})
    makers: dict[str, tuple[Callable[[Steps], list[str]], tuple[str, ...]]] = {
        "tests": (_tests, ("tests",)),
        "chunks": (_chunks, ("device", "chunks-7", "chunks-21", "compiled-7", "compiled-21")),
        "batches": (_batches, ("batches",)),
        "healing": (lambda steps: step_table(_results(steps, "healing").values()), ("healing",)),
        "conversion": (_conversion, ("conversion",)),
        "published": (_published, ("published",)),
    }
    found = {}
    for name, (make, sources) in makers.items():
        there = any(_results(steps, step) for step in sources if step != "device")
        lines = [*_where(steps, sources), "", *make(steps)] if there else [MISSING]
        found[f"gpu: {name}"] = "\n".join(lines)
    return found


def _results(steps: Steps, step: str) -> Mapping[str, Mapping[str, Any]]:
    results: Mapping[str, Mapping[str, Any]] = steps.get(step, {}).get("results", {})
    return results


def _where(steps: Steps, sources: Iterable[str]) -> list[str]:
    """A line for each device, version and commit that results are of, and one for each step without an end."""
    lines = []
    for step in sources:
        for result in _results(steps, step).values():
            on = result["on"]
            cuda = f", CUDA {on['cuda']}" if on["cuda"] else ""
            commit = on["commit"] or "unknown"
            short = commit[:10] + "+" * commit[10:].endswith("+")
            lines.append(f"{on['device']}, torch {on['torch']}{cuda}, {on['dtype']}, commit {short}.")
    for step in sources:
        if _results(steps, step) and steps[step].get("status") != "done":
            lines.append(f"`{step}` did not come to its end: {steps[step].get('message') or 'cut short'}.")
    return list(dict.fromkeys(lines))


def _tests(steps: Steps) -> list[str]:
    found = _results(steps, "tests")["tests"]
    bad, skipped = found["failures"] + found["errors"], found["skipped"]
    lines = [f"`pytest -m gpu`: {found['tests'] - bad - skipped} passed, {bad} failed, {skipped} skipped."]
    return lines + [f"- {name}" for name in found["failed"]]


def _chunks(steps: Steps) -> list[str]:
    lines = [
        "| window | side | attention | chunk | first chunk | dense / own | lowest to highest | compiled: chunk "
        "| dense / own | FLOPs, dense = 1 | cache | peak memory |",
        "|---" * 12 + "|",
    ]
    for window in (7, 21):
        eager, compiled = (_results(steps, f"{kind}-{window}") for kind in ("chunks", "compiled"))
        dense = eager.get("dense, dense") or compiled.get("dense, dense")
        for name in dict.fromkeys((*eager, *compiled)):
            found, other = eager.get(name, {}), compiled.get(name, {})
            base = found or other
            side, _, mode = name.rpartition(", ")
            mode = f"{mode}: {base['mode']}" if mode == "auto" else mode
            cells = [
                str(window),
                side,
                "" if side == "dense" else mode,
                _ms(found.get("chunk")),
                _ms(found.get("first_chunk")),
                *_ratio(found),
                _ms(other.get("chunk")),
                _ratio(other)[0],
                f"{base['flops'] / dense['flops']:.2f}" if dense else "-",
                _size(base["cache_bytes"]),
                _size(base["peak_bytes"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    profiles = {name: found["profile"] for name, found in _results(steps, "chunks-7").items() if "profile" in found}
    if profiles:
        parts = next(iter(profiles.values()))
        lines += ["", f"| window 7, ms a chunk | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
        lines += [
            f"| {name} | {' | '.join(f'{1e3 * s:.1f}' for s in each.values())} |" for name, each in profiles.items()
        ]
    rates = _results(steps, "device").get("device", {})
    if "attention_rate" in rates:
        lines += [
            "",
            f"By themselves, matrix products run at {rates['matmul_rate'] / 1e12:.3g} TFLOP/s and attention at "
            f"{rates['attention_rate'] / 1e12:.3g}.",
        ]
    return lines


def _batches(steps: Steps) -> list[str]:
    found: dict[tuple[int, str], dict[str, int]] = {}
    for each in _results(steps, "batches").values():
        found.setdefault((each["window"], each["side"]), {})[each["way"]] = each["batch"]
    ways = ("video by video", "one pass")
    lines = [f"| window | side | {' | '.join(ways)} |", "|---|---|---|---|"]
    for (window, side), batches in found.items():
        lines.append(f"| {window} | {side} | {' | '.join(str(batches.get(way, '-')) for way in ways)} |")
    return lines


def _conversion(steps: Steps) -> list[str]:
    found = _results(steps, "conversion")
    lines = ["| stage | done | seconds | peak memory |", "|---|---|---|---|"]
    for name, stage in found.get("so far", {}).get("stages", {}).items():
        done = f"{stage['done']:,} of {stage['total']:,}"
        lines.append(f"| {name} | {done} | {stage['seconds']:.1f} | {_size(stage['peak_bytes'])} |")
    if whole := found.get("conversion"):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in whole["parts"].items())
        lines += [
            "",
            f"{whole['layers']} layers in {whole['seconds']:.1f} s, with {whole['refit_steps']} steps that refit the "
            f"model; peak memory {_size(whole['peak_bytes'])}. Seconds by part, some side by side: {parts}.",
        ]
    return lines


def _published(steps: Steps) -> list[str]:
    lines = ["| window | side | chunk | published / own | lowest to highest |", "|---|---|---|---|---|"]
    for found in _results(steps, "published").values():
        if "side" in found:  # not the check
            cells = (str(found["window"]), found["side"], _ms(found["chunk"]), *_ratio(found))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(found: Mapping[str, Any]) -> tuple[str, str]:
    """The median of ratios, and the lowest and highest."""
    if "speedup" not in found:
        return "-", "-"
    low, high = found["speedup_spread"]
    return f"{found['speedup']:.2f}", f"{low:.2f} to {high:.2f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"


def _size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="default benchmarks/results/gpu.json")
    parser.add_argument("--write", type=Path, help="put each table between its markers in this file")
    arguments = parser.parse_args()
    data = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    if arguments.write is not None and data.get("device", {}).get("small"):
        parser.error(f"{arguments.results} is of a small case, which says nothing about a GPU")
    for name, text in gpu_tables(data).items():
        print(f"{name}\n\n{text}\n")
        if arguments.write is not None:
            put_between(arguments.write, name, text)


if __name__ == "__main__":
    main()
