"""Latent attention of another code is listed, to be sent on in one paste, and never half read.

The names below `self_attn` here are made up: those of VideoMLA's checkpoints are not public. The shapes are in the
proportions of its paper: latents of 192 and 768 at width 1536, with 12 heads of 96 + 32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from command_line import invoke
from documents import page
from families_cases import SaveFolder, State

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.errors import UnknownLayoutError, UnsupportedModelError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.unknown import list_tensors
from mlaconvert.families.wan import WanFamily
from mlaconvert.files.headers import TensorInfo

D, LAYERS = 128, 3
CONFIG = WanConfig(dim=D, num_heads=1, num_layers=LAYERS, ffn_dim=96, freq_dim=32, text_dim=24)
LATENT = {
    "kv_down.weight": (D // 8, D),
    "kv_norm.weight": (D // 8,),
    "k_up.weight": (3 * D // 4, D // 8),
    "v_up.weight": (D, D // 8),
    "q_down.weight": (D // 2, D),
    "q_norm.weight": (D // 2,),
    "q_up.weight": (3 * D // 4, D // 2),
    "q_rope.weight": (D // 4, D // 2),
    "k_rope.weight": (8, D),
    "o.weight": (D, D),
    "o.bias": (D,),
}


def wan(latent: dict[str, tuple[int, ...]], module: str = "self_attn") -> State:
    """A small Wan transformer whose blocks have these tensors for their self-attention."""
    dense = {name: shape for name, shape in WanFamily().expected_shapes(CONFIG).items() if ".self_attn." not in name}
    shapes = dense | {f"blocks.{i}.{module}.{part}": shape for i in range(LAYERS) for part, shape in latent.items()}
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def save(state: State, path: Path) -> Path:
    """As the codebases of streaming models save it: twice, below a wrapper's name."""
    both = {f"{key}": {f"model.{name}": t for name, t in state.items()} for key in ("generator", "generator_ema")}
    torch.save(both, path)
    return path


def templates(state: State) -> set[str]:
    """Names without the number of their block."""
    return {re.sub(r"^blocks\.\d+", "blocks", name) for name in state}


def unfolded(line: str) -> set[str]:
    """The names that a line of the list stands for."""
    name = line.split("  ", maxsplit=1)[0]
    parts = [
        [one for run in part[1:-1].split(",") for one in numbers(run)] if part.startswith("{") else [part]
        for part in re.split(r"(\{[^}]*\})", name)
    ]
    return {"".join(chosen) for chosen in product(*parts)}


def numbers(run: str) -> list[str]:
    first, dots, last = run.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else [run]


def test_every_tensor_is_listed_once_and_folded(tmp_path: Path) -> None:
    state = wan(LATENT)
    with pytest.raises(
        UnknownLayoutError, match=r"model\.pt: its self-attention differs .* nothing was read"
    ) as caught:
        open_checkpoint(save(state, tmp_path / "model.pt"))
    head, *lines = caught.value.details
    assert re.fullmatch(r"mlaconvert \S+: \d+ tensors in model\.pt; numbers in its config\.json: none", head)
    assert str(tmp_path) not in "\n".join(caught.value.details)  # a paste tells nobody's folders
    assert "{generator,generator_ema}/model.blocks.{0..2}.self_attn.kv_down.weight  BF16 [16, 128]" in lines
    assert "{generator,generator_ema}/model.patch_embedding.bias  BF16 [128]" in lines
    listed = [name for line in lines for name in unfolded(line)]
    assert sorted(listed) == sorted(f"{key}/model.{name}" for key in ("generator", "generator_ema") for name in state)
    assert len(lines) == len(templates(state))


def test_the_command_shows_the_list_and_leaves_nothing(tmp_path: Path) -> None:
    path, output = save(wan(LATENT), tmp_path / "model.pt"), tmp_path / "out"
    for command in (("analyze", path), ("convert", path, "-o", output, "--init", "svd")):
        found = invoke(*command)
        first, head, *lines = found.stderr.splitlines()
        assert (found.exit_code, found.stdout) == (2, "")
        assert first.startswith(f"error: {path}: its self-attention differs from Wan's")
        assert "the list that mlaconvert analyze prints" in first  # engines show this line alone
        assert head.startswith("mlaconvert ")
        assert len(lines) == len(templates(wan(LATENT)))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "latent",
    [
        {"qkv.weight": (3 * D, D), "o.weight": (D, D)},
        {"kv_a_proj_with_mqa.weight": (24, D), "kv_b_proj.weight": (2 * D, 16), "o.weight": (D, D)},  # as DeepSeek's
        {"q.weight": (D, D), "kv_down.weight": (16, D)},
    ],
)
def test_names_that_are_half_known_are_not_half_read(latent: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(UnknownLayoutError) as caught:
        open_checkpoint(save(wan(latent), tmp_path / "model.pt"))
    for part in latent:
        assert any(f".{part}  " in line for line in caught.value.details)


def test_blocks_without_self_attention_by_name_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayoutError, match="family is not known") as caught:
        open_checkpoint(save(wan(LATENT, "mla"), tmp_path / "model.pt"))
    assert any(".mla.kv_down.weight  BF16 [16, 128]" in line for line in caught.value.details)


