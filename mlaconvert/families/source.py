"""Where a model's weights lie, and how they are to be read."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TypeAlias

from mlaconvert.families.lora import LoraFile


@dataclass(frozen=True)
class Source:
    """A model to read: its path, and what a path alone does not say. Functions take it where they take a path.

    Source("Wan-AI/Wan2.2-T2V-A14B", subfolder="low_noise_model", revision="main")
    Source("self_forcing_dmd.pt", state_key="generator_ema", config=Path("self_forcing_dmd.yaml"))
    Source("longlive_base.pt", loras=(LoraFile(path=Path("lora.pt")),))
    """

    path: str | Path
    """A weight file, a model folder, a Hub id (user/repo), or the built-in model "tiny"."""

    _: KW_ONLY

    revision: str | None = None
    """Branch, tag or commit of a Hub id; None is its main branch."""

    subfolder: str | None = None
    """Folder inside the path, such as one of two experts."""

    state_key: str | None = None
    """Which of a file's models, by what its tensors' names begin with ("net_ema"), or by the key of a pickle.

    None takes the only one; of several generator_ema or generator, whichever comes first, or a pickle's model.
    """

    config: Path | None = None
    """A config.json to use, or a streaming codebase's YAML beside it; None is the config.json beside the weights."""

    loras: tuple[LoraFile, ...] = ()
    """LoRAs made for the dense model, merged in order as its weights are read."""

    def __str__(self) -> str:
        return str(self.path)


AnySource: TypeAlias = Source | str | Path


def as_source(source: AnySource) -> Source:
    """`source` itself, or the model of a bare path."""
    return source if isinstance(source, Source) else Source(source)
