"""The command line: thin wiring, one file a command.

Data goes to stdout, everything else to stderr. torch and all that needs it are imported inside the commands, so that
--help answers at once. `options` are those that several commands share, `show` prints.

    mlaconvert convert tiny -o tiny-mla --recipe tiny --verify
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlaconvert import __version__
from mlaconvert.cli.analyze import analyze
from mlaconvert.cli.bench import bench
from mlaconvert.cli.convert import convert
from mlaconvert.cli.demo import demo
from mlaconvert.cli.encode import encode
from mlaconvert.cli.evaluate import evaluate
from mlaconvert.cli.generate import generate
from mlaconvert.cli.heal import heal
from mlaconvert.cli.help import EXAMPLES, KEPT, GroupedCommand, UsageError, epilog, usage_in_words
from mlaconvert.cli.push import push
from mlaconvert.cli.recipes import recipes
from mlaconvert.cli.stdout import checked_stdout
from mlaconvert.cli.sweep import sweep
from mlaconvert.errors import MLAConvertError, one_line


class _Group(TyperGroup):
    """Lists commands in the order of the work; turns exceptions of each into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(EXAMPLES).index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            usage_in_words(error)
            raise
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as interruption:
            kept = " ".join(map(str, interruption.args)) or KEPT.get(ctx.invoked_subcommand or "", "")
            typer.echo(f"interrupted: {kept}" if kept else "interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, MLAConvertError):
                typer.echo(f"error: {error}", err=True)
                for line in error.details:
                    typer.echo(one_line(line), err=True)
                raise typer.Exit(error.exit_code) from None
            first = (str(error).strip().splitlines() or [""])[0][:300]
            typer.echo(f"error: unexpected {type(error).__name__}: {first} (--debug shows where)", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    name="mlaconvert",
    help="Convert Wan-family video diffusion transformers to Multi-Head Latent Attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `mlaconvert` command."""
    # OpenMP threads that spin while they wait make linear algebra far slower when another process needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # OpenBLAS's always spin, and its part here is little: independent problems are run side by side instead.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A polite kill cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # What is alive at the end is not searched for cycles once more: with torch, a quarter of a second of every command.
    atexit.register(gc.freeze)
    with checked_stdout():
        app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlaconvert {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


_COMMANDS: tuple[Callable[..., None], ...] = (
    demo,
    analyze,
    encode,
    convert,
    evaluate,
    heal,
    generate,
    push,
    sweep,
    bench,
)
for command in _COMMANDS:
    app.command(cls=GroupedCommand, epilog=epilog(command.__name__))(command)
app.add_typer(recipes, name="recipes", epilog=epilog("recipes"))
