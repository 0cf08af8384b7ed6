"""Videos for VBench's prompts, under the names that it looks for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlaconvert.base.vae import Vae
from mlaconvert.clips.folder import save_shard
from mlaconvert.errors import ConfigError, InputError, OutputError, is_plain
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import AnySource
from mlaconvert.files.names import public_name
from mlaconvert.files.staging import claim, disk_errors
from mlaconvert.generation.cost import cost_lines
from mlaconvert.generation.marks import MARK, digests, fingerprint_of, read_mark
from mlaconvert.generation.movies import SCALE, can_write_mp4, remove_unfinished, save_movie
from mlaconvert.generation.passes import PassCounter, chunk_passes, count_passes
from mlaconvert.generation.plan import OF_ONE, GenerationPlan, assumptions, plan_generation, prompt_plan
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.text import embed_prompts, find_text_base, load_vae
from mlaconvert.progress import Progress, silent

VBENCH_SAMPLES = 5
_LONGEST_NAME = 255  # bytes of a file name


def generate_for_vbench(
    source: AnySource,
    output: str | Path,
    prompts: Sequence[str],
    request: Generation | None = None,
    runtime: Runtime | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """One video for every prompt and sample in the folder `output`, named "{prompt}-{index}.mp4".

    That is how VBench and VBench-Long look for a prompt's videos; both score five a prompt, index 0 to 4. Each file
    appears whole and holds a mark of the settings that made it. Files that are there already, made with these settings,
    are left alone, so an interrupted run continues; with `overwrite` others are made again. Files of earlier versions
    have no mark and are left alone, which `say` is told. The prompts are embedded by the base's text encoder, or are
    the rows of `request.embeddings`, in order; then, without `request.base`, models that do not work on pixels leave
    "{prompt}-{index}.safetensors" with `latents` [1, C, F, H, W].

    Returns all files. Raises InputError for a prompt that cannot be a file name, OutputError for files of another model
    or other settings, and what `generate` raises.
    """
    request, runtime, folder = request or Generation(samples=VBENCH_SAMPLES), runtime or Runtime(), Path(output)
    if request.prompts:
        raise ConfigError("the prompts come from their own list; leave prompts out")
    for number, prompt in enumerate(prompts, 1):
        _check_prompt_name(prompt, number, prompts)
    with open_checkpoint(source) as checkpoint:
        geometry, notes = runtime.geometry(checkpoint), assumptions(checkpoint, request)
        dtype = runtime.chosen_dtype() or checkpoint.dtype
        shared: dict[str, Any] = {"model": fingerprint_of(checkpoint), "dtype": str(dtype)}
    if runtime.cache_dtype is not None:
        shared["cache_dtype"] = runtime.cache_dtype
    if say is not None:
        for note in notes:
            say(note)
    base = find_text_base(source, request, geometry, request.embeddings is None)
    if geometry.works_on_pixels and not can_write_mp4():
        raise InputError("VBench's file names end in .mp4, which needs an encoder: pip install 'mlaconvert[video]'")
    vae = None if base is None else load_vae(base, geometry, "mp4")
    embedded = base if request.embeddings is None else None
    if base is not None:
        shared["base"] = public_name(base.source)
    plans = [prompt_plan(request, geometry, prompts, number, embedded) for number in range(len(prompts))]
    ending = ".safetensors" if not geometry.works_on_pixels and vae is None else ".mp4"
    files = [[folder / f"{prompt}-{i}{ending}" for i in range(request.samples)] for prompt in prompts]
    marks = {
        path: digests(shared | _own_settings(plan.sample(i)))
        for plan, paths in zip(plans, files, strict=True)
        for i, path in enumerate(paths)
    }
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with claim(folder, "generate"):
        left = _not_made(folder, ending, marks, overwrite, say or (lambda _: None))
        if 0 < len(left) < len(marks) and say is not None:
            say(f"going on after {len(marks) - len(left)} of {len(marks)} videos, kept in {folder}")
        missing = [number for number, paths in enumerate(files) if not left.isdisjoint(paths)]
        if say is not None:
            for line in cost_lines(geometry, plans[0], runtime, dtype, prompts=len(missing)):
                say(line)
        if missing and embedded is not None:
            chosen = dataclasses.replace(request, prompts=tuple(prompts[number] for number in missing))
            text = embed_prompts(embedded, chosen, geometry, runtime, progress or silent, one_each=True)
            for row, number in enumerate(missing):
                plans[number] = plan_generation(request, geometry, row=row, text=text)
        if missing:
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            model = runtime.load(source)
            count = PassCounter(progress or silent, sum(count_passes(plans[number], runtime) for number in missing))
            count.show()
        for number in missing:
            plan = plans[number]
            chunks = list(chunk_passes(model, plan, runtime, plan.prefix, count))
            videos = torch.cat([chunk.cpu() for chunk in chunks], 2)
            for video, path in zip(videos, files[number], strict=True):
                if path in left:
                    with disk_errors(folder, "whole videos are kept: the same command goes on from them"):
                        _write_marked(video, path, plan, vae and vae.to(runtime.device), json.dumps(marks[path]))
    return [path for paths in files for path in paths]


def _write_marked(video: Tensor, path: Path, plan: GenerationPlan, vae: Vae | None, mark: str) -> None:
    """Write one video [C, F, H, W] as a movie, or as latents, with what it was made with. Raises OSError."""
    if vae is None and not plan.has_pixels:
        save_shard(path, {"latents": video[None]}, {MARK: mark})
    else:
        frames = video.unbind(1) if vae is None else vae.decode(video.unbind(1))
        scale = SCALE if vae is None else 1
        save_movie(frames, path, fps=plan.fps, scale=scale, comment=f"{MARK} {mark}")


def _own_settings(plan: GenerationPlan) -> dict[str, Any]:
    """What one video depends on besides the model and its base, by a name for the user."""
    settings = plan.settings()
    words = settings.pop("text", {})
    return settings | {
        "seed": settings.pop("seeds"),
        "conditioning": settings.pop("inputs"),
        "prompt": words.get("prompts"),
        "negative prompt": words.get("negative"),
    }


def _not_made(
    folder: Path, ending: str, marks: Mapping[Path, Mapping[str, str]], overwrite: bool, say: Callable[[str], None]
) -> set[Path]:
    """The files of `marks` that are to be made: not there, or with `overwrite` made with other settings.

    Raises OutputError for a file in the folder that was made with other settings, of whatever prompt.
    """
    left = {path for path in marks if not path.is_file()}
    unknown, ours = 0, next(iter(marks.values()), {})
    if folder.is_dir():
        remove_unfinished(folder)
    for path in sorted(folder.glob(f"*{ending}")):
        mark = read_mark(path)
        if path not in marks:  # another prompt's: only what all prompts share is compared
            expected = {name: ours[name] for name in ours if name not in OF_ONE}
            changed = [] if mark is None else [name for name in expected if mark.get(name) != expected[name]]
            if changed:
                raise OutputError(f"{path} was made with another {changed[0]}; delete it, or choose another folder")
        elif mark is None:
            unknown += 1
            left |= {path} if overwrite else set()
        elif changed := sorted(name for name in mark.keys() | marks[path] if mark.get(name) != marks[path].get(name)):
            if not overwrite:
                raise OutputError(
                    f"{path} was made with another {changed[0]}; choose another folder, or pass --overwrite to make "
                    "such videos again"
                )
            left.add(path)
    if unknown and not overwrite:
        say(
            f"{unknown} videos in {folder} do not say what made them, as earlier versions left them: they are kept; "
            "--overwrite makes them again"
        )
    return left


def _check_prompt_name(prompt: str, number: int, prompts: Sequence[str]) -> None:
    longest = len(f"{prompt}-00.safetensors".encode())
    if "/" in prompt or not is_plain(prompt) or not prompt.strip() or longest > _LONGEST_NAME:
        raise InputError(
            f"prompt {number} cannot be a file name: {prompt[:60]!r}; leave out slashes and control codes, shorten it"
        )
    if prompts.index(prompt) != number - 1:
        raise InputError(f"prompt {number} is there twice: {prompt[:60]!r}")
