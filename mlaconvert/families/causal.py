"""How a model sees time, as the streaming codebases write it into a config.json, and what is assumed where none does.

Everything is counted in latent frames. `local_attn_size` (Self-Forcing and its kin), `sliding_window_num_frames`
(FastVideo, SGLang) and `max_attention_num_frames` (SGLang's Rolling Forcing, whose cache is larger) are all that a
query sees: sink, cache and its own chunk, as `StreamingConfig.window_frames` has it; -1 is no window.
`max_attention_size` counts tokens, which the codebases reckon at 480 x 832 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from math import isclose, isfinite
from typing import Any, Literal

from mlaconvert.config.parsing import parse
from mlaconvert.config.streaming import FEW_STEPS, SHIFT, StreamingConfig
from mlaconvert.errors import ConfigError

# What Self-Forcing, CausVid and Causal-Forcing publish: no window but the 21 frames that their cache holds.
STUDENT = StreamingConfig(chunk_frames=3, window_frames=21, sink_frames=0, positions="absolute")
SETTINGS = tuple(field.name for field in fields(StreamingConfig))
EVERYTHING = frozenset(("streaming", *SETTINGS, "few_step"))

_SKYREELS_FRAMES = 31  # SkyReels-V2's longest clip, which it sees whole
_FRAME_TOKENS = 1560  # of 480 x 832 pixels
_MOST_FRAMES = 10_000
_MOST_TOKENS = 2**31 - 1

_CHUNK = ("num_frame_per_block", "num_frames_per_block")
_CACHE = ("local_attn_size", "sliding_window_num_frames")
_CAP, _TOKENS = "max_attention_num_frames", "max_attention_size"
_CAUSAL = ("causal", "is_causal", "flag_causal_attention")
_RELATIVE = ("use_infinite_attention", "use_relative_rope")
_PAST, _RECOMPUTED, _KREA_PAST = "kv_cache_num_frames", "do_kv_recomp", 3  # Krea's, and what its server starts with
_SECTIONS = ("model_kwargs", "arch_config", "inference")  # where codebases nest these fields
_NUMBERS = {  # field: the least and the most
    **dict.fromkeys(_CHUNK, (1, _MOST_FRAMES)),
    **dict.fromkeys((*_CACHE, _CAP), (-1, _MOST_FRAMES)),
    "sink_size": (0, _MOST_FRAMES),
    _TOKENS: (1, _MOST_TOKENS),
    "bank_size": (0, _MOST_FRAMES),
    _PAST: (1, _MOST_FRAMES),
    "sampling_steps": (1, 1000),
}
_FLAGS = (
    *(*_CAUSAL, *_RELATIVE, _RECOMPUTED),
    *("independent_first_frame", "warp_denoising_step", "multi_shot_sink"),
)
_POLICIES = {"absolute": "absolute", "relativistic": "window"}  # FastVideo's rope_cache_policy: our positions
_OTHERS = (
    *("rope_cache_policy", "denoising_step_list", "timestep_shift", "compression_alpha"),
    *("guidance_scale", "multi_shot_rope_offset"),
)

_CAUSAL_CLASS = re.compile(
    r"causal|causvid|forcing|infinity|longlive|memflow|autoregress|streaming|realtime", re.IGNORECASE
)
_ROLLING_CLASS = re.compile(r"rolling_?forcing", re.IGNORECASE)
_RELATIVE_CLASS = re.compile(r"rolling_?forcing|infinity", re.IGNORECASE)
_SKYREELS_CLASS = re.compile(r"skyreels", re.IGNORECASE)
_WHOLE_CLASS = re.compile(r"Wan(2_[12])?(Model|Transformer3DModel)")  # Wan's own, diffusers', VideoX-Fun's
_FEW_STEP_PIPELINE = re.compile(r"dmd|(self|causal|rolling)_?forcing", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How a model sees time and is sampled.

    `assumed` names the settings (of `EVERYTHING`) that no file states; `remarks` are sentences on what a file states
    and what is not done here.
    """

    streaming: StreamingConfig | None = None
    few_step: bool = False
    assumed: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


def is_causal_class(raw: Mapping[str, Any] | None) -> bool:
    """Whether the class that a config.json names is a streaming codebase's."""
    return bool(_CAUSAL_CLASS.search(_class_name(raw or {})))


