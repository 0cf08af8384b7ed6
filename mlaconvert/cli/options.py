"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
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
        help="State dict of a .pt file. Default: generator_ema, generator, model, or none, whichever comes first.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="config.json to use. Default: the one beside the weights."),
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
Layers = Annotated[str | None, typer.Option(metavar="LIST", help="Layers to take, such as 0-3,7. Default: all.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Device of the float64 maths: cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
RunDevice = Annotated[str, typer.Option("--device", metavar="NAME", help="Device to run on: cpu, cuda or cuda:N.")]
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
Output = Annotated[
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
