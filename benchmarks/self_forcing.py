"""Frames a second beside the published Self-Forcing code: the same geometry, window, steps and attention kernel.

    git clone https://github.com/guandeh17/Self-Forcing
    python benchmarks/self_forcing.py Self-Forcing --device cuda --nope-dim 96,32 --v-dim 128,64
    python benchmarks/self_forcing.py Self-Forcing --check       # only whether both compute the same, at small size

The published pipeline runs as it is, from its own files: its causal model, its cache that is moved as it overflows, its
sampler with the clean pass. From outside it gets random weights in place of a checkpoint, the geometry where it has the
numbers of Wan2.1 1.3B, a given embedding and latents in place of the text encoder and the VAE (measured on no side),
and our call of torch's fused attention in place of its own, so that every side runs the same kernel. Ours are the sides
of `mlaconvert bench`. Chunks are timed in turn in one run, with a full window. A ratio is the median over chunks of the
published code's time / ours.

Every run begins with the check: our dense model and theirs, small, in float32, from the same weights and noise, for the
chunks that fit into the window and, with absolute positions on our side too, for more that push frames out of it. That
is the one difference: the published code counts frames from the start of the video, ours by default within the window.
Then latent attention is put into their model (`mlaconvert.integrations.streaming`): converted without loss it must give
what they gave, and with 92.7% less cache what our own rollout of the converted model gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from mlaconvert.cli.show import progress_bar
from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import SHIFT, StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe, Init
from mlaconvert.conversion.run import convert
from mlaconvert.errors import ConfigError, InputError, MLAConvertError
from mlaconvert.evaluation.bench.setting import BenchSetting, base_geometry, random_model, side_configs
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.generation.request import Runtime
from mlaconvert.integrations.streaming import swap_attention
from mlaconvert.model.attention.kernel import attend
from mlaconvert.model.load import load_model
from mlaconvert.model.memory import StreamedVideo, plan_memory
from mlaconvert.model.rollout import CacheUse, LatentSize, chunk_noise, rollout
from mlaconvert.model.schedule import Sampler
from mlaconvert.model.wan import WanModel

URL = "https://github.com/guandeh17/Self-Forcing"
THEIRS = "published Self-Forcing"
# Entered without their __init__.py, which import trainers, CLIP and more.
PACKAGES = ("wan", "wan.modules", "pipeline", "utils")
FILES = ("wan/modules/causal_model.py", "pipeline/causal_inference.py", "utils/wan_wrapper.py", "utils/scheduler.py")
# Names that those files import and that a rollout from given embeddings to latents never calls.
UNUSED = {
    "wan.modules.t5": ("umt5_xxl",),
    "wan.modules.tokenizers": ("HuggingfaceTokenizer",),
    "wan.modules.vae": ("_video_vae",),
    "demo_utils.memory": (
        "gpu",
        "get_cuda_free_memory_gb",
        "DynamicSwapInstaller",
        "move_model_to_device_with_memory_preservation",
    ),
}
SIZES = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim", "num_heads", "num_layers")
# For the check: no two sizes alike.
SMALL = WanConfig(
    dim=60, num_heads=3, num_layers=4, ffn_dim=110, in_dim=5, out_dim=5, freq_dim=14, text_dim=17, text_len=13
)
SMALL_LATENTS = (6, 10)
SMALL_BATCH = 2
SMALL_CHUNKS = 5
TOLERANCE = 1e-4  # of the standard deviation of the latents


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all sides share; `size` is in latent pixels, `timesteps` are those before the warp."""

    config: WanConfig
    streaming: StreamingConfig
    size: tuple[int, int]
    batch: int
    timesteps: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.config.tokens_per_frame(*self.size)

    def ours(self, model: WanModel, context: Tensor, frames: int) -> Iterator[Tensor]:
        """Chunks of our rollout, [B, C, f, H, W]."""
        return rollout(
            model,
            context,
            size=LatentSize(frames=frames, height=self.size[0], width=self.size[1]),
            cache=CacheUse(streaming=self.streaming),
            sampler=Sampler.few_step(self.timesteps),
        )


@dataclass(frozen=True, kw_only=True)
class Code:
    """The published classes."""

    model: Any
    wrapper: Any
    pipeline: Any


