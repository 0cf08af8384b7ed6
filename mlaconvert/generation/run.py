"""Video from a model folder: chunk by chunk through the sliding-window cache, onto the disk as it comes.

The latents go into a file that is laid out beforehand, so a long video never lies in memory. What an interrupted run
finished stays in `.<output>.partial` (`mlaconvert.files.staging`); the same call takes it up from there. Prompts are
embedded first, by the text encoder of the model's base repository, and the latents are decoded last, by its VAE: of the
three models, only one of the large ones is loaded at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

from mlaconvert.base.text import free_memory
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.families.merged import merged
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource, as_source
from mlaconvert.files.staging import Staging, disk_errors
from mlaconvert.generation.chunks import ChunkFile, OtherVideoError, check_staging, write_json
from mlaconvert.generation.cost import cost_lines
from mlaconvert.generation.marks import fingerprint
from mlaconvert.generation.movies import can_write_mp4
from mlaconvert.generation.output import decode_movies, movie_ending, save_pictures
from mlaconvert.generation.passes import run_passes
from mlaconvert.generation.plan import assumptions, plan_generation, unembedded
from mlaconvert.generation.request import (
    DEFAULT_OUTPUT,
    KEPT,
    LATENTS_NAME,
    MOVIES,
    REPORT_NAME,
    Generation,
    GenerationReport,
    Movie,
    Runtime,
)
from mlaconvert.generation.text import embed_prompts, find_text_base, load_vae
from mlaconvert.progress import Progress, silent


def generate(
    source: AnySource,
    output: str | Path | None = None,
    request: Generation | None = None,
    runtime: Runtime | None = None,
    *,
    movie: Movie = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> GenerationReport:
    """Generate videos by a dense or a converted model, into the new folder or movie file `output`.

    generate("wan-mla", "fox.mp4", Generation(prompts=("a red fox runs through fresh snow",), seconds=30))

    The folder gets `latents.safetensors` (`latents` [samples, C, F, H, W] in float32 and, with one prompt, its
    `context`), `generation.json`, and a movie for each sample: of models that work on RGB pixels always, with a contact
    sheet, of others when prompts, `request.base` or `movie` "mp4" ask for it, by the base's VAE. An `output` that ends
    in .mp4 or .gif is the movie alone; without one it is the first of the folders video, video-2, ... that is free,
    or that an interrupted run of the same video left (with `overwrite` always video). An interrupted run leaves its
    finished chunks in `.<output>.partial`, and the same call continues them: one pass a chunk, and the same video.
    `say` is told what is assumed of the model because neither its files nor `request` state it, and of a few-step
    schedule, and how long a video that is not short will take. Raises OutputError for an output that exists, and what
    `plan_generation`, `open_checkpoint`, `find_base` and `rollout` raise.
    """
    source, request, runtime = as_source(source), request or Generation(), runtime or Runtime()
    progress, places = progress or silent, _places(output, request, movie, overwrite)
    staging, movie = next(places)
    with open_checkpoint(source) as checkpoint:
        checkpoint.check_runs()
        geometry, notes, loras = runtime.geometry(checkpoint), assumptions(checkpoint, request), merged(checkpoint)
        dtype = runtime.chosen_dtype() or checkpoint.dtype
    if say is not None:
        for note in notes:
            say(note)
    if geometry.works_on_pixels or not request.prompts:
        plan_generation(request, geometry)  # what is wrong shows before anything large is read
    needs_base = bool(request.prompts) or movie in ("mp4", "gif")
    base = find_text_base(source, request, geometry, needs_base)
    vae = None if base is None or movie == "none" else load_vae(base, geometry, movie)
    if say is not None:
        words = None if base is None or not request.prompts else unembedded(base, request, geometry)
        for line in cost_lines(geometry, plan_generation(request, geometry, text=words), runtime, dtype):
            say(line)
    text = None if base is None or not request.prompts else embed_prompts(base, request, geometry, runtime, progress)
    model = runtime.load(source)
    plan = plan_generation(request, model.config, text=text)
    settings: dict[str, Any] = {"source": str(source), "revision": source.revision, "subfolder": source.subfolder}
    settings |= {"state_key": source.state_key, "weights": fingerprint(model), "dtype": str(model.dtype)}
    settings |= plan.settings() | ({"loras": loras} if loras else {})
    if runtime.cache_dtype is not None:
        settings["cache_dtype"] = runtime.cache_dtype
    while True:
        try:
            chunk_file, target = ChunkFile.open(staging, plan, model.config, settings), staging.path
            break
        except OtherVideoError:
            if output is not None:
                raise
            staging, movie = next(places)
    with chunk_file as store:
        resumed, started = store.done, time.monotonic()
        if resumed and say is not None:
            say(f"going on after latent frame {resumed} of {plan.frames}, kept from an interrupted run")
        cache_bytes = run_passes(model, plan, runtime, store, progress)
        elapsed = time.monotonic() - started
        del model
        free_memory()
        files = [LATENTS_NAME]
        if vae is not None:
            files += decode_movies(store.latents, staging.content, plan, vae.to(runtime.device), progress)
        elif plan.has_pixels and movie != "none":
            files += save_pictures(store.latents, staging.content, plan.seeds, movie_ending(movie))
        report = GenerationReport(
            output=target,
            files=(target.name,) if target.suffix in MOVIES else (*files, REPORT_NAME),
            frames=plan.frames,
            resumed_frames=resumed,
            video_seconds=plan.frames * plan.stride / plan.fps,
            elapsed=elapsed,
            video_fps=len(plan.seeds) * (plan.frames - resumed) * plan.stride / elapsed,
            cache_bytes=cache_bytes,
            settings=settings,
        )
        with disk_errors(target, KEPT):
            for path in staging.content.iterdir():  # of a run that was killed, or wanted other movies
                if path.name not in files:
                    path.unlink()
            write_json(staging.content / REPORT_NAME, report.to_json())
            staging.publish(files[1] if target.suffix in MOVIES else None)
    return report


def _places(
    output: str | Path | None, request: Generation, movie: Movie, overwrite: bool
) -> Iterator[tuple[Staging, Movie]]:
    """Where to write, and the kind of movie: `output`, else whatever is free of `DEFAULT_OUTPUT` and its numbers.

    Raises OutputError for an output that cannot be written.
    """
    for number in count(1):
        path = output or (DEFAULT_OUTPUT if number == 1 else f"{DEFAULT_OUTPUT}-{number}")
        if output is None and not overwrite and os.path.lexists(path):
            continue
        staging = Staging(path, "generate", overwrite=overwrite, inside="video")
        try:
            chosen = _check_target(staging, request, movie)
        except OutputError:
            if output is None and staging.folder.exists():  # another run or another command has it
                continue
            raise
        yield staging, chosen


def _check_target(staging: Staging, request: Generation, movie: Movie) -> Movie:
    """Refuse an output that cannot be written; the kind of movie, which a file's ending decides."""
    target = staging.path
    if target.suffix in MOVIES:
        ending = cast(Movie, target.suffix[1:])
        if movie not in ("auto", ending):
            raise ConfigError(f"{target} says {ending}, and --format {movie}; leave one of them out")
        if request.samples > 1:
            raise ConfigError(f"{target} is one movie, and {request.samples} samples are several; give a folder")
        movie = ending
    check_staging(staging, 0)
    if movie == "mp4" and not can_write_mp4():
        raise InputError("MP4 needs an encoder: pip install 'mlaconvert[video]', or take --format gif")
    return movie
