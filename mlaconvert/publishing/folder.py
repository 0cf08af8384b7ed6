"""A model folder as it is published: its files, and what its card says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi
from huggingface_hub import errors as hub

from mlaconvert.conversion.source import open_models
from mlaconvert.errors import CheckpointError
from mlaconvert.families.checkpoint import Checkpoint
from mlaconvert.files.inputs import is_file, open_inside, read_json
from mlaconvert.files.names import (
    CONFIG_NAME,
    CONVERSION_NAME,
    EVALUATION_NAME,
    HEALING_NAME,
    INDEX_SUFFIX,
    README_NAME,
)
from mlaconvert.files.origin import origin_of
from mlaconvert.publishing.api import hub_errors
from mlaconvert.reports.card import CardFacts, CardModel

RECORDS = (CONFIG_NAME, CONVERSION_NAME, HEALING_NAME, EVALUATION_NAME)
TEXTS = (README_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
SHOWN = (".html", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")  # reports and pictures
WEIGHTS = re.compile(r"diffusion_pytorch_model[^/]*\.safetensors(\.index\.json)?")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder that opened: the paths in it of the files to send, those of others, and what its card says."""

    path: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    models: tuple[CardModel, ...]

    def open(self, name: str) -> BinaryIO:
        """Open one of its files, which may have become a link since the folder was read."""
        return open_inside(self.path, name)

    def size(self, name: str) -> int:
        """Bytes of one of its files."""
        with self.open(name) as stream:
            return os.fstat(stream.fileno()).st_size


def read_folder(path: Path) -> ModelFolder:
    """Open the models of a folder as strictly as any other command, and sort its files. Links are refused."""
    path = path.expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a model folder that convert or heal wrote")
    files: set[Path] = set()
    with open_models(path) as checkpoints:
        homes = {subfolder: checkpoint.store.files[0].parent for subfolder, checkpoint in checkpoints.items()}
        for subfolder, checkpoint in checkpoints.items():
            if checkpoint.config.mla is None:
                raise CheckpointError(f"{path / subfolder}: it is a dense model; convert it first")
            sharded = checkpoint.store.path.is_dir()  # else the one weight file
            indexes = homes[subfolder].glob(f"*{INDEX_SUFFIX}") if sharded else ()
            files |= {*checkpoint.store.files, *indexes}
        for file in {file for home in (path, *homes.values()) for file in home.iterdir() if is_file(file)}:
            belongs = file.name in (*RECORDS, *TEXTS) or file.suffix.lower() in SHOWN
            if belongs and not file.name.startswith("."):
                files.add(file)
        names = sorted(file.relative_to(path).as_posix() for file in files)
        for name in names:
            open_inside(path, name).close()
        models = [_card_model(subfolder, each, homes[subfolder]) for subfolder, each in checkpoints.items()]
    every = (file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file())
    left_out = tuple(name for name in every if name not in names)
    return ModelFolder(path=path, names=tuple(names), left_out=left_out, models=tuple(models))


def _card_model(subfolder: str, checkpoint: Checkpoint, home: Path) -> CardModel:
    return CardModel(
        subfolder=subfolder,
        config=checkpoint.config,
        description=checkpoint.describe(),
        conversion=read_record_of(home / CONVERSION_NAME),
        healing=read_record_of(home / HEALING_NAME),
        evaluation=read_record_of(home / EVALUATION_NAME),
        passengers=checkpoint.passengers.describe(),
    )


def read_record_of(path: Path) -> dict[str, Any]:
    """A JSON file of the folder, {} without it."""
    return read_json(path) if is_file(path) else {}  # the card takes records as far as they go


def gather_facts(
    api: HfApi,
    repo: str,
    local: ModelFolder,
    license: str | None,
    base_model: str | None,
    notes: list[str],
    *,
    online: bool,
) -> CardFacts:
    """What the card tells: the folder's records, and what the Hub says of the base model."""
    base = base_model or origin_of(local.models[0].conversion).hub_id
    licensed: Mapping[str, str] = {"license": license} if license else {}
    if base is None:
        notes.append("the card names no base model: the source was not read from the Hub; give --base-model USER/REPO")
    elif not licensed and online:
        licensed = _license_of(api, base)
    if base is not None and not licensed and not online:
        notes.append(f"nobody is logged in, so the licence of {base} was not looked up")
    elif not licensed:
        notes.append("the card names no licence: none could be inherited from a base model; give --license ID")
    if any(model.evaluation and not model.figures for model in local.models):
        notes.append(f"{EVALUATION_NAME} holds not exactly one model's results, so the card shows none of them")
    return CardFacts(repo=repo, models=local.models, base_model=base, license=licensed)


def _license_of(api: HfApi, base: str) -> dict[str, str]:
    """The licence fields of a model's card on the Hub, {} when it has none or cannot be seen."""
    with hub_errors(base):
        try:
            card = api.model_info(base).card_data
        except hub.RepositoryNotFoundError:
            return {}
    names = ("license", "license_name", "license_link")
    found = {name: card.get(name) for name in names} if card is not None else {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if found.get("license") else {}