@dataclass(frozen=True, kw_only=True)
class Check:
    """Largest differences of latents, in their standard deviations; `without_past` is what not seeing the past does.

    `swapped_lossless` is their pipeline with our attention against itself, `swapped` with the smaller cache against our
    rollout, and `swapped_cache` that cache's bytes relative to theirs.
    """

    within_window: float
    beyond_window: float
    without_past: float
    swapped_lossless: float
    swapped: float
    swapped_cache: float

    @property
    def passed(self) -> bool:
        same = (self.within_window, self.beyond_window, self.swapped_lossless, self.swapped)
        return max(same) < TOLERANCE < 0.01 * self.without_past


@dataclass(frozen=True, kw_only=True)
class Side:
    """Seconds of a chunk with a full window (median, lowest and highest), and the published code's time / its own."""

    name: str
    frames_per_second: float
    chunk: float
    chunk_spread: tuple[float, float]
    ratio: float


class Published:
    """The published pipeline with the weights of our dense model."""

    def __init__(self, code: Code, dense: WanModel, case: Case) -> None:
        self.case, config, window = case, case.config, case.streaming
        sizes = {name: getattr(config, name) for name in (*SIZES, "patch_size", "cross_attn_norm", "eps")}
        limits = {"local_attn_size": window.window_frames, "sink_size": window.sink_frames}
        default = torch.get_default_dtype()
        torch.set_default_dtype(case.dtype)  # float32 weights of 14B would not fit beside the other sides
        try:
            with case.device:
                model = code.model(**sizes, **limits)
        finally:
            torch.set_default_dtype(default)
        model.load_state_dict(dense.state_dict())
        model.requires_grad_(False).eval()
        for block in model.blocks:  # 1,560 tokens a frame are written into it
            block.self_attn.max_attention_size = window.window_frames * case.tokens
        with mock.patch.object(code.model, "from_pretrained", return_value=model):
            generator = code.wrapper(timestep_shift=SHIFT, is_causal=True, **limits)
        generator.seq_len = window.chunk_frames * case.tokens
        generator.register_forward_pre_hook(self._before_pass)
        arguments = SimpleNamespace(
            denoising_step_list=list(case.timesteps),
            warp_denoising_step=True,
            num_frame_per_block=window.chunk_frames,
            independent_first_frame=False,
            context_noise=0,
        )
        with redirect_stdout(StringIO()):
            self.pipeline = code.pipeline(
                arguments, case.device, generator=generator, text_encoder=self._encode, vae=SimpleNamespace()
            )
        self.model = model
        self.pipeline.vae.decode_to_pixel = self._decode
        self.pipeline.num_transformer_blocks = config.num_layers
        self.pipeline.frame_seq_length = case.tokens
        self.pipeline._initialize_kv_cache(case.batch, case.dtype, case.device)
        self.pipeline._initialize_crossattn_cache(case.batch, case.dtype, case.device)
        for layer in (*self.pipeline.kv_cache1, *self.pipeline.crossattn_cache):  # made for 12 heads of 128
            for name in ("k", "v"):
                layer[name] = layer[name].new_zeros(*layer[name].shape[:2], config.num_heads, config.head_dim)

    def swap(self, folder: Path) -> None:
        """Latent attention in place of theirs, and their cache made anew."""
        swap_attention(self.pipeline, folder)
        self.pipeline._initialize_kv_cache(self.case.batch, self.case.dtype, self.case.device)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of all layers, whatever they are."""
        return sum(layer[name].nbytes for layer in self.pipeline.kv_cache1 for name in ("k", "v"))

    @torch.no_grad()
    def rollout(self, context: Tensor, noise: Tensor, turn: Callable[[], None]) -> Tensor:
        """Latents of `noise` [B, C, F, H, W]; `turn` is called before each chunk and after the last one."""
        longest = self.model.freqs.shape[0]
        if noise.shape[2] > longest:
            raise ConfigError(
                f"the published code counts to {longest} frames, not {noise.shape[2]}; give fewer --rounds"
            )
        self.context, self.turn, self.passes = context, turn, 0
        with redirect_stdout(StringIO()):
            prompts = [""] * self.case.batch
            _, latents = self.pipeline.inference(noise.transpose(1, 2), prompts, return_latents=True)
        return latents.transpose(1, 2)

    def _before_pass(self, *_: Any) -> None:
        if self.passes % (len(self.case.timesteps) + 1) == 0:
            self.turn()
        self.passes += 1

    def _encode(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.context}

    def _decode(self, latents: Tensor, use_cache: bool) -> Tensor:
        self.turn()
        return latents


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help=f"a clone of {URL}")
    parser.add_argument("--check", action="store_true", help="only compare what both compute, at small size")
    parser.add_argument("--geometry", default="1.3b", help="1.3b, 14b, tiny or a checkpoint (default 1.3b)")
    parser.add_argument("--height", type=int, help="video height in pixels (default 480; tiny: 24)")
    parser.add_argument("--width", type=int, help="video width in pixels (default 832; tiny: 32)")
    parser.add_argument("--window-frames", type=int, help="latent frames that a query sees (default 7)")
    parser.add_argument("--sink-frames", type=int, help="first latent frames, kept for good (default 1)")
    parser.add_argument("--chunk-frames", type=int, help="latent frames made at a time (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="passes of a chunk before the clean one (default 4)")
    parser.add_argument("--batch", type=int, default=1, help="videos at once (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="chunks of each side that are timed (default 10)")
    parser.add_argument("--nope-dim", type=widths, default=(), help="unrotated score channels of a head, one side each")
    parser.add_argument("--v-dim", type=widths, default=(), help="value channels of a head, for each of --nope-dim")
    parser.add_argument(
        "--compile",
        choices=("none", "ours", "both"),
        default="none",
        help="torch.compile on our sides, or on theirs too, as their demo does it (default none)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if len(arguments.nope_dim) != len(arguments.v_dim):
        parser.error("give --nope-dim and --v-dim as many widths each")
    try:
        return run(arguments)
    except MLAConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Check, then measure, then print."""
    device = usable_device(arguments.device)
    code = published_code(arguments.checkout)
    checked = check(code, device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "torch_version": torch.__version__,
        "published_commit": commit(arguments.checkout),
        "check": dataclasses.asdict(checked),
    }
    if not checked.passed:
        raise MLAConvertError(f"the two sides do not compute the same, so no ratio is fair: {checked}")
    if not arguments.check:
        report |= measure(code, device, arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def published_code(checkout: Path) -> Code:
    """The classes of a checkout, with our attention kernel. Raises InputError for what is missing."""
    missing = [name for name in FILES if not (checkout / name).is_file()]
    if missing:
        raise InputError(f"{checkout} has no {missing[0]}; git clone {URL} and give its folder")
    if importlib.util.find_spec("diffusers") is None:
        raise InputError("the published model is built on diffusers, which is not installed; pip install diffusers")
    for package in PACKAGES:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(checkout.joinpath(*package.split(".")))]
    unused = UNUSED if importlib.util.find_spec("einops") else {**UNUSED, "einops": ("repeat",)}
    for module, names in unused.items():
        sys.modules[module] = ModuleType(module)
        vars(sys.modules[module]).update(dict.fromkeys(names))
    try:
        model = importlib.import_module("wan.modules.causal_model")
        wrapper = importlib.import_module("utils.wan_wrapper")
        pipeline = importlib.import_module("pipeline.causal_inference")
    except (ImportError, AttributeError) as error:
        raise InputError(f"the published code in {checkout} cannot be imported: {error}") from None
    vars(model)["attention"] = vars(sys.modules["wan.modules.model"])["flash_attention"] = attention
    return Code(
        model=model.CausalWanModel, wrapper=wrapper.WanDiffusionWrapper, pipeline=pipeline.CausalInferencePipeline
    )


