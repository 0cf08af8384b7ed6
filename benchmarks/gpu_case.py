"""On what `gpu_steps.py` measures, and which sides: the geometry, its conversions, the device, what a result is of."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from self_forcing import commit as commit_of

from mlaconvert.config.geometry import WanConfig, default_video
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe
from mlaconvert.evaluation.bench.runner import ResolvedSetting, device_name
from mlaconvert.evaluation.bench.setting import GEOMETRIES, BenchSetting

ROOT = Path(__file__).parents[1]
WINDOWS = (7, 21)
LARGE = ((60, 104), 4, 5)  # latent pixels, passes before the clean one, pairs of chunks
SMALL = ((8, 12), 1, 2)
SMALL_CONFIG = dataclasses.replace(GEOMETRIES["1.3b"], dim=96, num_heads=2, num_layers=2, ffn_dim=128)
WHOLE, PAPER = "exact present, whole heads", "latent present"
IN_BITS, QUANTISED = "exact present, cached in bits", "dense, int4 cache"
Emit = Callable[[str, Mapping[str, Any]], None]  # is given each result with its name; one of the same name replaces it


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all steps run on, and with; `size` is in latent pixels, `checkout` a clone of the published code."""

    small: bool
    config: WanConfig
    size: tuple[int, int]
    steps: int
    rounds: int
    device: torch.device
    dtype: torch.dtype
    checkout: Path | None = None

    @classmethod
    def of(cls, *, small: bool, checkout: Path | None = None) -> Case:
        """On the GPU that is there; a CPU runs the small case only."""
        cuda = torch.cuda.is_available()
        if not cuda and not small:
            sys.exit("no CUDA device here; --small runs the same code on a CPU")
        size, steps, rounds = SMALL if small else LARGE
        return cls(
            small=small,
            config=SMALL_CONFIG if small else GEOMETRIES["1.3b"],
            size=size,
            steps=steps,
            rounds=rounds,
            device=torch.device("cuda" if cuda else "cpu"),
            dtype=torch.bfloat16 if cuda else torch.float32,
            checkout=checkout,
        )

    def resolved(self, window: int) -> ResolvedSetting:
        """The setting of a window of so many latent frames."""
        config = self.config
        streaming = StreamingConfig(window_frames=window)
        setting = BenchSetting(streaming=streaming, steps=self.steps, rounds=self.rounds, device=str(self.device))
        return ResolvedSetting(
            setting=setting,
            device=self.device,
            dtype=self.dtype,
            streaming=streaming,
            height=self.size[0],
            width=self.size[1],
            frame_tokens=config.tokens_per_frame(*self.size),
            context=torch.zeros(1, config.text_len, config.text_dim, device=self.device, dtype=self.dtype),
        )

    def narrow(self, eighths: int) -> str:
        """The name of the side whose past is read with so much of each head."""
        head = self.config.head_dim
        return f"exact present, past's heads {eighths * head // 8} of {head}"

    def sides(self, window: int) -> dict[str, WanConfig]:
        """The dense geometry, as it is and with its cache narrowed, and the latent ones.

        Of heads of 128 the past has 96, 80 and 64, a quarter head rotated. In bits, a token takes what a bfloat16
        latent takes: 448 bytes at width 1536.
        """
        dense = dataclasses.replace(self.config, streaming=StreamingConfig(window_frames=window))
        unit = dense.head_dim // 8
        recipes = {WHOLE: ConvertRecipe()}
        for eighths in (6, 5, 4):
            recipes[self.narrow(eighths)] = ConvertRecipe(
                nope_dim=(eighths - 2) * unit, rope_dim=2 * unit, v_dim=eighths * unit
            )
        recipes[PAPER] = ConvertRecipe(init="svd")
        recipes[IN_BITS] = ConvertRecipe(bytes_per_token=7 * dense.dim // 24)
        sides = {"dense": dense, QUANTISED: dataclasses.replace(dense, cache_dtype="int4")}
        for name, recipe in recipes.items():
            resolved = resolve_recipe(dataclasses.replace(recipe, **self.pixels), dense)
            sides[name] = dataclasses.replace(dense, mla=mla_config(resolved, dense))
        return sides

    @property
    def pixels(self) -> dict[str, Any]:
        """Height and width of the video, as recipes have them."""
        stride = default_video(self.config).vae_stride
        return {"height": self.size[0] * stride, "width": self.size[1] * stride}


def environment(case: Case, commit: str | None) -> dict[str, Any]:
    """What every result is of. Without a given `commit`, git is asked; "+" stands for changes that are in none."""
    found = commit or commit_of(ROOT)
    if found is not None and commit is None:
        status = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
        found += "+" if subprocess.run(status, capture_output=True, check=False).stdout.strip() else ""
    return {
        "device": device_name(case.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(case.dtype).removeprefix("torch."),
        "commit": found,
        "small": case.small,
    }
