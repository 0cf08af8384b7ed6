"""The base repository of a Wan model: where its text encoder, its tokenizer and its VAE lie.

Two layouts are read. Diffusers': the folders `text_encoder`, `tokenizer` and `vae`. Native Wan2.1 (and Wan2.2 A14B):
`models_t5_umt5-xxl-enc-bf16.pth`, `google/umt5-xxl` and `Wan2.1_VAE.pth`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.source import AnySource, as_source
from mlaconvert.files.hub_cache import fetch_files, list_files
from mlaconvert.files.inputs import read_json, reason_of
from mlaconvert.files.names import CONVERSION_NAME
from mlaconvert.files.origin import folders_around, origin_of

NATIVE_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_VAE = "Wan2.1_VAE.pth"
_NATIVE_VAE_22 = "Wan2.2_VAE.pth"
_VAES = ("vae/config.json", NATIVE_VAE)
_ADVICE = "name its base repository with --base, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".json", ".model", ".txt")


@dataclass(frozen=True)
class Base:
    """A folder or Hub repo that holds the components. Each is downloaded only when it is asked for."""

    source: str
    revision: str | None
    names: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """Whether its files are in Wan's own layout."""
        return "vae/config.json" not in self.names

    def text(self) -> tuple[Path, Path]:
        """Local paths of the text encoder (native: a file, else a folder) and of its tokenizer's folder."""
        if self.is_native:
            root = self._fetch(NATIVE_TEXT, NATIVE_TOKENIZER)
            return root / NATIVE_TEXT, root / NATIVE_TOKENIZER
        root = self._fetch("text_encoder", "tokenizer")
        return root / "text_encoder", root / "tokenizer"

    def vae(self) -> Path:
        """Local path of the VAE: native a file, else a folder."""
        part = NATIVE_VAE if self.is_native else "vae"
        return self._fetch(part) / part

    def _fetch(self, *parts: str) -> Path:
        """The local root, with the files `parts` and those in the folders `parts`; of folders no pickles."""
        files: list[str] = []
        for part in parts:
            inside = [name for name in self.names if name.startswith(f"{part}/") and name.endswith(_WEIGHTS)]
            found = [part] if part in self.names else inside
            if not found:
                raise CheckpointError(f"{self.source} has no {part}; {_ADVICE}")
            files += found
        return fetch_files(self.source, files, self.revision)


def open_base(source: str, revision: str | None = None) -> Base:
    """The components of a folder or Hub repo; nothing is loaded yet.

    Raises CheckpointError when it cannot be listed, or holds none.
    """
    base = Base(source, revision, list_files(source, revision))
    if NATIVE_VAE not in base.names and base.is_native:
        if _NATIVE_VAE_22 in base.names:
            raise CheckpointError(
                f"{source}: {_NATIVE_VAE_22} is not read; give --base its diffusers repository, "
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
            )
        raise CheckpointError(f"{source} has no text encoder and VAE (vae/config.json or {NATIVE_VAE}); {_ADVICE}")
    return base


def find_base(model: AnySource) -> Base:
    """The base that `model` came with: its own repository, or the one that its conversion.json names as its source.

    A source without a user's name is looked for from here and beside the model. Raises InputError when none has the
    components, and says to name one.
    """
    model, reasons = as_source(model), []
    for source, at in _candidates(str(model), model.revision, model.subfolder):
        try:
            return open_base(source, at)
        except CheckpointError as error:
            reasons.append(f" ({str(error).partition(';')[0]})")
    reason = reasons[0] if len(reasons) > 1 else ""  # the last is the model itself
    raise InputError(f"{model}: its text encoder and VAE are not known{reason}; {_ADVICE}")


def require(*modules: str) -> None:
    """Raise InputError unless the optional packages are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"text and video need {', '.join(missing)}: pip install 'mlaconvert[wan]'")


def damaged(path: Path, what: str, error: Exception) -> CheckpointError:
    """The error for a component that a library could not load."""
    return CheckpointError(f"{path}: not {what} that can be loaded ({reason_of(error)}); get an intact copy")


def _candidates(model: str, revision: str | None, subfolder: str | None) -> Iterator[tuple[str, str | None]]:
    """Where the components may lie, likeliest first: source and revision."""
    path = Path(model).expanduser()
    local = path.exists()
    home = str(path.parent if path.is_file() else path) if local else model
    origin = origin_of(_conversion(home, revision, subfolder))
    yield from origin.places
    for folder in (*folders_around(home)[:1], origin.beside(home)):
        if folder is not None and any((folder / part).is_file() for part in _VAES):
            yield str(folder), None
    yield home, revision


def _conversion(home: str, revision: str | None, subfolder: str | None) -> dict[str, Any] | None:
    """The model's conversion.json; None without one."""
    try:
        names = list_files(home, revision)
        inside = f"{subfolder}/{CONVERSION_NAME}" if subfolder else CONVERSION_NAME
        if inside not in names:
            return None
        return read_json(fetch_files(home, [inside], revision) / inside)
    except CheckpointError:
        return None