def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: None = None) -> Tensor:
    """What both sides call: [B, N, H, D] and [B, M, H, D] -> [B, N, H, D]. Nothing in a rollout is masked."""
    return attend(q, k, v, None)


def check(code: Code, device: torch.device) -> Check:
    """Both dense models from the same small weights, embedding and noise, in float32."""
    streaming = StreamingConfig(positions="absolute")
    case = Case(
        config=dataclasses.replace(SMALL, streaming=streaming),
        streaming=streaming,
        size=SMALL_LATENTS,
        batch=SMALL_BATCH,
        timesteps=(1000, 750, 500, 250),
        device=device,
        dtype=torch.float32,
    )
    dense = random_model(case.config, device, case.dtype)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in dense.parameters():  # large enough that every part of the model shows in its output
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(0.5, 0.3, generator=generator)
    shape = (SMALL_BATCH, SMALL.text_len - 2, SMALL.text_dim)
    context = torch.randn(shape, generator=generator, device=device)
    chunk, frames = streaming.chunk_frames, streaming.chunk_frames * SMALL_CHUNKS
    noise, fresh = [], []
    for start in range(0, frames, chunk):
        draws = chunk_noise(range(SMALL_BATCH), start, (SMALL.out_dim, chunk, *SMALL_LATENTS), len(case.timesteps))
        noise.append(draws[0].to(device))
        fresh += [draw.to(device) for draw in draws[1:]]

    def published(side: Published) -> Tensor:
        later = iter(fresh)
        # Theirs draws its later noises itself, frame by frame; it convolves where we multiply, which TF32 would blur.
        with (
            mock.patch("torch.randn_like", lambda like: next(later).transpose(1, 2).flatten(0, 1).to(like)),
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            return side.rollout(context, torch.cat(noise, 2), lambda: None)

    def ours(model: WanModel, streaming: StreamingConfig, count: int = SMALL_CHUNKS) -> Tensor:
        return torch.cat(list(dataclasses.replace(case, streaming=streaming).ours(model, context, count * chunk)), 2)

    def difference(found: Tensor, expected: Tensor) -> float:
        expected = expected[:, :, : found.shape[2]]
        return ((found - expected).abs().max() / expected.std()).item()

    original = Published(code, dense, case)
    theirs = published(original)
    with TemporaryDirectory() as folder:
        converted = convert_small(dense, Path(folder))
        sides = {name: Published(code, dense, case) for name in converted}
        for name, side in sides.items():
            side.swap(converted[name])
        swapped = {name: published(side) for name, side in sides.items()}
        latent = ours(load_model(converted["svd"], device=device), streaming)
    return Check(
        within_window=difference(ours(dense, StreamingConfig(), streaming.window_frames // chunk), theirs),
        beyond_window=difference(ours(dense, streaming), theirs),
        without_past=difference(ours(dense, StreamingConfig(window_frames=chunk, sink_frames=0)), theirs),
        swapped_lossless=difference(swapped["lossless"], theirs),
        swapped=difference(swapped["svd"], latent),
        swapped_cache=sides["svd"].cache_bytes / original.cache_bytes,
    )


def convert_small(dense: WanModel, folder: Path) -> dict[str, Path]:
    """Conversions of a small model, by what they are made from."""
    source = folder / "dense"
    source.mkdir()
    streaming = dense.config.streaming
    assert streaming is not None
    save_file({name: tensor.cpu() for name, tensor in dense.state_dict().items()}, source / WEIGHTS_NAME)
    raw = WanFamily().raw_config(dense.config) | {"streaming": dataclasses.asdict(streaming)}
    (source / CONFIG_NAME).write_text(json.dumps(raw))
    inits: tuple[Init, ...] = ("lossless", "svd")
    for init in inits:
        convert(source, folder / init, ConvertRecipe(init=init))
    return {init: folder / init for init in inits}


def measure(code: Code, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Chunks of every side in turn. Raises ConfigError and InputError for a setting that is impossible."""
    names = ("window_frames", "sink_frames", "chunk_frames")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    streaming = dataclasses.replace(base_geometry(arguments.geometry).streaming or StreamingConfig(), **given)
    runtime = Runtime.of(
        device=arguments.device, dtype=arguments.dtype, attention="auto", compile=False, slice_size=None
    )
    setting = BenchSetting(
        geometry=arguments.geometry,
        height=arguments.height,
        width=arguments.width,
        batch=arguments.batch,
        streaming=streaming,
        steps=arguments.steps,
        rounds=arguments.rounds,
        heads=tuple(zip(arguments.nope_dim, arguments.v_dim, strict=True)),
    )
    configs = side_configs(setting)
    dense = configs["dense"]
    if dense.in_dim != dense.out_dim or dense.model_type == "i2v":
        raise ConfigError("an image-to-video geometry is not measured; take the text-to-video one of its size")
    dtype = runtime.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    video = default_video(dense)
    pixels = (setting.height or video.height, setting.width or video.width)
    strides = (video.frame_stride, video.vae_stride, video.vae_stride)
    shown = StreamedVideo(
        height=pixels[0],
        width=pixels[1],
        window_frames=streaming.window_frames,
        batch=setting.batch,
        vae_stride=strides,
    )
    plan_memory(dense, None, video=shown)  # says what is wrong with a size
    case = Case(
        config=dense,
        streaming=streaming,
        size=(pixels[0] // video.vae_stride, pixels[1] // video.vae_stride),
        batch=setting.batch,
        timesteps=tuple(round(1000 * (1 - i / setting.steps)) for i in range(setting.steps)),
        device=device,
        dtype=dtype,
    )
    models = {name: random_model(config, device, dtype) for name, config in configs.items()}
    theirs = Published(code, models["dense"], case)
    if arguments.compile == "both":
        theirs.model.compile(mode="max-autotune-no-cudagraphs")
    if arguments.compile != "none":
        for model in models.values():
            model.compile_blocks()
    times = take_turns(case, models, theirs, setting.rounds)
    frames = setting.batch * streaming.chunk_frames * video.frame_stride
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "setting": {
            "geometry": setting.geometry,
            "pixels": list(pixels),
            "tokens_per_frame": case.tokens,
            "batch": setting.batch,
            "steps": setting.steps,
            "rounds": setting.rounds,
            "compile": arguments.compile,
            "threads": torch.get_num_threads(),
            **dataclasses.asdict(streaming),
        },
        "sides": [
            dataclasses.asdict(
                Side(
                    name=name,
                    frames_per_second=frames / statistics.median(own),
                    chunk=statistics.median(own),
                    chunk_spread=(min(own), max(own)),
                    ratio=statistics.median(a / b for a, b in zip(times[THEIRS], own, strict=True)),
                )
            )
            for name, own in times.items()
        ],
    }


def take_turns(case: Case, models: dict[str, WanModel], theirs: Published, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` chunks of each side, after as many as fill the window and one more."""
    config, chunk = case.config, case.streaming.chunk_frames
    filling = -(-case.streaming.window_frames // chunk) + 1
    frames = (filling + rounds) * chunk
    context = torch.zeros(case.batch, config.text_len, config.text_dim, device=case.device, dtype=case.dtype)
    noise = torch.randn(case.batch, config.out_dim, frames, *case.size, device=case.device, dtype=case.dtype)
    videos = {name: case.ours(model, context, frames) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in (THEIRS, *models)}
    started: float | None = None

    def now() -> float:
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)
        return time.perf_counter()

    with progress_bar(Console(stderr=True, highlight=False)) as progress:

        def turn() -> None:
            """Between two chunks of theirs: one of each of ours, in changing order."""
            nonlocal started
            if started is not None:
                times[THEIRS].append(now() - started)
            done = len(times[THEIRS])
            progress("chunks", done, filling + rounds, "filling the window" if done < filling else "timed")
            if done < filling + rounds:
                for name in list(videos) if done % 2 == 0 else reversed(videos):
                    began = now()
                    next(videos[name])
                    times[name].append(now() - began)
            started = now()

        theirs.rollout(context, noise, turn)
    return {name: own[filling:] for name, own in times.items()}


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises whatever its backends raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason[:200]}); use cpu or cuda") from None
    return device


def commit(checkout: Path) -> str | None:
    """The commit of a clone; None where git does not know."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def show(report: dict[str, Any]) -> None:
    found = report["check"]
    out = Console(highlight=False)
    out.print(
        f"From the same weights, latents differ by {found['within_window']:.1e} of their standard deviation within the "
        f"window and by {found['beyond_window']:.1e} beyond it; without the past by {found['without_past']:.2f}."
    )
    out.print(
        f"With our attention in their model: {found['swapped_lossless']:.1e} from theirs where nothing is lost, "
        f"{found['swapped']:.1e} from our rollout with {100 * (1 - found['swapped_cache']):.1f}% less cache."
    )
    if "sides" not in report:
        return
    setting = report["setting"]
    table = Table(
        title=f"{setting['geometry']} at {'x'.join(map(str, setting['pixels']))}, window {setting['window_frames']}, "
        f"batch {setting['batch']}, {setting['steps']}+1 passes, compiled: {setting['compile']}, {report['dtype']}, "
        f"{report['device']}"
    )
    table.add_column("")
    for name in ("frames/s", "chunk", "lowest to highest", "frames/s, published = 1"):
        table.add_column(name, justify="right")
    for side in report["sides"]:
        low, high = side["chunk_spread"]
        table.add_row(
            side["name"],
            f"{side['frames_per_second']:.2f}",
            f"{1e3 * side['chunk']:.1f} ms",
            f"{1e3 * low:.1f} to {1e3 * high:.1f} ms",
            f"{side['ratio']:.3f}",
        )
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
