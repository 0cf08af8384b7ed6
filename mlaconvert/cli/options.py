"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlaconvert.config.cache_dtype import CACHE_DTYPES

if TYPE_CHECKING:
    from mlaconvert.families.source import Source


def among(*values: str) -> Callable[[str], list[str]]:
    """What a shell completes for an option that takes one of `values`."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def files(incomplete: str, *endings: str) -> list[str]:
    """Folders, and files with one of `endings`, that a shell completes `incomplete` to."""
    begun = Path(incomplete).expanduser()
    folder, start = (begun, "") if incomplete.endswith("/") or not incomplete else (begun.parent, begun.name)
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.startswith(start))
    except OSError:
        return []
    shown = [path for path in paths if start or not path.name.startswith(".")]
    return [
        f"{path}/" if path.is_dir() else str(path) for path in shown if path.is_dir() or path.suffix.lower() in endings
    ]


def source_of(
    path: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    state_key: str | None = None,
    config: Path | None = None,
    loras: tuple[list[Path] | None, list[float] | None] = (None, None),
) -> Source:
    """The model that these options name; `loras` are the values of --lora and --lora-scale."""
    from mlaconvert.families.lora import pair
    from mlaconvert.families.source import Source

    files = tuple(pair(loras[0] or (), loras[1] or ()))
    return Source(path, revision=revision, subfolder=subfolder, state_key=state_key, config=config, loras=files)


def models(incomplete: str) -> list[str]:
    """The built-in model, weight files and folders."""
    return among("tiny")(incomplete) + files(
        incomplete, ".safetensors", ".sft", ".json", ".pt", ".pth", ".ckpt", ".bin"
    )


def recipes(kind: str = "") -> Callable[[str], list[str]]:
    """Shipped recipes of a `kind` (a folder of them, "" for those of convert), and YAML files."""

    def complete(incomplete: str) -> list[str]:
        from mlaconvert.files.shipped import recipe_folder, recipe_names

        return among(*recipe_names(recipe_folder() / kind))(incomplete) + files(incomplete, ".yaml", ".yml")

    return complete


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        autocompletion=models,
        help="A .safetensors or .pt file, a model folder, a Hub id (user/repo), or the built-in model `tiny`.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub id. Default: its main branch.")
]
Subfolder = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder inside the checkpoint, such as one of two experts. Default: both experts, or the one model.",
    ),
]
StateKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Which of a file's models, by the beginning of its names. Default: the only one; of several "
        "generator_ema, generator, or of a .pt file model.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="config.json to use, or a streaming codebase's YAML that says window, chunk and sink. Default: the "
        "config.json beside the weights.",
    ),
]
KvRank = Annotated[
    int | None,
    typer.Option(
        "--kv-rank",
        metavar="N",
        help="Channels of the KV latent. Default: the paper's cache, scaled: 192 beside a cached rotary key at width "
        "1536, else 224.",
    ),
]
BytesPerToken = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Bytes that a token may take in the cache, a layer: each channel of a calibrated latent gets the bits "
        "that it is worth. Default: numbers of the model's dtype; dense keys and values take 6,144 at width 1536.",
    ),
]
Layers = Annotated[str | None, typer.Option(metavar="LIST", help="Layers to take, such as 0-3,7. Default: all.")]
Loras = Annotated[
    list[Path] | None,
    typer.Option(
        "--lora",
        metavar="FILE",
        help="LoRA made for the dense model, merged before converting; once for each. Default: none.",
    ),
]
LoraScales = Annotated[
    list[float] | None,
    typer.Option(
        "--lora-scale", metavar="X", help="Factor of a LoRA's change, in the order of --lora. Default: 1 for each."
    ),
]


def _present(ctx: typer.Context, name: str) -> str:
    return name if ctx.resilient_parsing else present_device(name)


def present_device(name: str) -> str:
    """What "auto" is on this machine; any other device as it is."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_DEVICES = "cpu, cuda, cuda:N, or auto: a GPU where there is one."
Device = Annotated[
    str, typer.Option(metavar="NAME", help=f"Device of the float64 maths: {_DEVICES}", callback=_present)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
RunDevice = Annotated[
    str, typer.Option("--device", metavar="NAME", help=f"Device to run on: {_DEVICES}", callback=_present)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16 to run in. Default: the file's on a CPU, bfloat16 elsewhere.",
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        metavar="auto|expanded|absorbed",
        autocompletion=among("auto", "expanded", "absorbed"),
        help="How latent attention reads its cache: rebuilt keys and values, or the latents themselves; auto counts "
        "FLOPs and bytes.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the blocks with torch.compile: a slow start, then faster. Needs Triton "
        "on a GPU, a C++ compiler on a CPU.",
    ),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(CACHE_DTYPES),
        autocompletion=among(*CACHE_DTYPES),
        help="What the cache of past chunks is narrowed to as the model runs, dense or converted: a cast, integers in "
        "groups that each keep a zero and a step (KIVI), or those of what k-means leaves of a frame (qvg, "
        "Quant-VideoGen). The newest chunk stays exact. Default: not narrowed.",
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write; it must not exist yet. Default: none, for --dry-run.",
    ),
]
Height = Annotated[int | None, typer.Option(metavar="N", help="Video height in pixels. Default: 480 (tiny: 24).")]
Width = Annotated[int | None, typer.Option(metavar="N", help="Video width in pixels. Default: 832 (tiny: 32).")]
WindowFrames = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Latent frames a query sees: sink, cached, own chunk. Default: the model's, else 7."
    ),
]
SinkFrames = Annotated[
    int | None, typer.Option(metavar="N", help="First latent frames, kept for good. Default: the model's, else 1.")
]
ChunkFrames = Annotated[
    int | None, typer.Option(metavar="N", help="Latent frames made at a time. Default: the model's, else 3.")
]
Positions = Annotated[
    str | None,
    typer.Option(
        metavar="window|absolute",
        autocompletion=among("window", "absolute"),
        help="Count frame positions from the window's sink, or from the start of the video. Default: the model's, "
        "else window.",
    ),
]
FewStep = Annotated[
    bool | None,
    typer.Option(
        "--few-step/--many-step",
        help="Whether it was distilled to few steps. Default: as its files say, else many.",
        show_default=False,
    ),
]
BaseRepo = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="REPO",
        help="Folder or Hub id with the text encoder and the VAE, in diffusers or native Wan2.1 layout. Default: the "
        "checkpoint's own, or what conversion.json names as its source.",
    ),
]
TextDevice = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Device of the text encoder (11 GB in bfloat16). Default: as --device."),
]
