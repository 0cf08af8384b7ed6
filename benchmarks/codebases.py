"""What becomes of each published streaming codebase when latent attention is put into its model.

    git clone https://github.com/NVlabs/LongLive --branch v1.0
    python benchmarks/codebases.py longlive LongLive

Their causal model runs as it is, from its own files, small and with drawn weights in float32: chunks of three frames
(krea's of one, 1,560 tokens) in two passes each, until nine frames have left a window with a sink. Then a lossless
conversion of the same weights is swapped in, and every pass runs again. The error is the largest difference of an
output, in the output's standard deviation; beside it stands what a sink one frame shorter makes. From outside they get
torch's attention in place of flash-attn, and nothing for what a pass from embeddings never calls. A codebase that is
refused is shown with the reason.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from self_forcing import SIZES, SMALL, TOLERANCE, attention, commit, convert_small
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.errors import MLAConvertError
from mlaconvert.evaluation.bench.setting import random_model
from mlaconvert.integrations.streaming import swap_attention


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a codebase has its causal model, and with which window it is run; `local` -1 is one that never evicts.

    `seen` are the frames that attention sees at most, None for the whole cache.
    """

    module: str = "wan.modules.causal_model"
    packages: tuple[str, ...] = ("wan", "wan.modules")
    positions: str = "absolute"
    local: int = 7
    sink: int = 1
    seen: int | None = None
    chunk: int = 3
    size: tuple[int, int] = (6, 10)  # latent pixels
    switches: bool = False
    clip_first: bool = False
    indices: str = "tensors"


_CAUSVID = "causvid.models.wan"
CASES = {
    "self-forcing": Published(),
    "causal-forcing": Published(),
    "longlive": Published(local=9, sink=3, switches=True),
    "longlive-global": Published(local=-1, sink=3, seen=9),
    "longlive-infinity": Published(
        module="wan.modules.causal_model_infinity", positions="window", local=9, sink=3, switches=True
    ),
    "infinity-rope": Published(positions="window", local=6),
    "krea": Published(local=4, chunk=1, size=(60, 104), indices="numbers"),
    "krea-server": Published(local=-1, sink=0, chunk=1, size=(60, 104), indices="numbers", clip_first=True),
    "causvid": Published(
        module=f"{_CAUSVID}.causal_model",
        packages=("causvid", "causvid.models", _CAUSVID, f"{_CAUSVID}.wan_base", f"{_CAUSVID}.wan_base.modules"),
        local=-1,
        sink=0,
        indices="none",
    ),
    "reward-forcing": Published(local=9, sink=3),
    "rolling-forcing": Published(local=-1),
    "memflow": Published(local=9, sink=3),
    "longlive-2": Published(module="wan_5b.modules.causal_model", packages=("wan_5b", "wan_5b.modules")),
    "skyreels-v2": Published(
        module="skyreels_v2_infer.modules.transformer",
        packages=("skyreels_v2_infer", "skyreels_v2_infer.modules"),
        indices="none",
    ),
}
UNUSED = (
    "utils.memory",
    "utils.debug_option",
    "demo_utils.memory",
    "einops",
    "wan.modules.sage",
    "transformers.models.x_clip.modeling_x_clip",
)


