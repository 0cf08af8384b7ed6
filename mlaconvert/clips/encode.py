"""Videos and captions to clips that models are calibrated, healed and evaluated on (`mlaconvert.clips.folder`).

A clip is a shard of its own. What is there already is not made again, so an interrupted run goes on. Of a video that
was changed, or turns out to be bad, no older shard stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from mlaconvert.base.repository import Base, require
from mlaconvert.base.text import TEXT_LEN, embed_texts
from mlaconvert.base.vae import Vae
from mlaconvert.clips.folder import NULL_CONTEXT, save_shard
from mlaconvert.clips.footage import Footage, to_pixels
from mlaconvert.clips.videos import Video
from mlaconvert.config.parsing import Count, check_fields
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.files.inputs import read_json
from mlaconvert.files.names import is_hidden, public_name
from mlaconvert.files.staging import claim, disk_errors, visible
from mlaconvert.files.whole import remove_partial, write_whole
from mlaconvert.listener import Listener
from mlaconvert.model.device import resolve_device
from mlaconvert.model.rates import measured_seconds, slow_here
from mlaconvert.progress import Counter, Progress
from mlaconvert.units import format_seconds

SETTINGS_NAME = "encoding.json"
_HEADER = "clip"  # the only entry: the order of several is not the same in every process
_TEXTS = ".text"  # embeddings that wait for their videos
_PARTS = 1000  # steps of the progress in one video
# Pixels of all frames up to which encoding takes seconds, and the sides of a clip that is encoded to tell the time.
_FEW, _PROBE = 5_000_000, 128


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How videos become clips. Raises ConfigError naming the field."""

    height: Count = 480
    """Pixels of a clip, which is cropped to fit; a multiple of twice the VAE's stride."""
    width: Count = 832
    """Pixels of a clip, as `height`."""
    frames: Count = 21
    """Latent frames of a clip."""
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 16.0
    """Frames a second that videos are resampled to; Wan2.1 was trained at 16."""
    clips: Count = 1
    """Clips that are cut from one video at most, one after the other from its start."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """What was made. `made` and `kept` count clips, `skipped` has a message for each video that was left out."""

    output: Path
    videos: int
    made: int
    kept: int
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "output": str(self.output), "skipped": list(self.skipped)}


def encode(
    videos: Sequence[Video],
    output: str | Path,
    base: Base,
    settings: Encoding | None = None,
    *,
    device: str = "cpu",
    text_device: str | None = None,
    on_bad: Callable[[str], None] | None = None,
    listener: Listener | None = None,
) -> EncodingReport:
    """Encode `videos` into the folder `output`, by the text encoder and the VAE of `base`, one after the other.

    Every clip becomes a shard with `latents` [1, C, F, h, w] in float32, normalised as the transformer sees them, and
    `context` [1, 512, text_dim] in bfloat16; `null_context.safetensors` holds the empty prompt's. Shards appear whole;
    those whose video, caption and settings are unchanged are kept, so an interrupted run goes on, which
    `listener.say` is told. A video that cannot
    be decoded, or is too short for one clip, raises InputError naming it, or is left out with `on_bad`, which
    is told, and what shards there are of it are deleted. Raises OutputError for a folder that holds something else or
    clips of other settings, or that another run has.
    """
    require("imageio_ffmpeg", "diffusers", "transformers", "ftfy")
    settings, folder, told = settings or Encoding(), Path(output), listener or Listener()
    for name in (device, text_device or device):
        resolve_device(name, torch.float32)
    with claim(folder, "encode"):
        _check_folder(folder, _settings(base, settings))
        return _encode(videos, folder, base, settings, (device, text_device or device), on_bad, told)


def _encode(
    videos: Sequence[Video],
    folder: Path,
    base: Base,
    settings: Encoding,
    devices: tuple[str, str],
    on_bad: Callable[[str], None] | None,
    told: Listener,
) -> EncodingReport:
    """`encode` in a folder that nobody else writes to; `devices` are those of the VAE and of the text encoder."""
    (device, text_device), report = devices, told.progress
    shards, kept, stale = _shards(folder), {}, {}
    for video in videos:
        kept[video.name], stale[video.name] = _kept(video, shards.get(_stem(video), {}), settings)
    left = [video for video in videos if not _is_done(kept[video.name], settings)]
    for name in stale.keys() - {video.name for video in left}:
        _delete(stale[name])
    made, skipped = 0, []
    if left and (finished := sum(map(len, kept.values()))):
        told.say(f"going on after {finished} finished clips in {folder}; {len(left)} of {len(videos)} videos are left")
    if left:
        vae = Vae.load(base).to(device)
        for name, value in (("height", settings.height), ("width", settings.width)):
            if value % (2 * vae.stride):
                raise ConfigError(f"{name} is {value} pixels: give a multiple of {2 * vae.stride}")
        _prepare(folder, _settings(base, settings))
        wanted = len(left) * settings.clips - sum(len(kept[video.name]) for video in left)
        line = _time_line(vae, settings, wanted, device)
        if line is not None:
            told.say(line)
        _embed(folder, base, left, text_device, report)
    for number, video in enumerate(left):

        def show(part: float, number: int = number) -> None:
            report("video", round(_PARTS * (number + min(part, 1))), _PARTS * len(left), f"{number + 1}/{len(left)}")

        show(0)
        clips = {header["clip"] for header in kept[video.name]}
        try:
            _delete(stale[video.name])  # first, so that what a killed run left is never of two states of a video
            made += _encode_video(folder, video, vae, settings, clips, show)
        except OutputError:
            raise
        except InputError as error:
            there = _shards(folder).get(_stem(video), {})
            _delete(path for clip, path in there.items() if on_bad is not None or clip not in clips)
            if on_bad is None:
                raise InputError(f"{error}; mend or remove it, or pass --bad-videos skip") from None
            kept[video.name] = []
            skipped.append(str(error))
            on_bad(f"skipped: {error}")
        show(1)
    if not skipped:  # a second try needs the encoder no more
        shutil.rmtree(folder / _TEXTS, ignore_errors=True)
    return EncodingReport(
        output=folder, videos=len(videos), made=made, kept=sum(map(len, kept.values())), skipped=tuple(skipped)
    )


def _time_line(vae: Vae, settings: Encoding, clips: int, device: str) -> str | None:
    """A line about how long so many clips will take, measured on a small one; None where it is a matter of seconds."""
    pixels = clips * settings.height * settings.width * (1 + (settings.frames - 1) * vae.frame_stride)
    if pixels < _FEW:
        return None
    sides = [min(side, _PROBE) // (2 * vae.stride) * 2 * vae.stride for side in (settings.height, settings.width)]
    small = torch.zeros(1 + vae.frame_stride, 3, *sides)
    seconds = pixels * measured_seconds(lambda: vae.encode(small), torch.device(device)) / (small.numel() / 3)
    at_most = "at most " if settings.clips > 1 else ""
    after = slow_here(torch.device(device), seconds)
    return f"{at_most}{clips} clips will take about {format_seconds(seconds)} on {device}, captions aside{after}"


def _settings(base: Base, settings: Encoding) -> dict[str, Any]:
    """What all clips of a folder share."""
    fields = dataclasses.asdict(settings)
    del fields["clips"]  # more can be cut later
    return {"base": public_name(base.source), **fields}


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but clips of the same settings; delete what a killed run half wrote there."""
    note = folder / SETTINGS_NAME
    if note.is_file():
        if read_json(note).get("settings") != settings:
            raise OutputError(f"{folder} holds clips of other settings ({SETTINGS_NAME}); choose another folder")
        with disk_errors(folder):
            remove_partial(folder)
    elif folder.exists() and (not folder.is_dir() or visible(folder)):
        raise OutputError(f"{folder} exists and holds no encoded clips; choose another folder")


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, with a note of what its clips share."""
    with disk_errors(folder):
        (folder / _TEXTS).mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS_NAME, (json.dumps({"settings": settings}, indent=2) + "\n").encode())


def _stem(video: Video) -> str:
    """What the names of a video's shards begin with: readable, and another one for every video."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", str(Path(video.name).with_suffix(""))).strip("-")[:80]
    return f"{plain}-{hashlib.sha256(video.name.encode()).hexdigest()[:8]}"


