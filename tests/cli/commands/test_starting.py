"""The command line: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from command_line import COMMANDS, invoke, succeed
from golden_relatives import make_worldplay
from safetensors.torch import load_file

import mlaconvert
from mlaconvert import __version__
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.model.load import load_model

SaveFolder = Callable[..., Path]


@pytest.fixture
def pair(golden_state: dict[str, torch.Tensor], golden_config: dict[str, Any], save_folder: SaveFolder) -> Path:
    save_folder(golden_state, golden_config, "pair/transformer")
    return save_folder(golden_state, golden_config, "pair/transformer_2").parent


def test_help_and_version() -> None:
    assert succeed("--version").stdout == f"mlaconvert {__version__}\n"
    text = succeed("--help").stdout
    assert "analyze" in text
    assert "convert" in text
    assert invoke().exit_code == 2


# What the numbers of options count or measure.
UNITS = (
    r"\b(channels?|clips?|frames?|videos?|samples?|chunks?|steps?|passes|batches|seed|pixels|seconds?|GiB|share|scale|"
    r"rate|decay|factor|weight|tokens|TFLOP|layers|warped|guidance)\b"
)


def options(command: str) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Parameters of a command with what Typer is told of them."""
    signature = inspect.signature(COMMANDS[command], eval_str=True)  # type: ignore[arg-type]
    return {name: (parameter, parameter.annotation.__metadata__[0]) for name, parameter in signature.parameters.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_its_default_and_its_unit(command: str) -> None:
    """Switches are off; everything else names a default, its own or Typer's; a number names what it counts."""
    for name, (parameter, info) in options(command).items():
        assert info.help, name
        assert info.help.endswith("."), name
        if parameter.default is None:
            assert "Default: " in info.help, name
        elif parameter.default is not inspect.Parameter.empty and parameter.default is not False:
            assert info.show_default, name  # Typer prints it
        kind = str(parameter.annotation.__origin__)
        if "bool" not in kind:
            assert info.metavar, name
        if "int" in kind or "float" in kind:
            assert re.search(UNITS, info.help, re.IGNORECASE), name


OPTION = r"(?<![\w-])--[a-z][a-z-]*"
OF_OTHER_PROGRAMS = {
    *("--fsdp", "--use"),  # accelerate's, whose names go on with an underscore
    *("--model-path", "--transformer-path", "--num-gpus", "--dp-size"),  # SGLang's
}


def test_options_that_messages_name_exist() -> None:
    """Errors send a user to options: after a renaming they would send nowhere."""
    texts = [
        node.value
        for path in Path(mlaconvert.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = {name for text in texts for name in re.findall(OPTION, text)}
    assert {"--data", "--subfolder"} <= named
    assert named.difference(*command_line.options().values()) == OF_OTHER_PROGRAMS


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_the_help_of_an_option_names_are_of_the_same_command(command: str) -> None:
    named = {name for _, info in options(command).values() for name in re.findall(OPTION, info.help)}
    assert named <= command_line.options()[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_values_complete(command: str) -> None:
    """A metavar that lists values promises that a shell completes them, and nothing else; recipes and `tiny` too."""
    for name, (_, info) in options(command).items():
        values = [value for value in (info.metavar or "").split("|") if not value.isupper()]
        if "|" in (info.metavar or ""):
            assert info.autocompletion("") == values, name
            assert info.autocompletion(values[0][:2])[0] == values[0], name
        if name == "checkpoint":
            assert "tiny" in info.autocompletion("ti"), name
        if name == "recipe":
            assert info.autocompletion(""), name


COMPLETIONS = (
    ("co", ["convert"]),
    ("heal folder --stage d", ["distill", "dmd"]),
    ("heal folder --recipe videomla-d", ["videomla-distill", "videomla-dmd"]),
    ("convert tiny --recipe video", ["videomla"]),
    ("sweep tiny --recipe tiny-s", ["tiny-splits"]),
    ("convert ti", ["tiny"]),
    ("analyze mo", ["model.safetensors", "models/"]),
    ("convert models/", ["models/one.pt"]),
)
COMPLETE = """
import contextlib, io, json, os, sys
from mlaconvert.cli import app
lines, sys.argv = sys.argv[1:], ["mlaconvert"]
for line in lines:
    os.environ |= {"COMP_WORDS": f"mlaconvert {line}", "COMP_CWORD": str(len(line.split()))}
    with contextlib.redirect_stdout(io.StringIO()) as found, contextlib.suppress(SystemExit):
        app()
    print(json.dumps([line, found.getvalue().split()]))
    assert "torch" not in sys.modules, line
"""


def test_a_shell_completes_words(tmp_path: Path) -> None:
    """What bash asks for, answered without anything heavy."""
    (tmp_path / "models").mkdir()
    for name in ("model.safetensors", "model.txt", "models/one.pt", "models/.hidden.pt"):
        (tmp_path / name).touch()
    command = [sys.executable, "-c", COMPLETE, *(line for line, _ in COMPLETIONS)]
    environment = os.environ | {"_MLACONVERT_COMPLETE": "complete_bash"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60, check=False
    )
    assert done.stderr == ""
    assert [tuple(json.loads(line)) for line in done.stdout.splitlines()] == list(COMPLETIONS)


def test_completion_can_be_shown() -> None:
    help_text = succeed("--help").stdout
    assert "--install-completion" in help_text
    assert "--show-completion" in help_text


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "yaml", "huggingface_hub", "matplotlib", "safetensors")
    code = f"import sys, mlaconvert.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_tables_need_no_plots() -> None:
    modules = "mlaconvert.conversion.run, mlaconvert.reports.tables, mlaconvert.reports.evaluation_tables"
    code = f"import sys, {modules}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "False\n"


def test_analyze_plans_a_cache_in_bytes(golden: Path) -> None:
    plan = json.loads(succeed("analyze", golden, "--bytes-per-token", 9, "--json").stdout)["memory"]
    assert plan["mla"]["bytes_per_token"] == 3 * 9
    assert plan["dense"]["bytes_per_token"] == 3 * 2 * 96 * 2


def test_analyze_counts_a_minute_at_the_models_own_speed(golden: Path, tmp_path: Path) -> None:
    """16 video frames a second of Wan2.1, 24 of a camera's world model: 240 and 360 latent frames a minute."""
    plans = [
        json.loads(succeed("analyze", source, "--json").stdout)["memory"]
        for source in (golden, make_worldplay(tmp_path))
    ]
    assert [plan["fps"] for plan in plans] == [16, 24]
    assert [plan["minute_frames"] for plan in plans] == [240, 360]


def test_analyze_shows_spectra_and_memory(golden: Path, tmp_path: Path) -> None:
    result = succeed("analyze", golden, "--layers", "0,2", "--gpu-gb", 24, "--plot", tmp_path / "plot.png")
    assert "Weight spectra" in result.stdout
    assert "Memory at 480x832" in result.stdout
    assert "3 layers x 96 wide x 4 heads" in result.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_analyze_json_is_only_json(golden: Path) -> None:
    result = succeed("analyze", golden, "--json", "--kv-rank", 5, "--threshold", 0.5, "--height", 96, "--width", 160)
    data = json.loads(result.stdout)
    assert (data["kv_rank"], data["threshold"], data["num_layers"]) == (5, 0.5, 3)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    assert data["memory"]["frame_tokens"] == 6 * 10
    assert data["memory"]["window_frames"] == 7
    assert data["memory"]["mla"]["scalars_per_token"] == [5 + 1] * 3


def test_analyze_of_a_converted_model(golden: Path, tmp_path: Path) -> None:
    succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd", "--kv-rank", 10, "--layers", "1")
    data = json.loads(succeed("analyze", tmp_path / "out", "--json").stdout)
    assert [layer["kind"] for layer in data["layers"]] == ["dense", "mla", "dense"]
    assert data["memory"]["mla"]["scalars_per_token"] == [192, 16, 192]


def test_analyze_of_two_experts(pair: Path, tmp_path: Path) -> None:
    data = json.loads(succeed("analyze", pair, "--json", "--plot", tmp_path / "plot.png").stdout)
    assert list(data["experts"]) == ["transformer", "transformer_2"]
    assert (tmp_path / "plot-transformer_2.png").is_file()
    assert "kv_rank" in json.loads(succeed("analyze", pair, "--subfolder", "transformer_2", "--json").stdout)


def test_convert_shows_the_model_first_and_the_layers_after(golden: Path, tmp_path: Path) -> None:
    result = succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd", "--verify")
    assert "wan t2v, native layout, 3 layers x 96 wide x 4 heads" in result.stderr
    assert "576 -> 42 scalars a token (-92.7%)" in result.stderr
    assert "verified: 66 tensors" in result.stderr
    assert "converted layers" in result.stdout
    assert "a proxy, no data" in result.stdout
    load_model(tmp_path / "out")


def test_convert_options_reach_the_model(golden: Path, tmp_path: Path) -> None:
    flags = ("--init", "random", "--kv-rank", 9, "--q-rank", "none", "--nope-dim", 7, "--rope-dim", 10)
    more = ("--key-norm", "token", "--dtype", "bfloat16", "--layers", "0,2", "--seed", 5, "--json")
    data = json.loads(succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd", *flags, *more).stdout)
    recipe = data["models"][0]["recipe"]
    expected = {"init": "random", "kv_rank": 9, "q_rank": "none", "nope_dim": 7, "rope_dim": 10, "v_dim": 24}
    expected |= {"key_norm": "token", "dtype": "bfloat16", "layers": "0,2", "seed": 5}
    assert recipe | expected == recipe
    model = load_model(tmp_path / "out")
    assert model.config.cached_scalars() == (20, 192, 20)
    assert model.dtype == torch.bfloat16


def test_options_override_the_recipe(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("init: svd\nkv_rank: 9\nrope_dim: 4\nkey_norm: token\n")
    arguments = ("convert", golden, "-o", tmp_path / "out", "--recipe", path, "--kv-rank", 11, "--q-rank", 13)
    recipe = json.loads(succeed(*arguments, "--dry-run", "--json").stdout)["models"][0]["recipe"]
    assert (recipe["kv_rank"], recipe["rope_dim"], recipe["key_norm"], recipe["q_rank"]) == (11, 4, "token", 13)
    assert not (tmp_path / "out").exists()
    result = invoke("convert", golden, "-o", tmp_path / "out", "--recipe", "videomla")
    assert result.exit_code == 2
    assert "kv_rank is 192, larger than the layer, which is 96 wide" in result.stderr


def test_dry_run_says_what_a_calibration_takes_of_the_disk(tmp_path: Path) -> None:
    few, many = (
        succeed("convert", "tiny", "-o", tmp_path / "out", "--clips", clips, "--dry-run").stdout for clips in (5, 40)
    )
    found = [
        re.search(r"disk +(\S+ \w+) of moments, and about (\S+) (\w+) of activations", text) for text in (few, many)
    ]
    assert found[0]
    assert found[1]
    assert found[0][1] == found[1][1] == "3.66 MiB"  # of 6 layers: two 192 x 192 matrices and 6 of 32 x 32, float64
    assert float(found[1][2]) > 2 * float(found[0][2])
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_plan_with_sizes(golden: Path, tmp_path: Path) -> None:
    result = succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd", "--dry-run")
    assert "blocks.0.self_attn.kv_a_proj_with_mqa.weight" in result.stdout
    assert "14 x 96" in result.stdout
    assert "66 tensors that pass through" in result.stdout
    assert "1.58 MiB -> 1.40 MiB" in result.stdout
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_lossless_flag(golden: Path, tmp_path: Path) -> None:
    data = json.loads(
        succeed("convert", golden, "-o", tmp_path / "out", "--init", "lossless", "--verify", "--json").stdout
    )
    assert max(data["models"][0]["verification"]["attention_errors"].values()) < 1e-5
    result = invoke("convert", golden, "-o", tmp_path / "other", "--init", "lossless", "--kv-rank", 9)
    assert (result.exit_code, "it fixes kv_rank" in result.stderr) == (2, True)


def test_overwrite(golden: Path, tmp_path: Path) -> None:
    succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd")
    result = invoke("convert", golden, "-o", tmp_path / "out", "--init", "svd")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "--overwrite" in result.stderr
    succeed("convert", golden, "-o", tmp_path / "out", "--init", "svd", "--overwrite", "--kv-rank", 3)
    weights = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert weights["blocks.0.self_attn.kv_a_layernorm.weight"].shape == (3,)


def test_two_experts(pair: Path, tmp_path: Path) -> None:
    result = succeed("convert", pair, "-o", tmp_path / "out", "--init", "svd", "--verify")
    assert "transformer: pair" in result.stderr
    assert "verified: 132 tensors" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformer", "transformer_2"]