class _Anything(ModuleType):
    """A module of which a pass calls nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return False if name.isupper() else mock.MagicMock()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("codebase", choices=CASES)
    parser.add_argument("checkout", type=Path, help="a clone of it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        with mock.patch("torch.cuda.current_device", return_value="cpu"):  # krea's asks for it wherever it runs
            found = run(CASES[arguments.codebase], arguments.checkout, getattr(torch, arguments.dtype))
    except MLAConvertError as error:
        found = {"refused": str(error)}
    print(json.dumps({"codebase": arguments.codebase, "commit": commit(arguments.checkout)} | found, indent=2))
    return 0 if found.get("error", 0) < (TOLERANCE if arguments.dtype == "float32" else 0.1) else 1


@torch.no_grad()
def run(case: Published, checkout: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The error after the swap, and what a sink that is one frame shorter would make."""
    streaming = StreamingConfig(chunk_frames=case.chunk, positions=case.positions)  # type: ignore[arg-type]
    dense = random_model(dataclasses.replace(SMALL, streaming=streaming), torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(1)
    for parameter in dense.parameters():  # large enough that every part of the model shows in its output
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=draw)
        else:
            parameter.normal_(0.5, 0.3, generator=draw)
    with redirect_stdout(StringIO()):
        model = theirs(case, checkout)
        model.load_state_dict(dense.state_dict())
        model.to(dtype)
        swapped = copy.deepcopy(model)
        with TemporaryDirectory() as folder:
            swap_attention(swapped, convert_small(dense, Path(folder))["lossless"])
        expected, found = (list(passes(case, side, dtype)) for side in (model, swapped))
        for block in model.blocks:  # type: ignore[union-attr]
            block.self_attn.sink_size = max(case.sink - 1, 0)
        other = list(passes(case, model, dtype))
    return {"passes": len(found), "error": difference(found, expected), "other_sink": difference(other, expected)}


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of any pass, in standard deviations."""
    return max(((a - b).abs().max() / b.std()).item() for a, b in zip(found, expected, strict=True))


def theirs(case: Published, checkout: Path) -> nn.Module:
    """Their model, with torch's attention kernels."""
    importlib.import_module("diffusers")  # which looks around before anything is left out
    for package in case.packages:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(checkout.joinpath(*package.split(".")))]
    sys.path.insert(0, str(checkout))
    for name in UNUSED:
        sys.modules[name] = _Anything(name)
        sys.modules[name].__path__ = []
    module = importlib.import_module(case.module)
    vars(module).update(attention=attention, flex_attention=flex_attention)
    for package in case.packages:
        if part := sys.modules.get(f"{package}.model"):
            vars(part).update(attention=attention, flash_attention=attention, FLASH_ATTN_2_AVAILABLE=True)
    sizes = {name: getattr(SMALL, name) for name in (*SIZES, "patch_size", "cross_attn_norm", "eps")}
    limits = {"local_attn_size": case.local, "sink_size": case.sink} if case.indices != "none" else {}
    made = next(getattr(module, name) for name in ("CausalWanModel", "WanModel") if hasattr(module, name))
    model: nn.Module = made(**sizes, **limits)
    return model.requires_grad_(False).eval()


def passes(case: Published, model: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    """Outputs of every pass, from drawn latents."""
    tokens, chunk = case.size[0] * case.size[1] // 4, case.chunk
    size = case.local if case.local > 0 else 8 * chunk
    for block in model.blocks:
        limit = case.seen or (case.local if case.local > 0 else size)
        if hasattr(block.self_attn, "max_attention_size"):
            block.self_attn.max_attention_size = limit * tokens
    like: dict[str, Any] = {"dtype": dtype}
    heads = (SMALL.num_heads, SMALL.head_dim)
    caches: list[dict[str, Any]] = [
        {name: torch.zeros(1, size * tokens, *heads, **like) for name in ("k", "v")} for _ in range(SMALL.num_layers)
    ]
    for cache in caches:
        for name in ("global_end_index", "local_end_index") if case.indices != "none" else ():
            cache[name] = 0 if case.indices == "numbers" else torch.tensor([0])
    draw = torch.Generator().manual_seed(2)
    context = torch.randn(2, 1, SMALL.text_len, SMALL.text_dim, generator=draw).to(dtype)

    def one(start: int, frames: int, level: float, prompt: int = 0, **more: Any) -> Tensor:
        x = torch.randn(1, SMALL.in_dim, frames, *case.size, generator=draw).to(dtype)
        text = [
            {name: torch.zeros(1, SMALL.text_len, *heads, **like) for name in ("k", "v")} | {"is_init": False}
            for _ in caches
        ]
        if case.indices == "none":
            more["current_end"] = (start + frames) * tokens
        out: Tensor = model(
            x,
            t=torch.full((1, frames), level),
            context=context[prompt],
            seq_len=frames * tokens,
            kv_cache=caches,
            crossattn_cache=text,
            current_start=start * tokens,
            **more,
        )
        return out.float()

    begin = 0
    if case.clip_first:  # as krea's server does before each chunk
        begin = 3 * chunk
        model.block_mask = model._prepare_blockwise_causal_attn_mask(
            "cpu", num_frames=begin, frame_seqlen=tokens, num_frame_per_block=chunk
        )
        yield one(0, begin, 0.0)
        model.block_mask = None
    for start in range(begin, 8 * chunk if case.local < 0 else size + 3 * chunk, chunk):
        yield one(start, chunk, 700.0)
        yield one(start, chunk, 0.0)
    if case.switches:  # the prompt changes: the window is run again, without its sink and with it
        last, most = start + chunk, size // chunk * chunk
        yield one(last - most, most, 0.0, 1)
        yield one(last, chunk, 700.0, 1)
        yield one(last, chunk, 0.0, 1)
        yield one(last + chunk - most, most, 0.0, 0, sink_recache_after_switch=True)
        yield one(last + chunk, chunk, 700.0)


if __name__ == "__main__":
    sys.exit(main())
