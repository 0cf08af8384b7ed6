"""`collect`: a recorder around a run of a model's own code."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.collected.record import (
    MOST_WINDOWS,
    VERSION,
    WINDOWS,
    Collected,
    Record,
    digest,
    is_collected,
)
from mlaconvert.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from mlaconvert.files.output import AnyOutput, as_output
from mlaconvert.files.staging import Staging, disk_errors
from mlaconvert.files.whole import remove_partial
from mlaconvert.integrations.collect.passes import Attention, Read, read_pass
from mlaconvert.integrations.collect.recorder import Recorder
from mlaconvert.integrations.streaming.codebase import causal_model, self_attentions


@dataclasses.dataclass
class Collection:
    """What a run has brought so far, and at its end all."""

    folder: Path
    """Where it is put when the run has ended."""
    streaming: StreamingConfig | None
    """The window that is recorded; None of whole clips."""
    record: Record | None = None
    """What `collected.json` says, once the run has ended."""


@contextmanager
def collect(
    model: nn.Module,
    *,
    output: AnyOutput,
    streaming: StreamingConfig | None = None,
    windows: int = 12,
    read: Read | None = None,
) -> Iterator[Collection]:
    """Record in the new folder `output` what a calibration needs, while the block runs a model in its own code.

    with collect(pipeline.generator.model, output="moments", streaming=StreamingConfig(window_frames=7)):
        for prompt in prompts:
            pipeline.inference(noise, [prompt])

    `mlaconvert convert CHECKPOINT -o OUT --moments moments` then calibrates from it, and `swap_attention` puts the
    result into the same code. `model` holds one Wan transformer with `blocks` of `self_attn`, whatever else is in them.

    Recorded is a random sample of `windows` windows: the inputs x [1, N, D] of every layer's self-attention in one pass
    of one video, of the newest chunk and of all past frames that it sees, as they were when they were last run. From
    these follows all that a layer's conversion is chosen and refitted by: mean and covariance of what is cached, key
    norms, second moments of queries, mean rotations, the sensitivity of the output to each direction of the inputs (by
    gradients of that layer alone, taken later), and the teacher's output. What follows from the whole model is not
    there: how scalars are shared between layers, the refit of all layers at once, and losses; `convert` says so. A
    window takes N * D * layers scalars on the disk, in the inputs' dtype: 1.0 GB of Wan2.1 1.3B, 7 frames, 480 x 832.

    `streaming` is the window that the code runs with; None takes it from the model's local_attn_size and sink_size, or
    is for models without a cache, which see whole clips. Every window is proved: Wan's attention of what was recorded
    has to be what theirs gave, or the first such window raises UnsupportedModelError and later ones are left out with a
    warning. So clean passes need not be told from noisy ones, and no window, sink or position is guessed. `read` gives
    the `Pass` of one call, by its arguments' names, for code that calls its attention otherwise than Wan's kin.

    The folder appears when the block ends. A KeyboardInterrupt or SystemExit ends it as well, and is noted there. After
    any other error what is recorded is kept in the hidden folder `.NAME.partial`, and the same call goes on with it.
    Raises UnsupportedModelError for a model whose self-attention is not Wan's, ConfigError for a window that has to be
    given, OutputError for an output that exists or has no room, InputError when no chunk with a past was run.
    """
    if not isinstance(windows, int) or isinstance(windows, bool) or not 1 <= windows <= MOST_WINDOWS:
        raise ConfigError(f"windows is {windows!r}: give a whole number from 1 to {MOST_WINDOWS:,}")
    target = as_output(output)
    modules, streaming = _attentions(model, streaming)
    staging = Staging(target.path, "collect", overwrite=target.overwrite, inside="collected")
    staging.check(0, kind="collection", replaceable=is_collected)
    first = modules[0]
    start: dict[str, Any] = {
        "version": VERSION,
        "dim": first.dim,
        "num_heads": first.heads,
        "num_layers": len(modules),
        "weights_dtype": str(first.dtype).removeprefix("torch."),
        "weights": tuple(digest(one.weights.tensors(), first.dtype) for one in modules),
        "streaming": streaming,
        "wanted": windows,
    }
    found, ended = Collection(Path(target.path), streaming), None
    recorder = _recorder(staging, modules, start, restart=target.restart)
    try:
        with ExitStack() as hooks:
            for index, one in enumerate(modules):
                hook = _hook(recorder, one, index, read or read_pass)
                hooks.callback(one.module.register_forward_hook(hook, with_kwargs=True).remove)
            try:
                yield found
            except (KeyboardInterrupt, SystemExit) as error:  # as an interactive session ends
                ended = error
        if ended is None or recorder.found is not None:
            found.record = recorder.end("" if ended is None else type(ended).__name__)
            with disk_errors(staging.path):
                staging.publish()
    except BaseException:
        _keep(staging, recorder)
        raise
    if recorder.left_out:
        warnings.warn(
            f"{target.path}: {recorder.left_out} windows were drawn and left out: a pass was cut short, or attention "
            "gave something else than Wan's of the frames that the window holds",
            stacklevel=3,
        )
    if ended is not None:
        staging.remove()
        raise ended


def _attentions(model: nn.Module, streaming: StreamingConfig | None) -> tuple[list[Attention], StreamingConfig | None]:
    """Each layer's self-attention, and the window that it runs with: the one given, or the model's own."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no torch module; give the transformer itself, such as pipeline.generator.model"
        )
    causal = causal_model(model)
    found = [Attention(module, index) for index, module in enumerate(self_attentions(causal))]
    if streaming is not None or not found[0].takes("kv_cache"):
        return found, streaming
    first = found[0].module
    settings: dict[str, Any] = {
        "chunk_frames": getattr(causal, "num_frame_per_block", None),
        "window_frames": getattr(first, "local_attn_size", None),
        "sink_frames": getattr(first, "sink_size", 0),
    }
    if any(not isinstance(value, int) or value < 0 for value in settings.values()):
        raise ConfigError(
            f"{type(first).__name__} does not say what a chunk sees (local_attn_size {settings['window_frames']}); "
            "give streaming=StreamingConfig(chunk_frames=..., window_frames=..., sink_frames=...) as it is run"
        )
    return found, StreamingConfig(**settings, positions="absolute")


