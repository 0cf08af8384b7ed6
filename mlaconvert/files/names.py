"""Names of files that many rooms read or write, and how a source is called in public."""

from __future__ import annotations

from pathlib import Path

CONFIG_NAME = "config.json"
# What a converted model's folder says of where it came from; it goes where the weights go.
CONVERSION_NAME, HEALING_NAME = "conversion.json", "healing.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
EXPERT_FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))

README_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
REPORT_NAME = "report.html"


def public_name(source: str) -> str:
    """A Hub id as given; of a local path only its last part, which says nothing of the machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source
