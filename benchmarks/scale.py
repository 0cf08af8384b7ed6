"""Memory that does not grow with a model's depth, and time beside the disk's, at real sizes. Linux only.

    python benchmarks/scale.py memory [--folder DIR] [--depths 4,8,12] [--write BENCHMARKS.md]
    python benchmarks/scale.py time [--folder DIR] [--rounds 2] [--threads 1] [--write BENCHMARKS.md]

`memory` runs analyze, a conversion of weights and a calibrated one on a file as large as Wan2.1 T2V 1.3B (float32) and
on files of a few layers of the 14B geometry (bfloat16, so that every weight has to be widened). The peak is that of
RssAnon in /proc/<pid>/status, sampled every 10 ms. Exits with 1 above the bounds.

`time` holds analyze and `convert --init svd` on the 1.3B file against what one would write without them: load all, take
float32 SVDs, save all; by turns, each from a cold file, all with the same threads. The floor is what nobody can avoid:
the file's bytes at the disk's rate, or the eigenproblems alone, by SciPy in every round, so that it does not move with
mlaconvert's own solver. Those are CPU-seconds, which hold on a busy machine too.

Weights are drawn once a shape, so layers are alike. Everything is deleted afterwards; it takes up to 25 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from real_size import PUBLISHED_CONFIG, WAN, Measurement, draw, measure, weight_bytes
from safetensors.torch import save_file
from scipy.linalg import eigh
from tables import put_between

from mlaconvert.config.geometry import WanConfig
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.files.writer import ModelWriter, TensorSpec

WIDE = WanConfig(dim=5120, num_heads=40, num_layers=1, ffn_dim=13824)
BOUNDS = {1536: 1_000_000_000, 5120: 3_000_000_000}
CLIPS = {1536: (2, 16, 3, 40, 52), 5120: (2, 16, 3, 16, 20)}  # [N, C, F, H, W]: 2 x 1,560 and 2 x 240 tokens
TARGETS = (0.5, 1.5)  # of the script's time, of the floor
RANKS = (224, 768)  # of [W_K; W_V] and of W_Q, in the scripts and for the floor
MLACONVERT = [sys.executable, "-m", "mlaconvert"]
SCRIPTS = {
    "analyze": """
import sys, torch
from safetensors.torch import load_file
state = load_file(sys.argv[2])
for i in range(int(sys.argv[1])):
    k, v = (state[f"blocks.{i}.self_attn.{name}.weight"].float() for name in "kv")
    for matrix in (k, v, torch.cat((k, v))):
        torch.linalg.svdvals(matrix)
""",
    "convert --init svd": """
import sys, torch
from safetensors.torch import load_file, save_file
state = load_file(sys.argv[2])
for i in range(int(sys.argv[1])):
    q, k, v = (state.pop(f"blocks.{i}.self_attn.{name}.weight").float() for name in "qkv")
    for name, matrix, rank in (("q", q, 768), ("kv", torch.cat((k, v)), 224)):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        state[f"blocks.{i}.self_attn.{name}_up"] = (u[:, :rank] * s[:rank]).contiguous()
        state[f"blocks.{i}.self_attn.{name}_down"] = vh[:rank].contiguous()
