"""What a device can do: its rates at plain matrix products, attention and sums, and how long work takes at them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mlaconvert.config.geometry import WanConfig
from mlaconvert.model.flops import Work
from mlaconvert.units import format_bytes, format_seconds

# Work on a CPU that takes longer than so many seconds is warned of. FLOPs that take less than that on any CPU are not
# even probed for.
LONG, SHORT = 600.0, 5e12
# FLOPs of one measurement of a probe: some tenths of a second, whatever the model's size.
_PROBE = {"cpu": 1e10, "cuda": 5e12}
# Seconds of one measurement: it is repeated for as long as the first, and not after the second.
_LEAST, _ENOUGH = 0.2, 1.5


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOPs a second of matrix products, attention and float64 products, and bytes a second of sums."""

    products: float
    attention: float
    double: float
    moved: float

    def seconds(self, work: Work) -> float:
        """How long `work` takes, one thing after the other."""
        return (
            work.products / self.products
            + work.attention / self.attention
            + work.double / self.double
            + work.moved / self.moved
        )


@torch.no_grad()
def probe(
    config: WanConfig, device: torch.device, dtype: torch.dtype, *, queries: int, keys: int, masked: bool = False
) -> Rates:
    """What `device` does with a model's own sizes in `dtype`, measured in a few seconds; threads are those in use.

    A pass of `queries` tokens that see `keys` tokens, perhaps by a mask, is cut where it would take longer.
    """
    most, dim, ffn = _PROBE.get(device.type, _PROBE["cuda"]), config.dim, config.ffn_dim
    rows = max(16, min(queries, int(most / (4 * dim * (ffn + 2 * dim)))))
    seen = max(16, min(keys, int(most / (4 * dim * min(rows, 1024)))))
    asked = max(16, min(rows, int(most / (4 * dim * seen))))
    shapes = ((rows, dim), (dim, dim), (ffn, dim), (dim, ffn), (dim,))
    x, square, up, down, scale = (torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
    hidden = F.linear(x, up)
    few = max(16, min(dim, int(most / (20 * dim**2))))  # float64 is slower
    a, b = (torch.randn(*shape, device=device, dtype=torch.float64) for shape in ((few, dim), (dim, dim)))

    def project() -> None:
        F.linear(F.linear(x, up), down)
        for _ in range(4):
            F.linear(x, square)

    def usual(work: Callable[[], object]) -> float:
        return measured_seconds(work, device, statistics.median)

    return Rates(
        products=4 * rows * dim * (ffn + 2 * dim) / usual(project),
        attention=attention_rate(config, asked, seen, device, dtype, masked=masked, pick=statistics.median),
        double=2 * few * dim**2 / usual(lambda: a @ b),
        moved=(4 * x.nbytes + 2 * hidden.nbytes)
        / usual(lambda: (F.layer_norm(x, (dim,)) * scale, F.gelu(hidden, approximate="tanh"))),
    )


def warning(
    what: str, work: Work, config: WanConfig, device: torch.device, dtype: torch.dtype, *, tokens: int
) -> str | None:
    """A line about `work` on a CPU that will take longer than `LONG`; None about any other.

    It begins with `what` the work is. The CPU is probed with the sizes of `config` and passes of `tokens` tokens,
    unless there is little to do.
    """
    if device.type != "cpu" or work.flops < SHORT:
        return None
    seconds = probe(config, device, dtype, queries=tokens, keys=tokens).seconds(work)
    if seconds < LONG:
        return None
    time_on = f"about {format_seconds(seconds)} on {device} ({work.flops:.2g} FLOPs)"
    return f"{what} will take {time_on}{slow_here(device, seconds)}"


def slow_here(device: torch.device, seconds: float) -> str:
    """What is added where a CPU takes longer than `LONG`."""
    return "; a GPU takes a small part of that (--device cuda)" if device.type == "cpu" and seconds >= LONG else ""


def does_not_fit(needed: int, device: torch.device, advice: str) -> str | None:
    """A line with `advice` where a GPU has not so many bytes free; None elsewhere."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    if needed <= free:
        return None
    return f"does not fit: about {format_bytes(needed)} are needed on {device}, {format_bytes(free)} are free; {advice}"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product: the best of five after one to warm up."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measured_seconds(lambda: a @ b, device)


def attention_rate(
    config: WanConfig,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    masked: bool = False,
    pick: Callable[[Sequence[float]], float] = min,
) -> float:
    """FLOPs a second of the fused attention kernel alone, at the dense side's shape."""
    q, k, v = (
        torch.randn(1, config.num_heads, count, config.head_dim, device=device, dtype=dtype)
        for count in (queries, keys, keys)
    )
    mask = torch.ones(queries, keys, device=device, dtype=torch.bool) if masked else None
    seconds = measured_seconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), device, pick)
    return 4 * queries * keys * config.dim / seconds


def measured_seconds(
    work: Callable[[], object], device: torch.device, pick: Callable[[Sequence[float]], float] = min
) -> float:
    """Seconds of the fastest of five runs, or another `pick` of them, after one to warm up; fewer of long ones."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _ENOUGH and (len(times) < 6 or sum(times) < _LEAST)):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return pick(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
