"""Which files of a folder, or of a repository's list, are the model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from mlaconvert.errors import CheckpointError, is_plain
from mlaconvert.files.inputs import file_size, is_file, is_folder
from mlaconvert.files.names import (
    EXPERT_FOLDERS,
    INDEX_SUFFIX,
    PICKLE_INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIXES,
    WEIGHTS_NAME,
    is_gguf,
    is_hidden,
    is_index,
    is_pickle,
    is_pickle_index,
    is_safetensors,
)
from mlaconvert.files.shipped import TINY

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}(\.[\w-]+)?\.(safetensors|sft|bin)$", re.IGNORECASE)
DISTCP = ".distcp"  # the ending of torch.distributed's shards
NON_BLOCK = "non_block.safetensors"  # LightX2V's, beside a file for each block
_BLOCK_FILE = re.compile(r"block_\d+\.safetensors")
_DEEPSPEED = re.compile(r"zero_pp_rank_\d+|mp_rank_\d+_model_states")
# Published names of what lies beside a transformer: text encoders, CLIP, VAEs, and a training's other states.
_OTHER_WEIGHTS = re.compile(
    r"(?i)(^|[^a-z])(u?mt5|(by)?t5|(sig)?clip|siglip|vae|text_?encoder|llava|llama|qwen[\d._-]*vl|(light)?tae(w|hv|hy|sd)?|"
    r"optimizer|scheduler|training_args|rng_state|random_states)([^a-z]|$)"
)
_OTHER_FOLDERS = re.compile(
    r"(?i)(^|/)(text_encoders?(_\d)?|tokenizers?(_\d)?|vae|clip(_vision)?|(image|vision)_encoders?|loras?|google|"
    r"xlm-roberta[^/]*|(latent_)?upscale_models|optimizers?)(/|$)"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[^/\\]+)*/?")
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\?#-][^\s\\?#]*")


def local_path(source: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The local path that `source` means, or None when it can only be a Hub id.

    The Hub client's own folder for a repository means the files of `revision`, or of its main branch.
    """
    text = str(source)
    if not text.strip() or not is_plain(text):
        raise CheckpointError(f"{text!r} is not a path: names must be plain UTF-8 text; rename it")
    try:
        path = Path(source).expanduser()
        found = path.exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, or an unknown user's home
        raise CheckpointError(f"{text!r} is not a path; give a file, a folder or a Hub id (user/repo)") from None
    if not found and text == "tiny":
        path, found = TINY, True
    if found:
        if not path.is_dir():
            file_size(path)
        if not is_plain(path.resolve().name):
            raise CheckpointError(f"{path.resolve()}: names must be plain UTF-8 text; rename it")
        if _is_cached(path):
            return _snapshot(path, revision)
        if revision is not None:
            raise CheckpointError(f"{path} is on this disk, which has no revision {revision!r}; leave --revision out")
        return path
    if path.is_symlink():
        raise CheckpointError(f"{path}: it is a link that leads nowhere; mend it, or give another path")
    looks_like_file = text.count("/") == 1 and is_weights(text)
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not looks_like_file:
        if not {".", ".."}.isdisjoint(text.split("/")):
            raise CheckpointError(f"{text!r} leads outside its repository; give user/repo or user/repo/folder")
        if revision is not None and not _REVISION.fullmatch(revision):
            raise CheckpointError(f"revision {revision!r} is no branch, tag or commit; check --revision")
        return None
    raise CheckpointError(f"{path}: there is no such file or folder (a Hub id looks like user/repo)")