save_file(state, sys.argv[3])
""",
}
EIGENPROBLEMS = "import json, scale; print(json.dumps(scale.eigenproblems()))"
BARE = "import typer; app = typer.Typer(); app.command()(lambda: None); app()"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--depths", default="4,8,12", help="layers of the 14B geometry (default 4,8,12)")
    parser.add_argument(
        "--convert", type=int, default=1, metavar="N", help="of which so many are converted (default 1)"
    )
    parser.add_argument("--skip-small", action="store_true", help="leave the 1.3B file out of `memory`")
    parser.add_argument("--layers", type=int, default=30, help="layers of the file of `time` (default 30)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of `time`; the fastest counts (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process (default 1)")
    parser.add_argument("--write", type=Path, help="put the table between the markers of this file")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc/<pid>/status, which only Linux has")
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="mlaconvert-") as name:
        if arguments.what == "memory":
            depths = [int(depth) for depth in arguments.depths.split(",")]
            small = [] if arguments.skip_small else [replace(WAN, num_layers=30)]
            lines, good = memory(
                Path(name), [*small, *(replace(WIDE, num_layers=n) for n in depths)], arguments.convert
            )
        else:
            lines, good = timing(Path(name), arguments.layers, arguments.rounds)
    text = "\n".join(lines)
    print(text)
    if arguments.write is not None:
        put_between(arguments.write, arguments.what, text)
    return int(not good)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_model(folder: Path, config: WanConfig, dtype: torch.dtype) -> None:
    """A model folder in the published layout; tensors of one name and shape are the same in all layers."""
    shapes = WanFamily().expected_shapes(config)
    specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
    drawn: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    metadata = {"format": "pt"}
    with ModelWriter(folder, specs, metadata=metadata, max_shard_bytes=sum(s.nbytes for s in specs)) as writer:
        for seed, spec in enumerate(specs):
            key = (re.sub(r"^blocks\.\d+\.", "", spec.name), spec.shape)
            if key not in drawn:
                drawn[key] = draw(spec, torch.Generator().manual_seed(seed)).to(dtype)
            writer.write(spec.name, drawn[key])
        changed = {name: getattr(config, name) for name in ("dim", "num_heads", "num_layers", "ffn_dim")}
        writer.write_text(CONFIG_NAME, json.dumps(PUBLISHED_CONFIG | changed, indent=2) + "\n")
        writer.commit()


def write_clips(folder: Path, shape: tuple[int, ...], text_dim: int) -> None:
    """A new folder of random clips [N, C, F, H, W], each with a caption of eight tokens."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    latents, context = torch.randn(shape, generator=draw), torch.randn(shape[0], 8, text_dim, generator=draw)
    save_file({"latents": latents, "context": context}, folder / "clips.safetensors")


# --- memory ------------------------------------------------------------------------------------------------------


def memory(folder: Path, models: list[WanConfig], converted: int) -> tuple[list[str], bool]:
    """The table, and whether all peaks are within their bounds."""
    lines = ["| model | file | step | peak RssAnon | bound | seconds |", "|---|---|---|---|---|---|"]
    good = True
    for config in models:
        dtype = torch.float32 if config.dim == WAN.dim else torch.bfloat16
        name = f"{'1.3B' if config.dim == WAN.dim else '14B'}, {config.num_layers} layers"
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            source, output, clips = (Path(inside) / part for part in ("source", "output", "clips"))
            write_model(source, config, dtype)
            shape = CLIPS[config.dim]
            write_clips(clips, shape, config.text_dim)
            everything = config.dim == WAN.dim
            some = [] if everything else ["--layers", f"0-{converted - 1}"]
            few = ["--layers", f"0-{converted - 1}"]
            convert = [*MLACONVERT, "convert", str(source), "-o", str(output), "--json", "--overwrite"]
            size = f"{weight_bytes(source) / 1e9:.1f} GB {str(dtype).removeprefix('torch.')}"
            for step, command, layers in (
                ("analyze", [*MLACONVERT, "analyze", str(source), "--json", *some], some),
                ("convert --init svd", [*convert, "--init", "svd", *some], some),
                ("convert, calibrated", [*convert, "--data", str(clips), "--clips", str(shape[0]), *few], few),
            ):
                found = measure(step, command, BOUNDS[config.dim])
                good &= found.peak_bytes <= BOUNDS[config.dim]
                what = " ".join([step, *layers])
                lines.append(
                    f"| {name} | {size} | {what} | {found.peak_bytes / 1e9:.2f} GB | "
                    f"{BOUNDS[config.dim] / 1e9:.1f} GB | {found.seconds:.0f} |"
                )
                say(lines[-1])
    return lines, good


# --- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes a second, measured."""

    read: float
    write: float


