"""How close a converted model is to its teacher, and what it saves: the same clips, noise and noise levels for both."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mlaconvert import __version__
from mlaconvert.cache import LatentCache
from mlaconvert.checkpoint import (
    CONVERSION_NAME,
    HEALING_NAME,
    TensorStore,
    experts,
    find_beside,
    recorded_places,
)
from mlaconvert.config import StreamingConfig, WanConfig, default_video, parse
from mlaconvert.data import Clips, load_clips
from mlaconvert.drift import Drift, RolloutPlan, Speed, compare_videos, paired_rollouts
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families import Checkpoint, comes_from_tiny, open_checkpoint
from mlaconvert.families.causal import Timing
from mlaconvert.lora import find_recorded, merge_loras
from mlaconvert.model import Block, WanModel, default_chunks, load_model
from mlaconvert.plan import public_name
from mlaconvert.records import read_record
from mlaconvert.rollout import Sampler, add_noise, own_clips, passes, warp
from mlaconvert.tiny.clips import held_back, null_context
from mlaconvert.vbench import VBenchScores

BATCH = 8
BATCH_TOKENS = 16384  # clips of more tokens than this go through the models one by one
LEVELS = 8  # noise levels at which velocities are compared
TINY_STEPS, TINY_GUIDANCE = 12, 1.5  # of the built-in model's rollouts
EVALUATION_NAME = "evaluation.json"
REPORT_NAME = "report.html"

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]


# --- losses and errors on clips ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A student beside its teacher on the same clips, noise and noise levels.

    Losses are mean squared errors of the velocity. `excess` is the student's loss above the teacher's, as a
    share of it. Errors are Frobenius norms relative to the teacher's output: `attention_errors` of each layer's
    self-attention fed with the teacher's inputs, `velocity_error` of the whole model.
    """

    teacher_loss: float
    student_loss: float
    velocity_error: float
    attention_errors: tuple[float, ...]

    @property
    def excess(self) -> float:
        """Loss above the teacher's, as a share of it."""
        return self.student_loss / self.teacher_loss - 1


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """Clips at the noise levels of a validation loss, on the model's device."""

    noisy: Tensor  # [B, C, F, H, W]
    timestep: Tensor  # [B, F]
    context: Tensor  # [B, T, text_dim]
    target: Tensor  # [B, C, F, H, W], noise - data


def noisy_batches(model: WanModel, clips: Clips, *, seed: int = 0) -> list[NoisyBatch]:
    """The clips at noise levels that cover the shift-5 schedule evenly, one independent level per chunk.

    Everything follows from `seed`: the noise, and which of N * chunks equal strata of the schedule each chunk gets. A
    bidirectional model has one level per clip.
    """
    count, _, frames = clips.latents.shape[:3]
    chunks = _chunks(model, frames)
    generator = torch.Generator().manual_seed(seed)
    strata = (torch.randperm(count * len(chunks), generator=generator) + 0.5) / (count * len(chunks))
    sigma = warp(strata).view(count, len(chunks)).repeat_interleave(torch.tensor(chunks), 1)
    noise = torch.randn(clips.latents.shape, generator=generator)
    return _batches(model, clips, noise, sigma)


def _chunks(model: WanModel, frames: int) -> list[int]:
    """Frames of each chunk; a bidirectional model has one."""
    return default_chunks(frames, model.config.streaming) if model.config.streaming else [frames]


