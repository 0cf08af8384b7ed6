"""mlaconvert encode"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlaconvert.cli.options import Json, RunDevice, TextDevice, among
from mlaconvert.cli.show import console, print_json, progress_bar


def encode(
    videos: Annotated[
        list[Path],
        typer.Argument(metavar="VIDEO", help="Video files, and folders with videos in them.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of clips to write, or to go on with."),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="REPO",
            help="Folder or Hub id with the text encoder and the VAE of the model that will see the clips.",
        ),
    ] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions: JSON lines or an array with file and caption, or CSV with these columns. Default: a .txt "
            "file beside each video.",
        ),
    ] = None,
    height: Annotated[int, typer.Option(metavar="N", help="Height of the clips in pixels, cropped to fit.")] = 480,
    width: Annotated[int, typer.Option(metavar="N", help="Width of the clips in pixels, cropped to fit.")] = 832,
    frames: Annotated[
        int, typer.Option(metavar="N", help="Latent frames a clip; 21 are 81 video frames, 5 seconds.")
    ] = 21,
    fps: Annotated[
        float, typer.Option(metavar="X", help="Frames a second that videos are resampled to; Wan2.2 5B takes 24.")
    ] = 16.0,
    clips: Annotated[
        int, typer.Option(metavar="N", help="Most clips to cut from one video, one after the other from its start.")
    ] = 1,
    bad_videos: Annotated[
        str,
        typer.Option(
            metavar="refuse|skip",
            autocompletion=among("refuse", "skip"),
            help="What becomes of videos that cannot be decoded, or are shorter than a clip.",
        ),
    ] = "refuse",
    device: RunDevice = "auto",
    text_device: TextDevice = None,
    as_json: Json = False,
) -> None:
    """Make clips for --data of other commands from videos and captions; interrupted, the same command goes on."""
    from mlaconvert.base.repository import open_base
    from mlaconvert.clips import encode as encoding
    from mlaconvert.clips.videos import find_videos
    from mlaconvert.errors import ConfigError
    from mlaconvert.listener import Listener

    if bad_videos not in ("refuse", "skip"):
        raise ConfigError(f"--bad-videos is {bad_videos!r}: give refuse or skip")
    settings = encoding.Encoding(height=height, width=width, frames=frames, fps=fps, clips=clips)
    found = find_videos(videos, captions)
    err = console(stderr=True)

    def say(message: str) -> None:
        err.print(message, markup=False, soft_wrap=True)

    with progress_bar(err) as report:
        result = encoding.encode(
            found,
            output,
            open_base(base),
            settings,
            device=device,
            text_device=text_device,
            on_bad=say if bad_videos == "skip" else None,
            listener=Listener(progress=report, say=say),
        )
    if as_json:
        print_json(result.to_json())
    err.print(
        f"{result.made} clips made, {result.kept} there before, from {result.videos} videos"
        f"{f', {len(result.skipped)} of them skipped' if result.skipped else ''}; in {output}",
        markup=False,
        soft_wrap=True,
    )