def read_timing(
    raw: Mapping[str, Any] | None,
    *,
    student: bool = False,
    script: bool = False,
    pipeline: str = "",
    where: str = "config.json",
) -> Timing:
    """What a config.json (None without one) says of time: in our own section, else in the fields of a codebase.

    `student` tells that the weights lie under a streaming codebase's key, `script` that the fields are those of such a
    codebase's scripts, `pipeline` is the class in model_index.json.
    Raises ConfigError naming `where` and the field for an impossible value, and for two that contradict each other.
    """
    raw = raw or {}
    if "streaming" in raw:  # stands above what was left of the source's fields
        section = raw["streaming"]
        own = None if section is None else parse(StreamingConfig, section, f"{where}: streaming")
        return Timing(streaming=own, few_step=student or raw.get("few_step") is True)
    found, name = _gather(raw, where), _class_name(raw)
    few_step, stated = _steps(raw, found, name, pipeline, student=student)
    steps = frozenset[str]() if stated else frozenset(("few_step",))
    if _is_causal(found, name, where, student=student or (script and not found.keys().isdisjoint(_CHUNK))):
        streaming, assumed = _streaming(found, name, where)
        return Timing(
            streaming=streaming, few_step=few_step, assumed=assumed | steps, remarks=tuple(_remarks(found, name))
        )
    denied = any(found.get(flag) is False for flag in _CAUSAL)
    # Wan's own class sees whole clips and takes many steps; fields of time beside it are odd.
    whole = _WHOLE_CLASS.fullmatch(name) and not found.keys() & _NUMBERS.keys()
    told = bool(denied or _SKYREELS_CLASS.search(name) or whole)
    return Timing(few_step=few_step, assumed=frozenset() if told else EVERYTHING - {"few_step"} | steps)


def assumption_line(
    timing: Timing,
    *,
    streaming: StreamingConfig | None,
    few_step: bool,
    given: Collection[str] = (),
    how: Literal["convert", "generate", "file"] = "file",
) -> str | None:
    """One line on the settings that neither the files nor options or a recipe (`given`) state; None without any.

    It tells what they are taken to be, of `streaming` and `few_step` as they are used, and how to set them: by options
    of `convert` or `generate`, or by the "file".
    """
    left = timing.assumed - set(given)
    bidirectional = timing.streaming is None and not set(given) & {"streaming", *SETTINGS}
    if not bidirectional:  # the files, or an option, say that it streams
        left -= {"streaming"}
    if streaming is None:
        left &= {"streaming", "few_step"}
    if not left:
        return None
    parts = ["a bidirectional model"] if "streaming" in left else []
    if streaming is not None:
        sink, positions = streaming.sink_frames, "start" if streaming.positions == "absolute" else "sink"
        words = {
            "window_frames": f"a window of {streaming.window_frames} latent frames",
            "chunk_frames": f"chunks of {streaming.chunk_frames}",
            "sink_frames": f"a sink of {sink}" if sink else "no sink",
            "positions": f"positions counted from the {positions}",
        }
        parts += [text for name, text in words.items() if name in left]
    if "few_step" in left:
        parts.append("few steps" if few_step else "many steps")
    wanted = [name for name in (*SETTINGS, "few_step") if name in left or "streaming" in left]
    options = ", ".join("--" + name.replace("_", "-") for name in wanted)
    student = " (self-forcing-1.3b: a streaming student)" if bidirectional else ""
    change = {
        "convert": f"{options}, or a recipe{student}",
        "generate": options,
        "file": "`streaming` and `few_step` in a config.json beside the weights",
    }[how]
    return f"assumed, as no file or option states it: {', '.join(parts)}; to set it: {change}"


def _class_name(raw: Mapping[str, Any]) -> str:
    name = raw.get("_class_name")
    return name if isinstance(name, str) else ""