def timing(folder: Path, layers: int, rounds: int) -> tuple[list[str], bool]:
    """The tables, and whether the targets are met."""
    source, output = folder / "source", folder / "output"
    write_model(source, replace(WAN, num_layers=layers), torch.float32)
    size, floors = weight_bytes(source), []
    ours = {
        "analyze": [*MLACONVERT, "analyze", str(source), "--json"],
        "convert --init svd": [
            *MLACONVERT,
            "convert",
            str(source),
            "-o",
            str(output / "ours"),
            "--init",
            "svd",
            "--json",
        ],
    }
    found: dict[tuple[str, str], list[Measurement]] = {}
    for _ in range(rounds):
        disk, eigen = disk_rates(source / WEIGHTS_NAME, folder), alone(EIGENPROBLEMS)
        say(f"disk: {disk.read / 1e9:.2f} GB/s read, {disk.write / 1e9:.2f} GB/s written; eigenproblems {eigen}")
        by_bytes = {
            "analyze": layers * 2 * WAN.dim**2 * 4 / disk.read,
            "convert --init svd": size / disk.read + 0.92 * size / disk.write,
        }
        floors.append({step: (by_bytes[step], layers * eigen[step]) for step in ours})
        for step, command in ours.items():
            script = [
                sys.executable,
                "-c",
                SCRIPTS[step],
                str(layers),
                str(source / WEIGHTS_NAME),
                str(output / "script.safetensors"),
            ]
            for side, each in (("ours", command), ("script", script)):
                with emptied(output):
                    forget(source / WEIGHTS_NAME)
                    one = measure(f"{step}, {side}", each, None)
                found.setdefault((step, side), []).append(one)
                say(
                    f"{step}, {side}: {one.seconds:.1f} s, {one.cpu_seconds:.1f} CPU-seconds, "
                    f"{one.peak_bytes / 1e9:.2f} GB"
                )
    lines = [
        f"| step, {layers} layers | ours, s | script, s | ours / script | of CPU-seconds | bytes alone, s | "
        "eigenproblems alone, CPU-s | ours / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    good = True
    for step in ours:
        from_disk, by_eigen = (min(each[step][kind] for each in floors) for kind in (0, 1))
        own, theirs = (min(one.seconds for one in found[step, side]) for side in ("ours", "script"))
        cpu = [min(one.cpu_seconds for one in found[step, side]) for side in ("ours", "script")]
        above = min(own / from_disk, cpu[0] / by_eigen)  # the higher floor
        good &= own <= TARGETS[0] * theirs and above <= TARGETS[1]
        lines.append(
            f"| {step} | {own:.1f} | {theirs:.1f} | {own / theirs:.2f} | {cpu[0]:.1f} / {cpu[1]:.1f} = "
            f"{cpu[0] / cpu[1]:.2f} | {from_disk:.1f} | {by_eigen:.1f} | {above:.2f} |"
        )
    help_seconds, bare = startup([*MLACONVERT, "--help"]), startup([sys.executable, "-c", BARE, "--help"])
    good &= help_seconds <= bare + 0.3
    lines += ["", f"`mlaconvert --help` takes {help_seconds:.2f} s, a bare Typer program {bare:.2f} s."]
    return lines, good


def disk_rates(file: Path, folder: Path) -> Disk:
    """From a cold file, and to a new one that is synced; a gigabyte each."""
    block, count = bytes(16 << 20), 64
    forget(file)
    began = time.monotonic()
    with file.open("rb", buffering=0) as stream:
        read = sum(len(stream.read(len(block))) for _ in range(count))
    read_rate = read / (time.monotonic() - began)
    began = time.monotonic()
    with (folder / "rate").open("wb", buffering=0) as stream:
        for _ in range(count):
            stream.write(block)
        os.fsync(stream.fileno())
    write_rate = count * len(block) / (time.monotonic() - began)
    (folder / "rate").unlink()
    return Disk(read=read_rate, write=write_rate)


def forget(file: Path) -> None:
    """Have the system drop what it remembers of a file, so that it is read from the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """An empty folder, and the disk at rest."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        Path(name).rename(folder)
        os.sync()
        yield
        folder.rename(name)


def alone(code: str) -> dict[str, float]:
    """What `code`, run in a process like those that are measured, prints as JSON."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=Path(__file__).parent
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def eigenproblems(dim: int = WAN.dim, ranks: tuple[int, int] = RANKS) -> dict[str, float]:
    """CPU-seconds of the symmetric eigenproblems of one layer, their matrices given, by the fastest of LAPACK's
    drivers in SciPy, the fastest of three tries.
    """
    rows = torch.randn(2 * dim, dim, dtype=torch.float64)
    gram = (rows.mT @ rows).numpy()

    def fastest(*ways: dict[str, Any]) -> float:
        found = []
        for way in 3 * ways:
            began = time.process_time()
            eigh(gram, check_finite=False, **way)
            found.append(time.process_time() - began)
        return min(found)

    values = fastest(*({"eigvals_only": True, "driver": driver} for driver in ("evr", "evd")))
    leading = [
        fastest({"driver": "evd"}, {"driver": "evr", "subset_by_index": [dim - rank, dim - 1]}) for rank in ranks
    ]
    return {"analyze": 3 * values, "convert --init svd": values + sum(leading)}


def startup(command: list[str]) -> float:
    """The fastest of seven starts, in seconds."""
    found = []
    for _ in range(7):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
        found.append(time.monotonic() - began)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