def _batches(model: WanModel, clips: Clips, noise: Tensor, sigma: Tensor) -> list[NoisyBatch]:
    """`clips` with `noise` [N, C, F, H, W] at levels `sigma` [N, F], as many at once as `BATCH_TOKENS` allow."""
    _, _, frames, height, width = clips.latents.shape
    tokens = frames // model.config.patch_size[0] * model.config.tokens_per_frame(height, width)
    size = max(1, min(BATCH, BATCH_TOKENS // max(1, tokens)))
    device = model.patch_embedding.weight.device
    parts = (add_noise(clips.latents, noise, sigma), 1000 * sigma, clips.context, noise - clips.latents)
    return [
        NoisyBatch(noisy=x, timestep=t, context=c, target=y)
        for x, t, c, y in zip(*(part.to(device).split(size) for part in parts), strict=True)
    ]


@torch.no_grad()
def validation_loss(model: WanModel, clips: Clips, *, seeds: Sequence[int] = (0,)) -> float:
    """Mean squared velocity error over `clips`, in one masked pass each, for every seed of `noisy_batches`."""
    total = 0.0
    for seed in seeds:
        for batch in noisy_batches(model, clips, seed=seed):
            velocity = model(batch.noisy, batch.timestep, batch.context).float()
            total += float((velocity - batch.target).square().sum())
    return total / (clips.latents.numel() * len(seeds))


@torch.no_grad()
def evaluate(
    teacher: WanModel,
    student: WanModel,
    clips: Clips,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare `student` with the `teacher` that it was converted from; `progress(done, total)` counts batches.

    One layer's activations are held at a time. Raises InputError when their geometries differ.
    """
    same = ("dim", "num_layers", "in_dim", "out_dim", "patch_size", "streaming")
    for name in same:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise InputError(f"the student has {name} {ours}, the teacher {theirs}; give the model it was made from")
    losses = torch.zeros(2, dtype=torch.float64)
    velocity = torch.zeros(2, dtype=torch.float64)
    attention = torch.zeros(2, teacher.config.num_layers, dtype=torch.float64)
    batches = noisy_batches(teacher, clips, seed=seed)
    for done, batch in enumerate(batches, start=1):
        expected = _trace(teacher, student, batch, attention).float()
        found = student(batch.noisy, batch.timestep, batch.context).float()
        losses += _sums(expected - batch.target, found - batch.target)
        velocity += _sums(found - expected, expected)
        if progress is not None:
            progress(done, len(batches))
    per_value = losses / clips.latents.numel()
    errors = (attention[0] / attention[1]).sqrt()
    return Evaluation(
        teacher_loss=float(per_value[0]),
        student_loss=float(per_value[1]),
        velocity_error=float((velocity[0] / velocity[1]).sqrt()),
        attention_errors=tuple(errors.tolist()),
    )


def _sums(*values: Tensor) -> Tensor:
    """Sums of squares, float64 on the CPU."""
    return torch.stack([value.square().sum().double().cpu() for value in values])


def _trace(teacher: WanModel, student: WanModel, batch: NoisyBatch, sums: Tensor) -> Tensor:
    """The teacher's velocity; adds each layer's squared attention error and output to `sums` [2, layers]."""
    p = teacher.prepare(batch.noisy, batch.timestep, batch.context)
    x = p.x
    pairs = zip(cast(Sequence[Block], teacher.blocks), cast(Sequence[Block], student.blocks), strict=True)
    for i, (block, pupil) in enumerate(pairs):
        inputs, expected, x = block.trace(x, p.modulation, p.text, p.image, p.plan)
        found = pupil.self_attn(inputs.to(student.dtype), p.plan)
        sums[0, i] += (found - expected).double().square().sum().cpu()
        sums[1, i] += expected.double().square().sum().cpu()
    return teacher.finish(x, p)


@dataclass(frozen=True, kw_only=True)
class TimestepError:
    """The newest chunk's velocity at a timestep (0 clean, 1000 noise): error relative to the teacher's, and losses."""

    timestep: float
    velocity_error: float
    teacher_loss: float
    student_loss: float


@torch.no_grad()
def velocity_by_timestep(
    teacher: WanModel,
    student: WanModel,
    clips: Clips,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TimestepError, ...]:
    """Velocities of both models along the sampler's schedule: `LEVELS` levels of the shift-5 grid.

    The few-step schedule is among them. Streaming: the last chunk of every clip is at the timestep and the ones before
    it are clean, as in a rollout. Bidirectional: the whole clip is at it. The clean pass (timestep 0) is not among
    them: its velocity is never used.
    """
    chunks = _chunks(teacher, clips.latents.shape[2])
    newest = slice(-chunks[-1], None)
    timesteps = Sampler.many_step(LEVELS).timesteps
    noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(seed))
    found = []
    for done, timestep in enumerate(timesteps, start=1):
        sigma = torch.zeros(clips.latents.shape[0], clips.latents.shape[2])
        sigma[:, newest] = timestep / 1000
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for batch in _batches(teacher, clips, noise, sigma):
            expected, velocity = (
                model(batch.noisy, batch.timestep, batch.context).float()[:, :, newest] for model in (teacher, student)
            )
            target = batch.target[:, :, newest]
            sums += _sums(velocity - expected, expected, expected - target, velocity - target)
            count += target.numel()
        found.append(
            TimestepError(
                timestep=timestep,
                velocity_error=float((sums[0] / sums[1]).sqrt()),
                teacher_loss=float(sums[2]) / count,
                student_loss=float(sums[3]) / count,
            )
        )
        if progress is not None:
            progress(done, len(timesteps))
    return tuple(found)


# --- one model against its teacher -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What teacher and students are given. `rollout` is None when none is wanted.

    `clips_from` and `notes` say in words what the clips are and what to keep in mind.
    """

    clips: Clips
    clips_from: str
    rollout: RolloutPlan | None
    seed: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """Everything measured of one model beside its teacher.

    `cache_bytes` are those of the buffers for one video. `speed`, `drift` and the videos are None without a
    rollout; videos are [B, C, F, H, W] latents on the CPU. `conversion` and `healing` are
    the model's JSON records.
    """

    path: str
    fidelity: Evaluation
    timesteps: tuple[TimestepError, ...]
    cache_bytes: dict[str, int]
    drift: Drift | None = None
    speed: Speed | None = None
    teacher_video: Tensor | None = None
    video: Tensor | None = None
    conversion: dict[str, Any] | None = None
    healing: dict[str, Any] | None = None
    vbench: VBenchScores | None = None
    frame_stride: int = 1

    @property
    def cache_reduction(self) -> float:
        """Share of the teacher's cache that is saved."""
        return 1 - self.cache_bytes["student"] / self.cache_bytes["teacher"]

    @property
    def frames_per_second(self) -> dict[str, float] | None:
        """Video frames per second of teacher and student, without the VAE, and the ratio of their speeds."""
        if self.speed is None:
            return None
        teacher, student = (self.frame_stride * rate for rate in (self.speed.teacher, self.speed.student))
        return {"teacher": teacher, "student": student, "ratio": self.speed.ratio}

    def to_json(self) -> dict[str, Any]:
        """Plain data: every figure, no frames."""
        data: dict[str, Any] = {
            "path": self.path,
            "teacher_loss": self.fidelity.teacher_loss,
            "student_loss": self.fidelity.student_loss,
            "excess": self.fidelity.excess,
            "velocity_error": self.fidelity.velocity_error,
            "velocity_by_timestep": [dataclasses.asdict(step) for step in self.timesteps],
            "attention_errors": list(self.fidelity.attention_errors),
            "drift": None if self.drift is None else self.drift.to_json(),
            "cache_bytes": self.cache_bytes,
            "frames_per_second": self.frames_per_second,
        }
        if self.vbench is not None:
            data["vbench"] = self.vbench.to_json()
        return data


def compare(
    teacher: WanModel, student: WanModel, conditions: Conditions, *, path: str, progress: Progress
) -> ModelEvaluation:
    """Measure `student` against `teacher` under `conditions`. Raises InputError when they do not belong together."""
    clips, seed, plan = conditions.clips, conditions.seed, conditions.rollout
    fidelity = evaluate(teacher, student, clips, seed=seed, progress=_stage(progress, "losses"))
    timesteps = velocity_by_timestep(teacher, student, clips, seed=seed, progress=_stage(progress, "timesteps"))
    height, width = clips.latents.shape[-2:]
    streaming = plan.streaming if plan is not None else student.config.streaming
    cache_bytes = {
        who: LatentCache(
            model.config,
            batch=1,
            height=height,
            width=width,
            streaming=streaming,
            dtype=model.dtype,
            device=model.patch_embedding.weight.device,
        ).nbytes
        for who, model in (("teacher", teacher), ("student", student))
    }
    found = ModelEvaluation(
        path=path,
        fidelity=fidelity,
        timesteps=timesteps,
        cache_bytes=cache_bytes,
        frame_stride=default_video(student.config).frame_stride,
    )
    if plan is None:
        return found
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("rollouts", done, 3 * plan.passes)

    expected, video, speed = paired_rollouts(teacher, student, plan, step)
    other = torch.cat(list(plan.chunks(teacher, seed=plan.other_seed, on_step=step)), 2)
    return dataclasses.replace(
        found,
        drift=compare_videos(expected, video, other, given=plan.given),
        speed=speed,
        teacher_video=expected,
        video=video,
    )


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    progress(name, 0, 1)
    return lambda done, total: progress(name, done, total)


# --- several models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """Several models beside one teacher, with everything needed to measure again.

    `data`, `conditions` and `versions` are plain data; `pixels` is true when latents are RGB pixels in [-1, 1].
    """

    teacher: str
    data: dict[str, Any]
    conditions: dict[str, Any]
    versions: dict[str, str]
    pixels: bool
    models: tuple[ModelEvaluation, ...]
    teacher_vbench: VBenchScores | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, as evaluation.json holds it: every figure, no frames."""
        data: dict[str, Any] = {
            "teacher": self.teacher,
            "data": self.data,
            "conditions": self.conditions,
            "versions": self.versions,
            "models": [model.to_json() for model in self.models],
        }
        if self.teacher_vbench is not None:
            data["teacher_vbench"] = self.teacher_vbench.to_json()
        return data

    def only(self, index: int) -> Report:
        """The same with one model."""
        return dataclasses.replace(self, models=(self.models[index],))


def make_report(
    teacher: WanModel, name: str, conditions: Conditions, models: Sequence[ModelEvaluation], **extra: Any
) -> Report:
    """A report of `models`, evaluated beside `teacher` (called `name`) under `conditions`."""
    clips, plan = conditions.clips, conditions.rollout
    count, _, frames, height, width = clips.latents.shape
    device = teacher.patch_embedding.weight.device
    streaming = teacher.config.streaming
    return Report(
        teacher=name,
        data={
            "from": conditions.clips_from,
            "clips": count,
            "latent_frames": frames,
            "latent_height": height,
            "latent_width": width,
        },
        conditions={
            "seed": conditions.seed,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "attention": teacher.attention_mode,
            "streaming": dataclasses.asdict(streaming) if streaming else None,
            "rollout": None if plan is None else _plan_json(plan),
            "notes": list(conditions.notes),
        },
        versions={"mlaconvert": __version__, "torch": torch.__version__, "python": platform.python_version()},
        pixels=teacher.config.out_dim == 3,
        models=tuple(models),
        **extra,
    )


def _plan_json(plan: RolloutPlan) -> dict[str, Any]:
    return {
        "videos": plan.context.shape[0],
        "latent_frames": plan.frames,
        "given_frames": plan.given,
        "window_frames": plan.streaming.window_frames,
        "timesteps": [round(t, 4) for t in plan.sampler.timesteps],
        "renoise": plan.sampler.renoise,
        "guidance": plan.sampler.guidance,
        "seed": plan.seed,
        "other_seed": plan.other_seed,
    }


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `evaluate_models` may be asked for; None takes the default.

    `data` is a folder of clips, `clips` how many (by default 64 of the built-in model's, else 8). `frames` is the
    length of the rollouts in latent frames (0 for none), `videos` their number. `steps` are Euler steps (by default 12
    for the built-in model, the few-step schedule for streaming checkpoints, 20 for others). `dtype` is that of both
    models, by default the first converted one's.
    """

    teacher: str | None = None
    data: Path | None = None
    clips: int | None = None
    frames: int = 60
    videos: int = 3
    steps: int | None = None
    seed: int = 0
    revision: str | None = None  # of the models, not of the teacher
    subfolder: str | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("frames", 0), ("videos", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: give {least} or more")


def evaluate_models(
    sources: Sequence[str],
    request: Request,
    *,
    vbench: Sequence[VBenchScores] = (),
    teacher_vbench: VBenchScores | None = None,
    progress: Progress,
    on_model: Callable[[int, Report], None] | None = None,
) -> Report:
    """Evaluate converted models side by side: folders, checkpoints or Hub ids that were made from one teacher.

    The teacher is the one that conversion.json records, found by its name (from here, beside the model, or on the Hub)
    and checked by its hash, unless `request` names another. Two models are in memory at a time. `vbench` are
    scores of the models, in order. `on_model(index, report)` is told of each model as soon as it is done.

    Raises InputError for models that cannot be compared, a teacher that cannot be found, and unfit clips.
    """
    if not sources:
        raise InputError("no model to evaluate; name at least one folder, checkpoint or Hub id")
    if vbench and len(vbench) != len(sources):
        raise InputError(f"{len(vbench)} VBench results for {len(sources)} models; give one for each, in their order")
    records = _records(sources, request)
    first = records[0]
    with open_teacher(
        first.source, first.conversion, teacher=request.teacher, subfolder=request.subfolder, progress=progress
    ) as opened:
        teacher = load_model(
            opened, dtype=request.dtype or first.dtype, device=request.device, streaming=first.config.streaming
        )
        conditions = _conditions(opened, teacher, first, request, progress)
        name = public_name(opened.store.source)
    found: list[ModelEvaluation] = []
    for i, record in enumerate(records):
        student = load_model(
            record.source,
            revision=request.revision,
            subfolder=request.subfolder,
            dtype=teacher.dtype,
            device=request.device,
        )
        model = dataclasses.replace(
            compare(teacher, student, conditions, path=record.name, progress=progress),
            conversion=record.conversion,
            healing=record.healing,
            vbench=vbench[i] if vbench else None,
        )
        del student  # before the next one is loaded
        found.append(model)
        if on_model is not None:
            on_model(i, make_report(teacher, name, conditions, [model], teacher_vbench=teacher_vbench))
    return make_report(teacher, name, conditions, found, teacher_vbench=teacher_vbench)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What a model's files say before its weights are read."""

    source: str
    name: str
    config: WanConfig
    dtype: torch.dtype
    conversion: dict[str, Any] | None
    healing: dict[str, Any] | None

    def recorded(self, name: str) -> Any:
        """A field of the source that conversion.json names, or None."""
        source = (self.conversion or {}).get("source")
        return source.get(name) if isinstance(source, dict) else None


def _records(sources: Sequence[str], request: Request) -> list[_Record]:
    """The models' records. Raises InputError for models that cannot be evaluated, or not side by side."""
    names = [public_name(source) for source in sources]
    if len(set(names)) < len(names):  # folders of one name: their parents tell them apart
        names = ["/".join(Path(source).expanduser().resolve().parts[-2:]) for source in sources]
    records = []
    for source, name in zip(sources, names, strict=True):
        if not request.subfolder and (pair := experts(source, request.revision)):
            raise InputError(
                f"{source} holds two experts; evaluate one with --subfolder {pair[0]} or --subfolder {pair[1]}"
            )
        with open_checkpoint(source, revision=request.revision, subfolder=request.subfolder) as opened:
            if opened.config.in_dim != opened.config.out_dim or opened.config.image_dim is not None:
                raise UnsupportedModelError(
                    f"{source} is an image-to-video model; clips hold no image for it, so it cannot be evaluated yet"
                )
            records.append(
                _Record(
                    source=source,
                    name=name,
                    config=opened.config,
                    dtype=opened.info("patch_embedding.weight").dtype,
                    conversion=_read_record(opened.store, CONVERSION_NAME),
                    healing=_read_record(opened.store, HEALING_NAME),
                )
            )
    first = records[0]
    for record in records[1:]:
        if record.config.streaming != first.config.streaming:
            raise InputError(f"{first.name} and {record.name} see time differently; evaluate them one by one")
        if request.teacher is None and record.recorded("sha256") != first.recorded("sha256"):
            raise InputError(f"{first.name} and {record.name} come from different teachers; evaluate them one by one")
    return records


def _read_record(store: TensorStore, name: str) -> dict[str, Any] | None:
    """A JSON file beside a model's weights, here or on the Hub; None without one."""
    path = find_beside(store, name)
    return None if path is None else read_record(path)


@contextmanager
def open_teacher(
    source: str,
    conversion: Mapping[str, Any] | None,
    *,
    teacher: str | None = None,
    subfolder: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Checkpoint]:
    """The model that `source` was converted from: `teacher`, or what its `conversion` (conversion.json) records.

    That one is looked for by its name, from here or on the Hub at the recorded commit, then beside `source`, and is
    taken only if its hash is the recorded one. Of two experts it is the recorded one, or `subfolder`. LoRAs that were
    merged before the conversion are looked for in the same places and merged again. Raises InputError when something
    is not found.
    """
    recorded = (conversion or {}).get("source") or {}
    inside = recorded.get("subfolder") or None
    if teacher is not None:
        pair = experts(teacher)
        with open_checkpoint(teacher, subfolder=next((f for f in (inside, subfolder) if f in pair), None)) as opened:
            # The base of a LoRA that was merged is not the teacher yet; what was merged by hand is.
            base = bool(recorded.get("loras")) and _sha256(opened, progress) == recorded.get("sha256")
            with _with_loras(_as_taken(opened, conversion), recorded if base else {}, source) as merged:
                yield merged
        return
    places = recorded_places(recorded)
    if not places:
        raise InputError(f"{source} does not record what it was converted from; name it with --teacher")
    name, reason = places[0][0], ""
    for candidate, revision in (*places, *((path, None) for path in _beside(source, name))):
        try:
            opened = open_checkpoint(
                candidate, revision=revision, subfolder=inside, state_key=recorded.get("state_key")
            )
        except CheckpointError as error:
            reason = reason or str(error)
            continue
        with opened:
            if _sha256(opened, progress) == recorded.get("sha256"):
                with _with_loras(_as_taken(opened, conversion), recorded, source) as merged:
                    yield merged
                return
        reason = f"{candidate} is another model: its SHA-256 differs"
    raise InputError(f"{source} was converted from {name}, which was not found ({reason}); name it with --teacher")


def _as_taken(opened: Checkpoint, conversion: Mapping[str, Any] | None) -> Checkpoint:
    """A few-step student whose own files do not say so, as the recipe of its conversion took it."""
    recipe = (conversion or {}).get("recipe") or {}
    if opened.config.streaming is not None or not opened.timing.assumed or recipe.get("few_step") is not True:
        return opened
    section = recipe.get("streaming")
    streaming = None if section is None else parse(StreamingConfig, section, f"{CONVERSION_NAME}: recipe.streaming")
    config = dataclasses.replace(opened.config, streaming=streaming, few_step=True)
    return dataclasses.replace(opened, config=config, timing=Timing(streaming=streaming, few_step=True))


def _with_loras(opened: Checkpoint, recorded: Mapping[str, Any], source: str) -> Checkpoint:
    """`opened` with the LoRAs of a recorded source: from here, beside the converted model, or beside the base."""
    folders = [Path(), *_around(source), *_around(str(opened.store.path))]
    return merge_loras(opened, find_recorded(recorded.get("loras"), folders))


def _beside(source: str, name: str) -> list[str]:
    """Where `name` would lie beside a model on this disk."""
    return [str(folder / name) for folder in _around(source)[:1] if "/" not in name]


def _around(source: str) -> list[Path]:
    """The folder that a model on this disk lies in, and its own."""
    path = Path(source).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    return [folder.parent, folder] if path.exists() else []


def _sha256(opened: Checkpoint, progress: Progress | None) -> str:
    total, done = sum(file.stat().st_size for file in opened.store.files), 0

    def count(piece: int) -> None:
        nonlocal done
        done += piece
        if progress is not None:
            progress("hash", done, total)

    return opened.store.sha256(count)


def _conditions(
    opened: Checkpoint, teacher: WanModel, record: _Record, request: Request, progress: Progress
) -> Conditions:
    by_hand: list[str] = []
    if request.teacher is not None:
        by_hand.append("The teacher was named by hand; its hash was not compared with the recorded one.")
    if request.data is None and (opened.is_tiny or comes_from_tiny(record.conversion)):
        drawn = tiny_conditions(
            teacher.config.streaming,
            clips=request.clips or 64,
            frames=request.frames,
            videos=request.videos,
            steps=request.steps or TINY_STEPS,
            seed=request.seed,
        )
        return dataclasses.replace(drawn, notes=(*drawn.notes, *by_hand))
    notes = ["One seed: small differences mean nothing.", *by_hand]
    if opened.config.streaming != teacher.config.streaming:
        notes.append("The teacher runs with the converted model's window, which it was not trained with.")
    if request.subfolder or record.recorded("subfolder"):
        notes.append("One expert alone runs at every noise level.")
    usual = Sampler.usual(few_step=opened.config.few_step)
    sampler = Sampler.many_step(request.steps) if request.steps else usual
    if request.data is not None:
        clips = load_clips(request.data, opened.config, request.clips or 8)
        clips_from = f"clips of the folder {request.data.resolve().name}"
    else:
        recipe = (record.conversion or {}).get("recipe") or {}
        clips = generated_clips(
            teacher, request.clips or 8, recipe, sampler=sampler, seed=request.seed, progress=progress
        )
        clips_from = "rollouts of the teacher from an empty caption, other ones than a calibration sees"
        notes.append("The clips are the teacher's own, so its loss is lower than on real video.")
    return Conditions(
        clips=clips,
        clips_from=clips_from,
        rollout=_plan(teacher.config.streaming, clips, request.frames, request.videos, sampler, None, request.seed),
        seed=request.seed,
        notes=tuple(notes),
    )


def tiny_conditions(
    streaming: StreamingConfig | None,
    *,
    clips: int = 64,
    frames: int = 60,
    videos: int = 3,
    steps: int = TINY_STEPS,
    seed: int = 0,
) -> Conditions:
    """Held-back clips of the built-in model, and rollouts that continue them with its own guidance.

    `frames`, `videos` and `steps` are as in `Request`.
    """
    drawn = held_back(clips)
    sampler = Sampler.many_step(steps, guidance=TINY_GUIDANCE)
    return Conditions(
        clips=drawn,
        clips_from="clips of the built-in model that training never drew",
        rollout=_plan(streaming, drawn, frames, videos, sampler, null_context(), seed),
        seed=seed,
        notes=("One seed: small differences mean nothing.",),
    )


def _plan(
    streaming: StreamingConfig | None,
    clips: Clips,
    frames: int,
    videos: int,
    sampler: Sampler,
    empty: Tensor | None,
    seed: int,
) -> RolloutPlan | None:
    """Rollouts that continue the first chunk of some clips; a bidirectional model generates whole clips instead."""
    if frames == 0:
        return None
    latents, context = clips.latents[:videos], clips.context[:videos]
    length, height, width = latents.shape[2:]
    prefix = latents[:, :, : streaming.chunk_frames] if streaming and length >= streaming.chunk_frames else None
    if prefix is not None and frames <= prefix.shape[2]:
        raise ConfigError(f"frames is {frames}, of which {prefix.shape[2]} are given; give more, or 0 for no rollout")
    return RolloutPlan(
        context=context,
        prefix=prefix,
        frames=frames if streaming else length,
        height=height,
        width=width,
        sampler=sampler,
        null_context=empty,
        streaming=streaming or _whole(length),
        seed=seed,
    )


def _whole(frames: int) -> StreamingConfig:
    """All frames in one chunk: how a bidirectional model generates."""
    return StreamingConfig(chunk_frames=frames, window_frames=frames, sink_frames=0)


def generated_clips(
    teacher: WanModel,
    count: int,
    recipe: Mapping[str, Any],
    *,
    sampler: Sampler,
    seed: int,
    progress: Progress,
    frames: int = 9,
) -> Clips:
    """`count` clips that the teacher makes of an empty caption, none of which a calibration of that `seed` sees.

    Their size is the one in `recipe`, the fields of a ConvertRecipe; by default what such a model is usually run at.
    """
    config, video = teacher.config, default_video(teacher.config)
    stride = recipe.get("vae_stride") or video.vae_stride
    height, width = ((recipe.get(name) or getattr(video, name)) // stride for name in ("height", "width"))
    streaming = config.streaming or _whole(frames)
    tokens = min(frames, streaming.window_frames) * config.tokens_per_frame(height, width)
    size = max(1, min(BATCH, BATCH_TOKENS // tokens))
    done = 0
    total = -(-count // size) * passes(frames, sampler, streaming)

    def step() -> None:
        nonlocal done
        done += 1
        progress("clips", done, total)

    return own_clips(
        teacher,
        count,
        frames=frames,
        height=height,
        width=width,
        sampler=sampler,
        # A calibration starts its rollouts at the recipe's seed; these are far from it.
        seed=1_000_000_007 + count * seed,
        streaming=streaming,
        batch=size,
        on_step=step,
    )