def _gather(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of time at the top level and in the sections where codebases nest them, checked; null is absent."""
    found: dict[str, Any] = {}
    for section in ("", *_SECTIONS):
        part = raw.get(section) if section else raw
        fields_there = part if isinstance(part, Mapping) else {}
        for name in (*_NUMBERS, *_FLAGS, *_OTHERS):
            value = fields_there.get(name)
            if value is None or (name == "guidance_scale" and section != "inference"):  # elsewhere it is training's
                continue
            label = f"{section}.{name}" if section else name
            _check(label, name, value, where)
            if found.setdefault(name, value) != value and name not in _OTHERS:
                raise ConfigError(f"{where}: {label} is {value}, and {name} elsewhere in it {found[name]}; keep one")
    return found


def _check(label: str, name: str, value: Any, where: str) -> None:
    """Raise ConfigError for a value that the field cannot have."""
    expected = ""
    if name in _NUMBERS:
        least, most = _NUMBERS[name]
        if type(value) is not int or not least <= value <= most or (least < 0 and value == 0):
            none = ", or -1 for none" if least < 0 else ""
            expected = f"a whole number from {max(1, least) if least else 0} to {most}{none}"
    elif name in _FLAGS:
        expected = "" if isinstance(value, bool) else "true or false"
    elif name == "rope_cache_policy":
        expected = "" if value in tuple(_POLICIES) else " or ".join(_POLICIES)
    elif name == "denoising_step_list":
        good = isinstance(value, list) and value and all(_is_number(step) and 0 <= step <= 1000 for step in value)
        expected = "" if good else "a list of timesteps from 0 to 1000"
    else:
        expected = "" if _is_number(value) else "a number"
    if expected:
        raise ConfigError(f"{where}: {label} is {value!r}; give {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _stated(found: Mapping[str, Any], names: Collection[str], where: str) -> int | None:
    """The one positive number that fields of the same meaning state."""
    values = {name: found[name] for name in names if found.get(name, -1) > 0}
    if len(set(values.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in values.items())
        raise ConfigError(f"{where}: {said} contradict each other; keep one")
    return next(iter(values.values()), None)


def _is_causal(found: Mapping[str, Any], name: str, where: str, *, student: bool) -> bool:
    """Whether the model is causal: by its class, a flag, the key its weights lie under, or a window, sink or chunk."""
    flags = {found[flag]: flag for flag in _CAUSAL if flag in found}
    window = next((field for field in (*_CACHE, _CAP) if found.get(field, -1) > 0), None)
    if False in flags:
        against = f"_class_name {name}" if _CAUSAL_CLASS.search(name) else flags.get(True) or window
        if against is not None:
            raise ConfigError(f"{where}: {flags[False]} is false, which {against} contradicts; keep one of them")
        return False
    evidence = window or found.get("sink_size", 0) > 0 or any(found.get(field, 1) > 1 for field in _CHUNK)
    return bool(True in flags or evidence or student or _CAUSAL_CLASS.search(name))


def _streaming(found: Mapping[str, Any], name: str, where: str) -> tuple[StreamingConfig, frozenset[str]]:
    """The settings that the fields mean, and which of them they leave to be assumed."""
    rolling, skyreels = _ROLLING_CLASS.search(name), _SKYREELS_CLASS.search(name) or "flag_causal_attention" in found
    chunk, sink = _stated(found, _CHUNK, where), found.get("sink_size")
    window, positions = _window(found, where, rolling=bool(rolling)), _positions(found, name, where)
    recomputed = found.get(_RECOMPUTED, False)
    missing = {"chunk_frames": chunk, "window_frames": window, "sink_frames": sink, "positions": positions}
    assumed = {setting for setting, value in missing.items() if value is None}
    if skyreels:  # its frames count from the start, and none of them is a sink
        assumed -= {"sink_frames", "positions"}
    if recomputed:  # from the first frame and the newest ones
        assumed -= {"sink_frames"}
    chunk = chunk or (1 if skyreels else STUDENT.chunk_frames)
    sink = sink if sink is not None else chunk if rolling else int(recomputed)
    if window is None and (_PAST in found or recomputed):
        window = found.get(_PAST, _KREA_PAST) + chunk
        assumed -= {"window_frames"} if _PAST in found else set()
    if window is None:  # in whole chunks
        window = -(-max(_SKYREELS_FRAMES if skyreels else STUDENT.window_frames, sink + chunk) // chunk) * chunk
    try:
        streaming = StreamingConfig(
            chunk_frames=chunk, window_frames=window, sink_frames=sink, positions=positions or STUDENT.positions
        )
    except ConfigError as error:
        stated = ", ".join(f"{field} {found[field]}" for field in _NUMBERS if field in found)
        raise ConfigError(f"{where}: {stated} do not go together: {error}") from None
    return streaming, frozenset(assumed)


def _window(found: Mapping[str, Any], where: str, *, rolling: bool) -> int | None:
    """All frames that a query sees; None when no field says it. Raises ConfigError for fields that contradict."""
    cache, cap, tokens = _stated(found, _CACHE, where), _stated(found, (_CAP,), where), found.get(_TOKENS)
    if cache is not None and cap is not None and cap > cache:
        raise ConfigError(f"{where}: {_CAP} {cap} is more than the {cache} frames of the cache; mend one of them")
    window = cap if rolling or cap is not None else cache
    if tokens is None:
        return window
    if tokens % (window or _FRAME_TOKENS):
        frames = f"the window of {window} frames" if window else f"frames of {_FRAME_TOKENS} tokens (480 x 832 pixels)"
        raise ConfigError(
            f"{where}: {_TOKENS} is {tokens} tokens, which {frames} do not divide; give local_attn_size in frames"
        )
    return window or tokens // _FRAME_TOKENS


def _positions(found: Mapping[str, Any], name: str, where: str) -> Literal["window", "absolute"] | None:
    """From where the codebase counts frames; None when it is not known."""
    said = {flag: "window" if found[flag] else "absolute" for flag in _RELATIVE if flag in found}
    if "rope_cache_policy" in found:
        said["rope_cache_policy"] = _POLICIES[found["rope_cache_policy"]]
    if len(set(said.values())) > 1:
        raise ConfigError(f"{where}: {' and '.join(said)} contradict each other; keep one")
    if said:
        return "window" if "window" in said.values() else "absolute"
    if _RELATIVE_CLASS.search(name) or found.get(_RECOMPUTED):
        return "window"
    return "absolute" if _CAUSAL_CLASS.search(name) else None


def _steps(
    raw: Mapping[str, Any], found: Mapping[str, Any], name: str, pipeline: str, *, student: bool
) -> tuple[bool, bool]:
    """Whether the model was distilled to few steps, and whether a file states that."""
    if isinstance(raw.get("few_step"), bool):
        return raw["few_step"], True
    if "denoising_step_list" in found or _ROLLING_CLASS.search(name) or _FEW_STEP_PIPELINE.search(pipeline):
        return True, True
    if "sampling_steps" in found:  # of a solver that adds no noise again
        return False, True
    return student, bool(_SKYREELS_CLASS.search(name) or "flag_causal_attention" in found)


def _remarks(found: Mapping[str, Any], name: str) -> list[str]:
    remarks = []
    if _ROLLING_CLASS.search(name):
        remarks.append(
            f"{name} denoises several chunks at once, each at a noise level of its own; here it makes one chunk after "
            "the other, in four steps (its own: --timesteps 1000,800,600,400,200)"
        )
    if found.get("independent_first_frame"):
        remarks.append("independent_first_frame: its first frame is a chunk of its own; here all chunks are alike")
    if found.get("bank_size"):
        remarks.append(f"bank_size {found['bank_size']}: the memory of chosen frames (MemFlow) is not kept here")
    if "compression_alpha" in found:
        remarks.append("compression_alpha: evicted frames are not blended into the sink (Reward-Forcing) here")
    if found.get(_RECOMPUTED):
        remarks.append(
            f"{_RECOMPUTED}: the past is not computed again from the last clean frames before every chunk (Krea); it "
            "stays in the cache as it was made"
        )
    if found.get("multi_shot_sink") or found.get("multi_shot_rope_offset"):
        remarks.append(
            "multi_shot_sink: a new shot's first chunk becomes no sink, nor is it moved in time (LongLive 2)"
        )
    if steps := found.get("sampling_steps"):
        guidance, shift = found.get("guidance_scale"), found.get("timestep_shift", SHIFT)
        guided = "" if guidance is None else f" --guidance {guidance:g}"
        remarks.append(
            f"sampling_steps {steps}: its own steps integrate the flow by UniPC, here by Euler's rule: generate with "
            f"--steps {steps} --shift {shift:g}{guided}"
        )
    schedule = _other_schedule(found)
    if schedule is not None:
        remarks.append(f"denoising_step_list is another few-step schedule than ours: generate with {schedule}")
    return remarks


def _other_schedule(found: Mapping[str, Any]) -> str | None:
    """Options of `generate` for the few-step schedule of a config, if it is not the usual one."""
    steps = [step for step in found.get("denoising_step_list", ()) if step]
    if not steps:
        return None
    warped = found.get("warp_denoising_step", False)
    shift = found.get("timestep_shift", SHIFT) if warped else 1
    usual = FEW_STEPS if warped else [1000 * SHIFT * t / (1000 + (SHIFT - 1) * t) for t in FEW_STEPS]
    same = len(steps) == len(usual) and all(isclose(a, b, abs_tol=1) for a, b in zip(steps, usual, strict=True))
    if same and (not warped or shift == SHIFT):
        return None
    return f"--timesteps {','.join(f'{step:g}' for step in steps)} --shift {shift:g}"
