"""Names of files that many rooms read or write, and how a source is called in public."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

CONFIG_NAME = "config.json"
# What a converted model's folder says of where it came from; it goes where the weights go.
CONVERSION_NAME, HEALING_NAME = "conversion.json", "healing.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_INDEX_SUFFIX = ".bin.index.json"
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")  # of any case, as the pickles'
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.[\w-]+)?\.json$")
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))

README_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
REPORT_NAME = "report.html"


def public_name(source: str) -> str:
    """A Hub id as given; of a local path only its last part, which says nothing of the machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def is_safetensors(name: str) -> bool:
    """Whether a file's name ends as a safetensors file's."""
    return name.lower().endswith(SAFETENSORS_SUFFIXES)


def is_pickle(name: str) -> bool:
    """Whether a file's name ends as one of PyTorch's pickles."""
    return name.lower().endswith(PICKLE_SUFFIXES)


def is_gguf(name: str) -> bool:
    """Whether a file's name ends as a GGUF file's."""
    return name.lower().endswith(".gguf")


def is_index(name: str) -> bool:
    """Whether it is the name of an index of shards, of a variant (`...index.fp16.json`) too."""
    return _INDEX.search(name) is not None


def is_pickle_index(name: str) -> bool:
    """Whether it is the name of an index whose shards are PyTorch's (.bin)."""
    found = _INDEX.search(name)
    return found is not None and found[1] == "bin"


def is_hidden(name: str) -> bool:
    """Whether a system or an editor keeps a file beside others: `._a.safetensors`, or below `.ipynb_checkpoints`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