def _shard(folder: Path, video: Video, clip: int) -> Path:
    """The file of one clip."""
    return folder / f"{_stem(video)}-{clip:04d}.safetensors"


def _shards(folder: Path) -> dict[str, dict[int, Path]]:
    """The shards that are there, by the stem of their video and the number of the clip."""
    shards: dict[str, dict[int, Path]] = {}
    for path in folder.glob("*.safetensors"):
        if (name := re.fullmatch(r"(.+)-(\d{4,})\.safetensors", path.name)) and not is_hidden(path.name):
            shards.setdefault(name[1], {})[int(name[2])] = path
    return shards


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        with disk_errors(path, "delete it"):
            path.unlink(missing_ok=True)


def _key(video: Video, clip: int) -> dict[str, Any]:
    """What tells a shard that is up to date."""
    return {"file": video.name, "bytes": video.path.stat().st_size, "caption": video.caption, "clip": clip}


def _kept(video: Video, shards: Mapping[int, Path], settings: Encoding) -> tuple[list[dict[str, Any]], list[Path]]:
    """What the headers of a video's wanted clips say, of those of its `shards` that are up to date; and the others."""
    headers, stale = [], []
    for clip, path in sorted(shards.items()):
        header: Any = None
        with suppress(OSError, SafetensorError, ValueError), safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        if not isinstance(header, dict) or not _key(video, clip).items() <= header.items():
            stale.append(path)
        elif clip < settings.clips:
            headers.append(header)
    return headers, stale