def test_a_config_that_says_what_the_layers_hold_is_believed(save_folder: SaveFolder) -> None:
    layer = MLALayer(kv_lora_rank=16, qk_nope_head_dim=96, v_head_dim=128, rope_components=((0, 1), (22, 1)))
    mla = MLAConfig(q_lora_rank=64, key_norm="latent", softmax_scale=0.1, layers=(layer,) * LAYERS)
    config = replace(CONFIG, mla=mla)
    state = {name: torch.ones(shape) for name, shape in WanFamily().expected_shapes(config).items()}
    raw = WanFamily().raw_config(config)
    with open_checkpoint(save_folder(state, raw | {"mla": mla.to_json()})) as checkpoint:
        assert checkpoint.config.mla == mla
    with pytest.raises(UnknownLayoutError, match=r"kv_a_layernorm.* needs the config\.json of its folder"):
        open_checkpoint(save_folder(state, raw, name="without"))


LESS: dict[str, Callable[[State], object]] = {
    "one block without": lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.self_attn.")],
    "a key that is there": lambda s: s.update({"blocks.0.self_attn.k.weight": torch.ones(D, D)}),
}


@pytest.mark.parametrize("case", LESS)
def test_what_is_damaged_is_not_taken_for_another_code(case: str, tmp_path: Path) -> None:
    state = wan(LATENT)
    LESS[case](state)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(save(state, tmp_path / "model.pt"))
    assert caught.value.details == ()


def test_the_papers_matrices_fill_the_tensors_that_the_page_says() -> None:
    layer = MLALayer(
        kv_lora_rank=192, qk_nope_head_dim=96, v_head_dim=128, rope_components=tuple((i, 1) for i in range(16))
    )
    mla = MLAConfig(q_lora_rank=768, key_norm="latent", softmax_scale=128**-0.5, layers=(layer,))
    shapes = WanFamily().expected_shapes(WanConfig(dim=1536, num_heads=12, num_layers=1, ffn_dim=8960, mla=mla))
    rows = re.findall(r"^\| .*?(?:W_|RMSNorm).*? \| (.+?) \| `(.+?)`", page("docs/format.md"), re.MULTILINE)
    ours = {name.removeprefix("blocks.0.self_attn."): shape for name, shape in shapes.items() if ".self_attn." in name}
    found = {
        name: [tuple(map(int, part.split(", "))) for part in re.findall(r"\[(.+?)\]", cell)] for cell, name in rows
    }
    assert found.keys() == {name for name in ours if not name.endswith(".bias")}
    for name, parts in found.items():
        assert {part[1:] for part in parts} == {ours[name][1:]}, name
        assert sum(part[0] for part in parts) == ours[name][0], name


def info(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    return TensorInfo(name, shape, dtype, 4)


def test_only_what_is_alike_is_folded() -> None:
    tensors = [info(f"blocks.{i}.a", 4 if i == 2 else 3, 5) for i in (4, 0, 1, 2)]
    tensors += [info("critic/blocks.0.a", 3, 5), info("ema/blocks.0.a", 3, 5), info("b", dtype=torch.float8_e4m3fn)]
    assert list_tensors(tensors) == (
        "blocks.{0..1,4}.a  F32 [3, 5]",
        "blocks.2.a  F32 [4, 5]",
        "{critic,ema}/blocks.0.a  F32 [3, 5]",
        "b  F8_E4M3 []",
    )


def test_a_list_has_an_end_whatever_the_names() -> None:
    many = list_tensors(info(f"part{i}.weight", i) for i in range(1000))
    assert len(many) == 400
    assert many[-1] == "and 601 lines more"
    assert list_tensors([info(f"blocks.{'9' * 5000}.a", 1)])[0].startswith("blocks.999")
