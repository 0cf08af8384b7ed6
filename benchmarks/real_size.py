"""Memory of `analyze`, `convert` and loading, on a file as large as Wan2.1 T2V 1.3B (5.68 GB, float32). Linux only.

    python benchmarks/real_size.py [FOLDER] [--json]

Writes a random checkpoint in the published layout below FOLDER (by default the system's temporary folder), runs each
command in a process of its own, and deletes everything. It needs 12 GB of disk. Memory is the peak of RssAnon in
/proc/<pid>/status, sampled every 10 ms: file pages that are mapped, and can be dropped at any time, do not count. Exits
with 1 when analyze or convert needs 1 GB or more. `scale.py` measures calibrated conversions and the 14B geometry.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME
from mlaconvert.files.writer import ModelWriter, TensorSpec

WAN = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
PUBLISHED_CONFIG = {
    "_class_name": "WanModel",
    **{name: getattr(WAN, name) for name in ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type")},
    **{name: getattr(WAN, name) for name in ("num_heads", "num_layers", "out_dim", "text_len")},
}
LIMIT = 1_000_000_000  # bytes
INTERVAL = 0.01  # seconds
LOAD = "import sys; from mlaconvert.model import load_model; load_model(sys.argv[1])"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process: its peak of anonymous memory in bytes, how long it ran, and the CPU time of all its threads."""

    step: str
    peak_bytes: int
    limit_bytes: int | None
    seconds: float
    cpu_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc/<pid>/status, which only Linux has")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="mlaconvert-") as name:
        source, output = Path(name) / "source", Path(name) / "output"
        command = [sys.executable, "-m", "mlaconvert"]
        convert = [*command, "convert", str(source), "-o", str(output), "--json"]
        write_checkpoint(source, WAN)
        measurements = [
            measure("analyze", [*command, "analyze", str(source), "--json"], LIMIT),
            measure("convert", [*convert, "--init", "svd"], LIMIT),
            measure("load the source", [sys.executable, "-c", LOAD, str(source)], None),
            measure("load the output", [sys.executable, "-c", LOAD, str(output)], None),
        ]
        sizes = {folder.name: weight_bytes(folder) for folder in (source, output)}
    if arguments.json:
        print(json.dumps({"file_bytes": sizes, "steps": [asdict(found) for found in measurements]}, indent=2))
    else:
        show(sizes, measurements)
    return int(any(m.limit_bytes is not None and m.peak_bytes >= m.limit_bytes for m in measurements))


def write_checkpoint(folder: Path, config: WanConfig) -> None:
    """A model folder like the published one: the same tensors and config.json, with drawn weights."""
    shapes = WanFamily().expected_shapes(config)
    specs = [TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()]
    size = sum(spec.nbytes for spec in specs)
    with ModelWriter(folder, specs, metadata={"format": "pt"}, max_shard_bytes=size) as writer:
        for seed, spec in enumerate(specs):
            writer.write(spec.name, draw(spec, torch.Generator().manual_seed(seed)))
        writer.write_text(
            CONFIG_NAME, json.dumps(PUBLISHED_CONFIG | {"num_layers": config.num_layers}, indent=2) + "\n"
        )
        writer.commit()


def draw(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """Weights of a usual size: projections keep variances, gains are near one."""
    tensor = torch.empty(spec.shape).normal_(generator=generator)
    if re.search(r"norm\w*\.weight$", spec.name):
        return tensor.mul_(0.1).add_(1)
    if spec.name.endswith(".weight"):
        return tensor.mul_(prod(spec.shape[1:]) ** -0.5)
    return tensor.mul_(0.1)


def measure(step: str, command: list[str], limit: int | None) -> Measurement:
    """Run `command` and watch its memory. Exits when it fails."""
    began = time.monotonic()
    peak, before = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(INTERVAL)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{step} failed with exit code {process.returncode}:\n{errors.read()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = round(time.monotonic() - began, 1)
    return Measurement(step=step, peak_bytes=peak, limit_bytes=limit, seconds=seconds, cpu_seconds=round(cpu, 1))


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    with suppress(OSError):
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    return 0


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def show(sizes: dict[str, int], measurements: list[Measurement]) -> None:
    table = Table(title=f"Weights {sizes['source'] / 1e9:.2f} GB -> {sizes['output'] / 1e9:.2f} GB")
    table.add_column("step")
    for name in ("peak RssAnon", "bound", "seconds", "CPU seconds"):
        table.add_column(name, justify="right")
    for found in measurements:
        bound = f"{found.limit_bytes / 1e9:.2f} GB" if found.limit_bytes is not None else ""
        table.add_row(
            found.step, f"{found.peak_bytes / 1e9:.2f} GB", bound, f"{found.seconds:.1f}", f"{found.cpu_seconds:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
