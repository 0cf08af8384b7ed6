"""The options of `convert` alone, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlaconvert.cli.options import among, recipes

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        autocompletion=recipes(),
        help="Recipe file, or the name of a shipped recipe. Options override it. Default: none.",
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="calibrated|svd|random|lossless",
        autocompletion=among("calibrated", "svd", "random", "lossless"),
        help="Factorise in the metric of real inputs, or the weights alone (no data, fast), draw new ones, or keep "
        "everything (a check, saves nothing). Default: calibrated.",
    ),
]
QRank = Annotated[
    str | None,
    typer.Option(
        metavar="N|none",
        autocompletion=among("none"),
        help="Channels of the query latent, or none to keep queries exact. Default: none if calibrated, else half "
        "the width, 768 at 1536.",
    ),
]
NopeDim = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Unrotated score channels of a head; narrower heads attend faster. Default: what the rotary channels "
        "leave of a head.",
    ),
]
VDim = Annotated[
    int | None, typer.Option("--v-dim", metavar="N", help="Value channels of a head. Default: the head, 128.")
]
RopeDim = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Rotated score channels, shared by all heads. Default: a quarter head, 32 of 128; calibrated: what "
        "measures best.",
    ),
]
Rope = Annotated[
    str | None,
    typer.Option(
        metavar="cached|latent|head",
        autocompletion=among("cached", "latent", "head"),
        help="The rotary key: shared and cached beside the latent as in the paper, shared and read from it, or "
        "each head's own. Default: head (latent with --nope-dim) if calibrated, else cached.",
    ),
]
RopeSelection = Annotated[
    str | None,
    typer.Option(
        "--rope-selection",
        metavar="highest|energy",
        autocompletion=among("highest", "energy"),
        help="Rotary pairs that a shared key keeps: the highest frequencies, or what costs most to lose. "
        "Default: energy if calibrated, else highest.",
    ),
]
Present = Annotated[
    str | None,
    typer.Option(
        metavar="exact|latent",
        autocompletion=among("exact", "latent"),
        help="What a chunk sees of itself: the teacher's own keys and values, which need no cache, or latents as "
        "in the paper. Default: exact if calibrated for streaming, else latent.",
    ),
]
NoisyPast = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of a calibration's windows with noisy pasts, for models that are trained or run with them. "
        "Default: 0, as in rollouts.",
    ),
]
RefitSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Steps that refit all layers at once beside an exact present, by the model's velocity on the clips; 0 "
        "for none. Default: 100, but none of a large model on a CPU.",
    ),
]
RefitClips = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Clips that this refit takes, the --clips among them. Default: four times as many, or what there is.",
    ),
]
KeyNorm = Annotated[
    str | None,
    typer.Option(
        metavar="latent|token",
        autocompletion=among("latent", "token"),
        help="RMSNorm on the latent, or the exact key norm for one more cached scalar. Default: token if "
        "calibrated, else latent.",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        metavar="fixed|uniform|adaptive",
        autocompletion=among("fixed", "uniform", "adaptive"),
        help="Cached scalars as --kv-rank and --rope-dim say, alike in all layers, or where they measure best; "
        "with --init calibrated. Default: adaptive.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Clips for --init calibrated: safetensors with latents and context. Default: its own rollouts.",
    ),
]
Moments = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where --init calibrated keeps its statistics of the inputs, float64, and finds them again; or what "
        "mlaconvert.collect recorded in the model's own code, read in place of clips. Default: DIR.moments beside the "
        "output.",
    ),
]
Clips = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Clips that --init calibrated reads or generates. Default: 40, fewer (but 5) above 100,000 tokens.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16 for all tensors. Default: as in the source."),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar="native|diffusers",
        autocompletion=among("native", "diffusers"),
        help="Tensor names and config.json of the output: Wan's own, or diffusers'. Default: the source's.",
    ),
]
ChunkFrames = Annotated[
    int | None,
    typer.Option(metavar="N", help="Latent frames made at a time. Default: the source's."),
]
WindowFrames = Annotated[
    int | None,
    typer.Option(metavar="N", help="Latent frames that a query sees: sink, cached, own chunk. Default: the source's."),
]
SinkFrames = Annotated[
    int | None, typer.Option(metavar="N", help="First latent frames, kept for good. Default: the source's.")
]
Bidirectional = Annotated[bool, typer.Option("--bidirectional", help="See whole clips, whatever the source says.")]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of random weights and of calibration noise. Default: 0.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model folder DIR.")]
Verify = Annotated[bool, typer.Option("--verify", help="Read the output back and compare it with the source.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw away what an interrupted run has finished, and begin again.")
]