def list_folder(folder: Path) -> list[str]:
    """Names of the files in `folder` and two levels of its folders, and of links to nowhere; hidden ones left out."""
    try:
        found = chain.from_iterable(folder.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
        names = (p.relative_to(folder).as_posix() for p in found if p.is_file() or (p.is_symlink() and not p.exists()))
        return sorted(name for name in names if not is_hidden(name))
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be listed ({error.strerror})") from None


def refuse_cache(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds, of weights, only the Hub client's folders for repositories."""
    inside = chain(folder.glob("models--*"), folder.glob("hub/models--*"))
    found = sorted(path for path in inside if _is_cached(path))
    if found:
        raise CheckpointError(f"{folder}: the Hub's cache of {_shown(path.name for path in found)}; give {found[0]}")


def _is_cached(folder: Path) -> bool:
    """Whether it is the Hub client's own folder for a repository (`models--user--repo`)."""
    return is_folder(folder / "snapshots") and folder.resolve().name.startswith("models--")


def _snapshot(folder: Path, revision: str | None) -> Path:
    """The files of a commit that the Hub client's folder for a repository has; of its main branch without `revision`.

    Raises CheckpointError when it has no such revision, or several commits and none is its main branch.
    """
    commits = folder / "snapshots"
    found = sorted(path for path in commits.iterdir() if path.is_dir())
    reference = folder / "refs" / (revision or "main")
    named = revision
    if (revision is None or _REVISION.fullmatch(revision)) and is_file(reference) and file_size(reference) < 100:
        named = reference.read_text("utf-8", "replace").strip()
    if (chosen := commits / (named or "-")) in found:
        return chosen
    if revision is not None:
        raise CheckpointError(
            f"{folder}: the Hub's folder of a repository, without revision {revision!r}; it has "
            f"{_shown(path.name for path in found)}; give one of them, or leave --revision out"
        )
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: the Hub's folder of a repository with {len(found)} commits in {commits}; give one of them"
        )
    return found[0]


def find_experts(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of two experts among these file names, high noise first; () without."""
    folders = {n.split("/")[0] for n in names if is_safetensors(n) and n.count("/") == 1 and not is_hidden(n)}
    return next((pair for pair in EXPERT_FOLDERS if folders.issuperset(pair)), ())


def offer_experts(folder: Path) -> str:
    """What a message adds of the two experts in a folder; nothing without."""
    found = find_experts(list_folder(folder))
    return f"; it has {' and '.join(found)}" if found else ""


def select(names: Sequence[str], where: str) -> str:
    """Of the file names in a folder, the weight file or index to open. Raises CheckpointError when none stands out.

    Files that are named as a text encoder, a VAE, a LoRA or an optimizer are no model, and hidden ones are no files.
    """
    names = [name for name in names if not is_hidden(name)]
    if pair := find_experts(names):
        raise CheckpointError(f"{where}: it holds two experts; give --subfolder {pair[0]} or --subfolder {pair[1]}")
    found = _select_here([n for n in names if "/" not in n], where)
    if found is None or not (
        is_safetensors(found) or (is_index(found) and not is_pickle_index(found))
    ):  # another kind comes after the folder that is named for it
        inner = [n.removeprefix("transformer/") for n in names if n.startswith("transformer/")]
        if any(is_weights(n) for n in inner):
            return "transformer/" + select(inner, f"{where}/transformer")
    return found or _select_below(names, where)


def block_files(chosen: str, names: Iterable[str]) -> list[str]:
    """All files of a model that LightX2V splits by blocks, without an index, of which `chosen` is one; [] otherwise."""
    folder, _, name = chosen.rpartition("/")
    if name != NON_BLOCK:
        return []
    inside = [n for n in names if n.rpartition("/")[0] == folder]
    return [n for n in inside if _BLOCK_FILE.fullmatch(n.rpartition("/")[2])]


def is_weights(name: str) -> bool:
    """Whether a file of this name is one of weights that can be read."""
    return is_safetensors(name) or is_pickle(name) or is_gguf(name)


def _select_here(here: Sequence[str], where: str) -> str | None:
    """The weight file or index among files of one folder; None without any."""
    weights = [n for n in here if is_weights(n)]
    models = [n for n in weights if not _OTHER_WEIGHTS.search(n)]
    adapters = [n for n in weights if "lora" in n.lower()]
    models = [n for n in models if n not in adapters] or adapters
    indexes = [n for n in here if is_index(n) and not _OTHER_WEIGHTS.search(n)]
    pickled = [n for n in indexes if is_pickle_index(n)]
    indexes = [n for n in indexes if n not in pickled]
    whole = [n for n in models if is_safetensors(n) and not SHARD.search(n)]
    if NON_BLOCK in whole and not indexes:
        whole = [n for n in whole if not _BLOCK_FILE.fullmatch(n)]
    for found in (indexes, whole, pickled):
        standard = [n for n in found if n in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json")]
        if standard or found:
            return _only(standard or found, where)
    if shards := [n for n in models if SHARD.search(n)]:
        lost = INDEX_SUFFIX if any(map(is_safetensors, shards)) else PICKLE_INDEX_SUFFIX
        raise CheckpointError(f"{where}: it holds shards but no *{lost}; download the index too")
    pickles = [n for n in models if is_pickle(n)]
    if any(_DEEPSPEED.search(n) for n in pickles):
        raise CheckpointError(
            f"{where}: a sharded training state of DeepSpeed ({pickles[0]}, ...); gather it with the zero_to_fp32.py "
            "beside or above it, and give the file that it writes"
        )
    found = pickles or [n for n in models if is_gguf(n)]
    return _only(found, where) if found else None


def _select_below(names: Sequence[str], where: str) -> str:
    """The weight file or index in the only folder, of those in one, that has any."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder and not _OTHER_FOLDERS.search(folder):
            folders.setdefault(folder, []).append(file)
    found = []
    for folder, files in folders.items():
        chosen = _select_here(files, f"{where}/{folder}") if any(map(is_weights, files)) else None
        found += [f"{folder}/{chosen}"] if chosen is not None else []
    if len(found) > 1:
        raise CheckpointError(
            f"{where}: it holds several models in its folders ({_shown(found)}); name the one to read"
        )
    if found:
        return found[0]
    if shards := next((n for n in names if n.endswith(DISTCP)), None):
        raise distributed(f"{where}/{shards.rpartition('/')[0]}".rstrip("/"))
    others = [n for n in names if is_weights(n)]
    there = f"; {', '.join(others[:3])} is no transformer by its name, and can be named" if others else ""
    raise CheckpointError(
        f"{where}: it holds no weights ({', '.join(SAFETENSORS_SUFFIXES[:1] + PICKLE_SUFFIXES)}, .gguf){there}"
    )


def distributed(folder: str) -> CheckpointError:
    """What is said of a folder of torch.distributed's shards."""
    return CheckpointError(
        f"{folder}: a sharded training state ({DISTCP}); gather it with `python -m torch.distributed.checkpoint."
        f"format_utils dcp_to_torch {folder} model.pt`, and give model.pt"
    )


def _only(names: Sequence[str], where: str) -> str:
    if len(names) > 1:
        raise CheckpointError(f"{where}: it holds several weight files ({_shown(names)}); name the one to read")
    return names[0]


def _shown(names: Iterable[str]) -> str:
    """The first four of them."""
    some = list(names)
    return ", ".join(some[:4] or ["none"]) + (", ..." if len(some) > 4 else "")