def _is_done(headers: Sequence[Mapping[str, Any]], settings: Encoding) -> bool:
    """Whether these are all clips of a video that are wanted, or all that it has."""
    return len(headers) == settings.clips or any(
        header["last"] and header["clip"] + 1 == len(headers) for header in headers
    )


def _embed(folder: Path, base: Base, videos: Sequence[Video], device: str, report: Progress) -> None:
    """Embed the empty prompt and the captions that are not on the disk yet; the encoder is gone afterwards."""
    places = {_text_file(folder, caption): caption for caption in ("", *(video.caption for video in videos))}
    missing = [path for path in places if _read_text(path) is None]
    embeddings = embed_texts(base, [places[path] for path in missing], device=device)
    count = Counter(report, "text", len(missing))
    if missing:
        count.show()
    for path, text in zip(missing, embeddings, strict=True):
        save_shard(path, {"text": text})
        count.step()
    save_shard(folder / NULL_CONTEXT, {"context": _context(folder, "")})


def _text_file(folder: Path, caption: str) -> Path:
    return folder / _TEXTS / f"{hashlib.sha256(caption.encode()).hexdigest()}.safetensors"


def _read_text(path: Path) -> Tensor | None:
    """A caption's embedding [T, text_dim], or None where none is kept, or a damaged one."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        text: Tensor = file.get_tensor("text")
        return text if text.ndim == 2 and len(text) <= TEXT_LEN else None
    return None


def _context(folder: Path, caption: str) -> Tensor:
    """[1, 512, text_dim] of a caption that was embedded, with zeros after its tokens."""
    path = _text_file(folder, caption)
    text = _read_text(path)
    if text is None:
        raise InputError(f"{path}: the caption's embedding was damaged meanwhile; run the same command again")
    return F.pad(text, (0, 0, 0, TEXT_LEN - len(text)))[None]


def _encode_video(
    folder: Path, video: Video, vae: Vae, settings: Encoding, kept: Collection[int], show: Callable[[float], None]
) -> int:
    """Write the clips of one video that are not among the `kept` ones; how many."""
    made, length = 0, 1 + (settings.frames - 1) * vae.frame_stride
    with Footage(video.path, height=settings.height, width=settings.width, fps=settings.fps) as footage:
        clips = _clips(footage, length)
        clip = next(clips, None)
        if clip is None:
            seconds = length / settings.fps
            raise InputError(f"{video.path}: it is shorter than a clip of {length} frames ({seconds:.1f} s)")
        for number in range(settings.clips):
            # Looked up ahead, since a clip says in its header whether it is the video's last.
            following = next(clips, None) if number + 1 < settings.clips else None
            if number not in kept:
                total = length * min(settings.clips, max(1, (footage.num_frames or 0) // length))
                latents = vae.encode(_counted(clip, number * length, total, show))[None]
                last = following is None and number + 1 < settings.clips
                save_shard(
                    _shard(folder, video, number),
                    {"latents": latents, "context": _context(folder, video.caption)},
                    {_HEADER: json.dumps(_key(video, number) | {"last": last})},
                )
                made += 1
            if following is None:
                break
            clip = following
    return made


def _clips(frames: Iterable[Tensor], length: int) -> Iterator[list[Tensor]]:
    """Frames [H, W, 3] in lists of `length`; what is left at the end is dropped."""
    source = iter(frames)
    while len(clip := list(itertools.islice(source, length))) == length:
        yield clip


def _counted(clip: Sequence[Tensor], before: int, total: int, show: Callable[[float], None]) -> Iterator[Tensor]:
    """The frames as pixels; `show` is told which part of the video's `total` they are."""
    for i, frame in enumerate(clip, before):
        show(i / total)
        yield to_pixels(frame)
