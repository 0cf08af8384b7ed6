"""Models with Wan's self-attention and more: what they have beyond is carried along; other attention is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families_cases import DIFFUSERS_CONFIG, SaveFolder, State, to_diffusers
from safetensors.torch import load_file

from mlaconvert.conversion.analyze import analyze
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert, preview
from mlaconvert.errors import UnsupportedModelError
from mlaconvert.families.merged import remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import WEIGHTS_NAME
from mlaconvert.listener import Listener
from mlaconvert.model.load import load_model

D = 96  # width of the golden model, of three blocks and four heads
TIME = ("time_embedding", "time_projection", *(f"blocks.{block}.modulation" for block in range(3)))


def add(**shapes: tuple[int, ...]) -> Callable[[State], None]:
    """Adds tensors of these shapes, random; "_N_" in a name counts the blocks, "__" is a dot."""

    def change(state: State) -> None:
        draw = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            for block in range(3) if "N" in name else (0,):
                state[name.replace("__", ".").replace("N", str(block))] = torch.randn(shape, generator=draw)

    return change


def less(*parts: str) -> Callable[[State], None]:
    return lambda state: [state.pop(name) for name in list(state) if any(part in name for part in parts)] and None


def both(*changes: Callable[[State], None]) -> Callable[[State], None]:
    return lambda state: [change(state) for change in changes] and None


def wider_cross_attention(state: State) -> None:
    for block in range(3):
        state[f"blocks.{block}.cross_attn.k.weight"] = torch.ones(D, 40)


def whole_numbers(state: State) -> None:
    state["token_map"] = torch.arange(7)
    state["seen"] = torch.tensor(True)
    state["nothing"] = torch.ones(0, 3)


# What it is -> (how the golden model becomes one, what the line says of it).
RELATIVES = {
    "LingBot-World": (
        add(
            patch_embedding_wancamctrl__weight=(D, 24),
            blocks__N__cam_injector_layer1__weight=(D, D),
            blocks__N__cam_scale_layer__bias=(D,),
        ),
        "7 tensors beyond Wan's, of camera injectors: carried along",
    ),
    "VACE": (add(vace_blocks__0__self_attn__q__weight=(D, D)), "1 tensor beyond Wan's, of VACE's control blocks"),
    "FLF2V": (add(img_emb__emb_pos=(1, 5, 7)), "1 tensor beyond Wan's, of the positions of a first and a last frame"),
    "SkyReels-V2": (add(fps_embedding__weight=(2, D)), "1 tensor beyond Wan's, of a frame-rate embedding"),
    "HuMo": (add(audio_proj__audio_proj_glob_1__layer__weight=(4, 5)), "1 tensor beyond Wan's, of an audio branch"),
    "ReCamMaster": (
        add(blocks__N__cam_encoder__weight=(D, 12), blocks__N__projector__weight=(D, D)),
        "6 tensors beyond Wan's, of a camera encoder",
    ),
    "DreamZero": (
        add(action_encoder__w=(4, 5), state_encoder__w=(2,)),
        "2 tensors beyond Wan's, of actions and states",
    ),
    "AnyFlow": (add(condition_embedder__delta_embedder__linear_1__bias=(D,)), "1 tensor .*second time"),
    "Matrix-Game": (
        both(
            less("text_embedding", "cross_attn.norm", "cross_attn.q.bias"),
            add(blocks__0__action_model__t_qkv__weight=(9, D)),
        ),
        "1 tensor beyond Wan's, of action modules: carried along\n"
        "without 13 of Wan's own tensors, of text_embedding and cross_attn: converted as it is",
    ),
    "MiniMax-Remover": (less("text_embedding", "cross_attn"), "without 34 of Wan's own tensors, of text_embedding and"),
    "text of another width": (wider_cross_attention, "3 tensors beyond Wan's, of cross_attn: carried along"),
    "time of its own": (
        both(less(*TIME), add(blocks__N__adaln__weight=(3, D))),
        "init svd takes what self-attention reads for a plain LayerNorm's outputs",
    ),
    "a module of any name": (add(memory_bank__weight=(5,)), "1 tensor beyond Wan's, of memory_bank: carried along"),
    "blocks of another kind": (
        add(_gan_ca_blocks__0__q__weight=(5,)),
        "1 tensor beyond Wan's, of _gan_ca_blocks: carried along",
    ),
    "whole numbers": (whole_numbers, "3 tensors beyond Wan's, of .*token_map.*: carried along"),
}


@pytest.mark.parametrize("case", RELATIVES)
def test_all_else_is_carried_along(
    case: str, golden_state: State, save_folder: SaveFolder, tmp_path: Path, golden_config: dict[str, object]
) -> None:
    change, says = RELATIVES[case]
    change(golden_state)
    source = save_folder(golden_state, golden_config)
    recipe = ConvertRecipe(init="svd", kv_rank=9)
    said: list[str] = []
    assert preview(source, recipe=recipe).models[0].plan.layers
    made = convert(source, tmp_path / "out", recipe, verify=True, listener=Listener(say=said.append))
    text = "\n".join(said)
    assert re.search(says, text), text
    kept = load_file(tmp_path / "out" / WEIGHTS_NAME)
    for name, tensor in golden_state.items():  # the files are compared by the safetensors library, not by our readers
        if ".self_attn." not in name or name.startswith("vace"):
            assert kept[name].dtype == tensor.dtype
            assert torch.equal(kept[name], tensor), name
    assert made.models[0].verification is not None
    outside = [n for n in golden_state if not n.startswith("blocks.") or ".self_attn." not in n]
    assert made.models[0].verification.passed_through == len(outside)
    assert "blocks.2.self_attn.kv_b_proj.weight" in kept
    assert len(analyze(tmp_path / "out").layers) == len(analyze(source).layers) == 3
    convert(source, tmp_path / "random", ConvertRecipe(init="random", kv_rank=9), verify=True)
    with pytest.raises(UnsupportedModelError, match=r"does not know all of this one .*swap_attention"):
        load_model(source)
    with pytest.raises(UnsupportedModelError, match=r"\); run it in its own code with swap_attention$"):
        load_model(tmp_path / "out")  # is converted, so nobody is told to
    with pytest.raises(UnsupportedModelError, match="does not know all of this one"):  # before any work
        convert(source, tmp_path / "calibrated", ConvertRecipe(init="calibrated"))


def test_a_plain_layer_norm_where_time_is_not_wans(
    golden_state: State, save_folder: SaveFolder, tmp_path: Path, golden_config: dict[str, object]
) -> None:
    """Without its modulation a model converts as with one of zeros; inputs are then LayerNorm outputs."""
    whole = dict(golden_state)
    for name in golden_state:
        if name.startswith(TIME):
            whole[name] = torch.zeros_like(golden_state[name])
    less(*TIME)(golden_state)
    found = []
    for state, name in ((whole, "zeros"), (golden_state, "none")):
        folder = save_folder(state, golden_config, name)
        convert(folder, tmp_path / f"{name}-mla", ConvertRecipe(init="svd", kv_rank=9))
        found.append(load_file(tmp_path / f"{name}-mla" / WEIGHTS_NAME))
    latent = [name for name in found[1] if ".self_attn." in name]
    assert len(latent) > 20
    assert all(torch.equal(found[0][name], found[1][name]) for name in latent)


def test_passengers_keep_their_names_and_their_layout(
    golden_state: State, save_folder: SaveFolder, tmp_path: Path
) -> None:
    state = to_diffusers(golden_state) | {"blocks.1.extra.table": torch.arange(6).view(2, 3)}
    source = save_folder(state, DIFFUSERS_CONFIG)
    with open_checkpoint(source) as checkpoint:
        assert remarks(checkpoint) == ["1 tensor beyond Wan's, of extra: carried along"]
    with pytest.raises(UnsupportedModelError, match=r"'blocks.1.extra.table' is not a Wan model's, .*diffusers"):
        convert(source, tmp_path / "native", ConvertRecipe(init="random", layout="native"))
    assert not (tmp_path / "native").exists()
    convert(source, tmp_path / "half", ConvertRecipe(init="random", dtype="bfloat16"))  # numbers that count stay whole
    kept = load_file(tmp_path / "half" / WEIGHTS_NAME)
    assert torch.equal(kept["blocks.1.extra.table"], state["blocks.1.extra.table"])
    assert kept["proj_out.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "conversion.json").read_text())["source"]["passengers"] == {
        "tensors": 1,
        "parts": ["extra"],
        "missing": 0,
    }


OTHER_ATTENTION = {
    "blocks.0.to_gate_compress.weight": r"sparse attention and a gate \(FastWan, VSA\)",
    "blocks.1.self_attn.attn_op.local_attn.proj_l.weight": r"sparse-linear attention \(SLA",
    "blocks.1.attn1_mot_ref.to_q.weight": r"joint with a second set of blocks \(Video-As-Prompt\)",
    "blocks.2.self_attn.to_out_prope.weight": r"turns by cameras \(PRoPE\)",
    "blocks.1.self_attn.prope_o.weight": r"turns by cameras \(PRoPE\) \(found 'blocks.1.self_attn.prope_o.weight'\)",
    "blocks.0.self_attn.add_k_proj.weight": "joint attention to the text",
    "blocks.0.self_attn.gate_proj.weight": "gated attention",
    "blocks.0.self_attn.norm_v.weight": r"differs from Wan's: 1 tensor .*self_attn\.norm_v",
    "blocks.x.self_attn.q.weight": r"differs from Wan's: 1 tensor .*blocks\.x",
}


@pytest.mark.parametrize("name", OTHER_ATTENTION)
def test_other_attention_is_named(name: str, golden_state: State, save_folder: SaveFolder) -> None:
    golden_state[name] = torch.ones(D, D)
    with pytest.raises(UnsupportedModelError, match=OTHER_ATTENTION[name]):
        open_checkpoint(save_folder(golden_state, {"num_heads": 4}))


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        (("blocks.1.cross_attn.k.bias",), r"1 tensor .* missing: blocks\.1\.cross_attn\.k\.bias"),
        (("text_embedding.2.bias",), r"1 tensor .* missing: text_embedding\.2\.bias"),
        (
            ("self_attn.q.bias",),
            r"differs from Wan's: 3 tensors are missing, of every block self_attn.q.bias; expected b",
        ),  # of all blocks: attention without biases is not Wan's
        (("self_attn.norm_k",), r"3 tensors are missing, of every block self_attn.norm_k.weight"),
    ],
)
def test_damage_is_no_other_model(
    drop: tuple[str, ...], says: str, golden_state: State, save_folder: SaveFolder
) -> None:
    less(*drop)(golden_state)
    with pytest.raises(UnsupportedModelError, match=says):
        open_checkpoint(save_folder(golden_state, {"num_heads": 4}))
