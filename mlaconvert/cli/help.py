"""How --help is laid out: commands in the order of the work, options in groups, examples at the end."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

# Groups in the order in which --help shows them, each with its options' parameters. A name means the same everywhere.
GROUPS = {
    "What goes in and comes out": "output recipe init stage convert teacher data captions base prompt negative "
    "embeddings switch given prompts vbench_names calibrated plot html save movie moments state keep vbench "
    "vbench_teacher public update license base_model",
    "How the cache is made up": "kv_rank kv_ranks bytes_per_token q_rank nope_dim nope_dims v_dim rope_dim rope_dims "
    "rope rope_selection present key_norm allocation layers noisy_past refit_steps refit_clips threshold "
    "cache_dtype cache_dtypes",
    "How time is seen": "window_frames sink_frames chunk_frames positions bidirectional few_step",
    "Size, length and sampling": "height width seconds frames fps batch samples videos clips validation_clips "
    "bad_videos bad_shards seed timesteps steps shift guidance rounds gpu_gb",
    "Training": "train lr accumulate ema precision gradient_checkpointing validate_every save_every tracker",
    "Where the model lies": "revision subfolder state_key config lora lora_scale",
    "How it runs": "device text_device cpu dtype layout attention compiled slice_size no_text_cache no_batch_search "
    "tflops dry_run verify overwrite restart as_json",
}
_TITLE_OF = {name: title for title, names in GROUPS.items() for name in names.split()}

# Commands in the order of the work, each with two examples.
EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": ("mlaconvert demo", "mlaconvert demo -o /tmp/demo --json"),
    "analyze": (
        "mlaconvert analyze tiny",
        "mlaconvert analyze Wan-AI/Wan2.1-T2V-1.3B --gpu-gb 24 --plot spectra.png",
    ),
    "encode": (
        "mlaconvert encode videos -o clips",
        "mlaconvert encode videos -o clips --captions captions.csv --frames 21 --device cuda",
    ),
    "convert": (
        "mlaconvert convert tiny -o tiny-mla --recipe tiny --verify",
        "mlaconvert convert self_forcing_dmd.pt -o sf-mla --recipe self-forcing-1.3b --data clips --device cuda",
    ),
    "evaluate": (
        "mlaconvert evaluate tiny-mla --html report.html",
        "mlaconvert evaluate wan-mla wan-healed --data clips --device cuda --save",
    ),
    "heal": (
        "mlaconvert heal tiny-mla -o tiny-healed --recipe tiny-distill",
        "mlaconvert heal wan-mla -o wan-healed --recipe videomla-distill --data clips --dry-run",
    ),
    "generate": (
        "mlaconvert generate tiny-mla 'large red disc right, sky' -o disc",
        "mlaconvert generate sf-mla 'a red fox runs through fresh snow' -o fox.mp4 --seconds 30 --device cuda",
    ),
    "push": (
        "mlaconvert push wan-mla alice/wan-mla --dry-run",
        "mlaconvert push wan-mla alice/wan-mla --license apache-2.0",
    ),
    "recipes": ("mlaconvert recipes list", "mlaconvert recipes copy wan21-t2v-1.3b mine.yaml"),
    "sweep": (
        "mlaconvert sweep tiny -o sweep --recipe tiny-budgets",
        "mlaconvert sweep wan.safetensors -o sweep --kv-ranks 96,192,384 --data clips --device cuda",
    ),
    "bench": ("mlaconvert bench tiny", "mlaconvert bench 1.3b --kv-rank 192,384 --window-frames 21 --device cuda"),
}


# What an interrupted command leaves, where the run itself has not said more.
KEPT = {
    "demo": "what was made is not whole; the same command begins again",
    "analyze": "nothing was written",
    "encode": "finished clips are kept; the same command goes on after them",
    "convert": "no layer is kept; the same command begins again; an output that is there is whole",
    "evaluate": "nothing is kept but what --save had written of finished models",
    "heal": "nothing was begun; the same command begins again",
    "generate": "finished chunks are kept beside the output; the same command goes on after them",
    "push": "nothing of it is visible; the same command sends what had not arrived",
    "sweep": "finished conversions are kept; the same command goes on after them",
    "bench": "nothing was written",
}


def epilog(command: str) -> str:
    """The examples below the help of `command`; a paragraph a line, or they would run together."""
    return "\n\n".join(["Examples:", *EXAMPLES[command]])


class GroupedCommand(TyperCommand):
    """A command whose options stand in `GROUPS`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        titles = ["", *GROUPS]
        for parameter in self.params:
            if parameter.param_type_name == "option":
                parameter.rich_help_panel = _TITLE_OF.get(parameter.name or "")  # type: ignore[attr-defined]
        # A group stands where its first option does.
        self.params.sort(key=lambda parameter: titles.index(_TITLE_OF.get(parameter.name or "", "")))


def usage_in_words(error: Exception) -> None:
    """Say what to give where a parser says what input should be."""
    message = getattr(error, "message", None)
    if isinstance(message, str):
        for kind, words in (("integer", "a whole number"), ("number", "a number"), ("boolean", "true or false")):
            if message.startswith(f"Input should be a valid {kind}"):
                error.message = f"give {words}"  # type: ignore[attr-defined]


UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The root of Typer's own errors (usage, bad values), which it prints itself and does not export."""
