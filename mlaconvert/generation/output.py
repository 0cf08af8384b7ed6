"""Pictures and movies of a finished video, in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mlaconvert.base.vae import Vae
from mlaconvert.files.staging import disk_errors
from mlaconvert.generation.movies import can_write_mp4, save_movie
from mlaconvert.generation.plan import GenerationPlan
from mlaconvert.generation.request import KEPT, Movie
from mlaconvert.generation.sheets import contact_sheet
from mlaconvert.progress import Progress

SHEET_NAME = "frames.png"


def save_pictures(latents: Tensor, folder: Path, seeds: Sequence[int], ending: str) -> list[str]:
    """A movie of each sample and a contact sheet of all."""
    names = [f"video-{seed}{ending}" for seed in seeds]
    for video, name in zip(latents, names, strict=True):
        save_movie(video.unbind(1), folder / name)
    rows = [latents[number : number + 1] for number in range(len(latents))]
    contact_sheet(rows, [f"seed {seed}" for seed in seeds]).save(folder / SHEET_NAME)
    return [*names, SHEET_NAME]


def decode_movies(latents: Tensor, folder: Path, plan: GenerationPlan, vae: Vae, progress: Progress) -> list[str]:
    """A movie of each sample by the VAE, frame by frame; those of an interrupted run are kept."""
    names = [f"video-{seed}.mp4" for seed in plan.seeds]
    total = len(names) * plan.frames

    def counted(number: int) -> Iterator[Tensor]:
        for i, frame in enumerate(latents[number].unbind(1)):
            progress("decode", number * plan.frames + i, total)
            yield frame

    for number, name in enumerate(names):
        if not (folder / name).exists():
            with disk_errors(folder, KEPT):
                save_movie(vae.decode(counted(number)), folder / name, fps=plan.fps, scale=1)
        progress("decode", (number + 1) * plan.frames, total)
    return names


def movie_ending(movie: Movie) -> str:
    """The ending of a movie's file: mp4 where it was asked for, or can be written."""
    return ".mp4" if movie == "mp4" or (movie == "auto" and can_write_mp4()) else ".gif"
