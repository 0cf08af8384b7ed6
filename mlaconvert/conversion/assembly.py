"""Puts a converted model together: what passes through is copied, and the source hashed, beside the factorisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from mlaconvert.conversion.plan import ConversionPlan, Operation
from mlaconvert.errors import ConfigError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.store import Visit, check_finite
from mlaconvert.files.writer import ModelFiles, TensorSpec
from mlaconvert.latent.factorize import Factors
from mlaconvert.latent.threads import SideBySide
from mlaconvert.progress import Progress

_PART = 2**18  # elements of a mapped tensor that are copied at a time


class Clock:
    """Seconds spent on each kind of work. Kinds that run side by side add up to more than the time that passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + spent


class _StoppedError(Exception):
    """The work in the background is not wanted any more."""


class Assembly:
    """Writes one model's `files` in the background. A context manager; leaving it early stops the work.

    `read` starts work beside the factorisation, `put` takes one converted layer at a time, `finish` waits for all of
    it. Every one of them may raise what went wrong in the background.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: ConversionPlan, files: ModelFiles, clock: Clock, progress: Progress
    ) -> None:
        self._checkpoint, self._files, self._clock, self._progress = checkpoint, files, clock, progress
        self._converted: dict[int, list[Operation]] = {layer: [] for layer in plan.layers}
        self._passing: list[Operation] = []
        for operation in plan.operations:
            (self._passing if operation.layer is None else self._converted[operation.layer]).append(operation)
        self._stop = Event()
        self._pool = SideBySide(2)
        self._work: dict[str, Future[Any]] = {}

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, done: Callable[[], None] | None) -> None:
        """Start to hash the source's files, and on the way to copy the tensors that pass through.

        `done` is called when they are on the disk; None: they are there already.
        """
        self._work["read"] = self._pool.submit(self._read, done)

    def put(self, layer: int, factors: Factors, done: Callable[[], None]) -> None:
        """Write a converted layer, as soon as the one before is written; `done` is called when it is on the disk."""
        tensors = {}
        for operation in self._converted[layer]:
            tensor = factors.tensors[operation.canonical.split(".", 3)[3]]
            check_finite(tensor, operation.spec.name, self._files.where)
            tensors[operation.spec.name] = _cast(tensor, operation.spec)
        self.check()
        if "layer" in self._work:
            self._work["layer"].result()
        self._work["layer"] = self._pool.submit(self._store, tensors, done)

    def check(self) -> None:
        """Raise what went wrong in the background so far."""
        for work in self._work.values():
            if work.done():
                work.result()

    def finish(self) -> str:
        """Wait for everything; the source's hash, or "" if it was not read."""
        if "layer" in self._work:
            self._work["layer"].result()
        return str(self._work["read"].result()) if "read" in self._work else ""

    def _read(self, done: Callable[[], None] | None) -> str:
        with self._clock("hash and copy"):
            checkpoint, names = self._checkpoint, self._checkpoint.names
            left = {operation.canonical: operation for operation in self._passing if done is not None}
            stored = {names[canonical]: canonical for canonical in left if checkpoint.is_stored(canonical)}

            def visit(name: str) -> AbstractContextManager[Callable[[Tensor], None] | None]:
                return self._place(left.pop(stored[name])) if name in stored else nullcontext()

            sha256 = self._hash(visit)
            for operation in left.values():  # a PyTorch file's tensors, and what a LoRA changes
                with self._place(operation) as write:
                    for part in checkpoint.read(operation.canonical).reshape(-1).split(_PART):
                        write(part)
            if done is not None:
                self._files.sync(operation.spec.name for operation in self._passing)
                done()
            return sha256

    @contextmanager
    def _place(self, operation: Operation) -> Iterator[Callable[[Tensor], None]]:
        """A function that checks and writes the next elements of a tensor that passes through."""
        name, where = self._checkpoint.names[operation.canonical], self._checkpoint.store.path
        with self._files.place(operation.spec.name) as write:

            def copy(part: Tensor) -> None:
                if self._stop.is_set():
                    raise _StoppedError
                check_finite(part, name, where)
                write(_cast(part, operation.spec))

            yield copy

    def _hash(self, visit: Visit) -> str:
        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            if self._stop.is_set():
                raise _StoppedError
            self._progress(stage, done, total, note)

        return self._checkpoint.store.sha256(progress, visit)

    def _store(self, tensors: dict[str, Tensor], done: Callable[[], None]) -> None:
        with self._clock("write"):
            for name, tensor in tensors.items():
                self._files.write(name, tensor)
            self._files.sync(tensors)
        done()


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """`tensor` in the planned dtype. Raises ConfigError when a finite value overflows."""
    cast = tensor.to(spec.dtype)
    if spec.dtype != tensor.dtype and not bool(torch.isfinite(cast).all()):
        raise ConfigError(f"tensor {spec.name!r} does not fit {spec.dtype}; choose --dtype bfloat16 or float32")
    return cast