def _recorder(staging: Staging, modules: list[Attention], start: dict[str, Any], *, restart: bool) -> Recorder:
    """A recorder in the staging folder, which goes on with what an interrupted run of the same kind left there."""
    with disk_errors(staging.path):
        staging.open()
        try:
            kept = None if restart else _kept(staging, start)
            if kept is None:
                staging.clear()
            (staging.content / WINDOWS).mkdir(parents=True, exist_ok=True)
            return Recorder(staging.content, modules, start, kept)
        except BaseException:
            staging.close()
            raise


def _kept(staging: Staging, start: dict[str, Any]) -> Record | None:
    """What an interrupted run left; None of nothing that can be gone on with. Raises OutputError for another run's."""
    if not is_collected(staging.content):
        return None
    remove_partial(staging.content / WINDOWS)
    try:
        record = Collected(staging.content).record
    except CheckpointError:
        return None
    if any(getattr(record, name) != value for name, value in start.items()):
        raise OutputError(
            f"{staging.folder} holds windows of another model, or of other settings; give the same, or begin again "
            f"with Output({str(staging.path)!r}, restart=True)"
        )
    return record


def _keep(staging: Staging, recorder: Recorder) -> None:
    """Leave the staging folder as the next run wants it, after an error."""
    if recorder.found is None or recorder.refused:
        staging.remove()
        return
    with suppress(OutputError):  # the error that is under way says more
        recorder.pause()
    staging.close()
    warnings.warn(
        f"{len(recorder.found.windows)} windows are kept in {staging.folder}: the same call goes on with them",
        stacklevel=4,
    )


def _hook(recorder: Recorder, attention: Attention, index: int, read: Read) -> Callable[..., None]:
    """A forward hook of one layer's self-attention."""

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # What is kept outlives the pipeline's inference mode.
        with torch.inference_mode(mode=False), torch.no_grad():
            try:
                one = read(attention.arguments(args, kwargs))
                if one is not None:
                    recorder.see(index, one, output)
            except (UnsupportedModelError, ConfigError):
                recorder.refused = True
                raise

    hook: Callable[..., None] = torch.compiler.disable(see)
    return hook
