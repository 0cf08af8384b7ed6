"""HY-WorldPlay's files: recognised by name and shape, held to both, and told apart from HunyuanVideo 1.5's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_relatives import GOLDEN, make_worldplay
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from mlaconvert.families.known import family_of
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.families.worldplay import WorldPlayFamily
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_camera_model

KEY = "double_blocks.1.img_attn_k.weight"
State = dict[str, Tensor]


def spoil(folder: Path, change: Callable[[State], Any], config: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """The model of `folder` with its state dict and its config.json changed in place."""
    state, raw = dict(load_file(folder / WEIGHTS_NAME)), json.loads((folder / CONFIG_NAME).read_text())
    change(state)
    save_file(state, folder / WEIGHTS_NAME)
    if config is not None:
        config(raw)
        (folder / CONFIG_NAME).write_text(json.dumps(raw))
    return folder


def keep(_: object) -> None:
    """Nothing is changed."""


def test_it_is_recognised_and_takes_time_as_its_pipeline_does(tmp_path: Path) -> None:
    with open_checkpoint(make_worldplay(tmp_path)) as checkpoint:
        config = checkpoint.config
        assert isinstance(config, CameraConfig)
        assert isinstance(family_of(config), WorldPlayFamily)
        assert (config.dim, config.num_heads, config.num_layers, config.ffn_dim) == (48, 3, 2, 120)
        assert (config.in_dim, config.out_dim, config.text_dim, config.image_dim) == (11, 5, 28, 20)
        assert (config.rope_split, config.rope_theta, config.patch_size) == ((2, 4, 2), 256, (1, 2, 2))
        assert (config.refiner_layers, config.refiner_dim, config.glyph_dims) == (2, 192, None)
        assert config.streaming == StreamingConfig(chunk_frames=4, window_frames=24, sink_frames=0, positions="window")
        assert checkpoint.describe().startswith("hy-worldplay i2v, native layout, 2 layers x 48 wide x 3 heads")
        assert checkpoint.timing.assumed == {"chunk_frames", "window_frames", "sink_frames", "positions"}
        assert "a bidirectional one has the same tensors" in checkpoint.timing.remarks[0]
        assert "minWM's with cameras and actions, whose cache holds no keys that cam" in checkpoint.timing.remarks[0]
        assert checkpoint.attention(1).norms == 3
        assert torch.equal(checkpoint.attention(1).k_weight, load_file(checkpoint.store.files[0])[KEY])


def test_its_files_need_no_config_where_heads_are_as_published(tmp_path: Path) -> None:
    geometry = {"dim": 256, "num_heads": 2, "rope_dims": (16, 56, 56), "patch_size": (1, 1, 1)}
    folder = make_worldplay(tmp_path, **geometry)
    (folder / CONFIG_NAME).unlink()
    with open_checkpoint(folder / WEIGHTS_NAME) as checkpoint:
        assert isinstance(checkpoint.config, CameraConfig)
        assert (checkpoint.config.num_heads, checkpoint.config.rope_split) == (2, (8, 28, 28))
        raw = checkpoint.raw_config
    theirs = json.loads((GOLDEN / "worldplay_tiny" / CONFIG_NAME).read_text())
    assert raw.keys() <= theirs.keys()
    assert (raw["in_channels"], raw["concat_condition"], raw["mlp_width_ratio"]) == (5, True, 120 / 256)
    small = make_worldplay(tmp_path, "small")
    (small / CONFIG_NAME).unlink()
    with pytest.raises(UnsupportedModelError, match=r"do not say how many channels turn .*--config FILE"):
        open_checkpoint(small)


@pytest.mark.parametrize("rank", [None, 5])
def test_names_go_there_and_back(tmp_path: Path, rank: int | None) -> None:
    """Every tensor that their class has, and of a converted model those below `img_attn.`."""
    folder = make_worldplay(tmp_path, glyphs=True)
    if rank is not None:
        convert(folder, tmp_path / "out", ConvertRecipe(init="random", kv_rank=rank))
        folder = tmp_path / "out"
    with open_checkpoint(folder) as checkpoint:
        shapes = checkpoint.family.expected_shapes(checkpoint.config)
        assert list(checkpoint.names) != list(shapes)  # in the file's order
        assert checkpoint.names.keys() == shapes.keys() == load_camera_model(folder).state_dict().keys()
        for canonical, shape in shapes.items():
            assert checkpoint.info(canonical).shape == shape
            assert checkpoint.output_name(canonical) == checkpoint.names[canonical]
        with pytest.raises(UnsupportedModelError, match="HY-WorldPlay has no diffusers layout"):
            checkpoint.output_name("blocks.0.ffn.0.weight", "diffusers")
        inside = {name for name in checkpoint.names.values() if ".img_attn." in name}
        assert len(inside) == (0 if rank is None else 2 * 12)


def test_loras_of_its_modules_are_merged(tmp_path: Path) -> None:
    folder, draw = make_worldplay(tmp_path), torch.Generator().manual_seed(4)
    changes = {
        f"transformer.{module}.lora_{part}.weight": torch.randn(shape, generator=draw)
        for module, rows in (("double_blocks.1.img_attn_k", 48), ("double_blocks.0.txt_mlp.fc1", 120))
        for part, shape in (("A", (3, 48)), ("B", (rows, 3)))
    }
    save_file(changes, tmp_path / "lora.safetensors")
    dense = load_file(folder / WEIGHTS_NAME)
    with open_checkpoint(Source(folder, loras=(LoraFile(path=tmp_path / "lora.safetensors"),))) as merged:
        for canonical, theirs in (("blocks.1.self_attn.k", "double_blocks.1.img_attn_k"),
                                  ("blocks.0.text_ffn.0", "double_blocks.0.txt_mlp.fc1")):  # fmt: skip
            down, up = (changes[f"transformer.{theirs}.lora_{part}.weight"] for part in "AB")
            assert relative(merged.read(f"{canonical}.weight"), dense[f"{theirs}.weight"] + up @ down) < 1e-6
        assert torch.equal(merged.read("patch_embedding.weight"), dense["img_in.proj.weight"])


def test_a_lora_of_branches_that_it_has_not_is_merged_without_them(tmp_path: Path) -> None:
    folder = spoil(make_worldplay(tmp_path), lambda s: [s.pop(n) for n in list(s) if n.startswith("vision_in.")])
    changes = {
        f"{module}.lora_{part}.weight": torch.ones((2, 48) if part == "A" else (48, 2))
        for module in ("double_blocks.1.img_attn_k", "byt5_in.fc1", "vision_in.proj.1")
        for part in "AB"
    }
    save_file(changes, tmp_path / "lora.safetensors")
    before = load_file(folder / WEIGHTS_NAME)[KEY]
    with open_checkpoint(Source(folder, loras=(LoraFile(path=tmp_path / "lora.safetensors"),))) as merged:
        assert relative(merged.read("blocks.1.self_attn.k.weight"), before + 2) < 1e-6
        said = "; ".join(remarks(merged))
        assert "byt5_in" in said
        assert "vision_in" in said


def test_what_only_another_pass_reads_is_carried_along(tmp_path: Path) -> None:
    """Guidance, and the second time of a model that was distilled: as files that are made of others may hold them."""
    more = {"guidance_in.mlp.0.weight": torch.ones(48, 256), "time_r_in.mlp.2.bias": torch.ones(48)}
    folder = spoil(make_worldplay(tmp_path), lambda s: s.update(more))
    convert(folder, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=5), verify=True)
    made = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert all(torch.equal(made[name], tensor) for name, tensor in more.items())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert remarks(checkpoint) == ["2 tensors beyond HY-WorldPlay's, of guidance_in and time_r_in: carried along"]
        load_camera_model(checkpoint)


def test_hunyuanvideo_is_told_from_it(tmp_path: Path) -> None:
    """The same class without cameras and actions."""
    folder = spoil(make_worldplay(tmp_path), lambda s: [s.pop(n) for n in list(s) if "prope" in n or "action" in n])
    with pytest.raises(
        UnsupportedModelError, match=r"this is HunyuanVideo .*so it has no cache that could be"
    ) as caught:
        open_checkpoint(folder)
    assert "expected a transformer of Wan or HY-WorldPlay; " in str(caught.value)
    assert "(minWM's causal models of it have one, and are not converted)" in str(caught.value)
    assert str(caught.value).endswith("; give HY-WorldPlay's autoregressive model")


REFUSED: dict[str, tuple[Callable[[State], Any], Callable[[dict[str, Any]], Any], type[InputError], str]] = {
    "a missing weight": (lambda s: s.pop(KEY), keep, UnsupportedModelError, rf"1 tensor of .* is missing: {KEY}"),
    "a missing camera": (
        lambda s: s.pop("double_blocks.1.img_attn_prope_proj.bias"), keep, UnsupportedModelError,
        "img_attn_prope_proj.bias",
    ),
    "no first block": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("double_blocks.0.")], keep, UnsupportedModelError,
        "'double_blocks.0.img_attn_q_norm.weight' is missing",
    ),
    "no biases": (
        lambda s: [s.pop(n) for n in list(s) if "img_attn" in n and n.endswith("bias")], keep, UnsupportedModelError,
        r"self-attention differs from HY-WorldPlay's: 8 tensors are missing, of every block",
    ),
    "a shape": (
        lambda s: s.update({KEY: torch.ones(48, 47)}), keep, UnsupportedModelError,
        rf"'{KEY}' has shape \[48, 47\], expected \[48, 48\]",
    ),
    "norms over the whole width": (
        lambda s: s.update({n: torch.ones(48) for n in list(s) if n.endswith("img_attn_k_norm.weight")}), keep,
        UnsupportedModelError, r"img_attn_k_norm.weight' has shape \[48\], expected \[16\]",
    ),
    "a gate of attention": (
        lambda s: s.update({"double_blocks.0.img_attn_gate.weight": torch.ones(3)}), keep, UnsupportedModelError,
        "1 tensor is not part of a HY-WorldPlay model: double_blocks.0.img_attn_gate.weight",
    ),
    "more than its class has": (
        lambda s: s.update({"pose_in.weight": torch.ones(48, 256)}), keep, UnsupportedModelError,
        "1 tensor beyond HY-WorldPlay's, of pose_in; mlaconvert.load_camera_model could not run such a model",
    ),
    "more in a block": (
        lambda s: s.update({"double_blocks.0.extra.weight": torch.ones(3)}), keep, UnsupportedModelError,
        "1 tensor beyond HY-WorldPlay's, of extra; ",
    ),
    "no actions": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("action_in.")], keep, UnsupportedModelError,
        "without 4 of HY-WorldPlay's own tensors, of action_in; models without discrete actions, such as minWM's",
    ),
    "no actions, and more": (
        lambda s: [s.update({"pose_in.weight": torch.ones(3)}), *(s.pop(n) for n in list(s) if "action_in." in n)],
        keep, UnsupportedModelError,
        "1 tensor beyond HY-WorldPlay's, of pose_in; without 4 of HY-WorldPlay's own tensors, of action_in; ",
    ),
    "no final layer": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("final_layer")], keep, UnsupportedModelError,
        "tensor 'final_layer.linear.weight' is missing; expected 2 dimensions",
    ),
    "integers": (
        lambda s: s.update({KEY: torch.ones(48, 48, dtype=torch.int32)}), keep, UnsupportedModelError,
        "expected float32, bfloat16",
    ),
    "a layer more": (
        keep, lambda c: c.update(mm_double_blocks_depth=3), CheckpointError,
        "says mm_double_blocks_depth 3, the weights have 2 layers",
    ),
    "heads": (keep, lambda c: c.update(heads_num=5), ConfigError, "hidden_size 48 .* hidden_size and heads_num"),
    "turns": (keep, lambda c: c.update(rope_dim_list=[4, 6, 4]), ConfigError, "rope_dim_list is .* are 16 together"),
    "odd turns": (keep, lambda c: c.update(rope_dim_list=[5, 7, 4]), ConfigError, "three even numbers"),
    "turns in words": (keep, lambda c: c.update(rope_dim_list="wide"), ConfigError, "json: rope_dim_list is"),
    "no base": (keep, lambda c: c.update(rope_theta=0), ConfigError, "rope_theta"),
    "a patch in time": (keep, lambda c: c.update(patch_size=[2, 2, 2]), ConfigError, "a camera is of one latent frame"),
    "no norms": (keep, lambda c: c.update(qk_norm=False), UnsupportedModelError, "says qk_norm False; expected True"),
    "no mask of the text": (
        keep, lambda c: c.update(use_attention_mask=False), UnsupportedModelError, "use_attention_mask False; expected"
    ),
    "another activation": (
        keep, lambda c: c.update(mlp_act_type="relu"), UnsupportedModelError, "says mlp_act_type 'relu'; expected"
    ),
    "a mapping for a width": (keep, lambda c: c.update(hidden_size={}), ConfigError, "json: hidden_size is"),
    "no channels": (keep, lambda c: c.update(out_channels=0), ConfigError, "json: out_channels is 0: give 1 or more"),
    "layers below zero": (
        keep, lambda c: c.update(mm_double_blocks_depth=-1), ConfigError, "mm_double_blocks_depth is -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    change, config, error, says = REFUSED[case]
    folder = spoil(make_worldplay(tmp_path), change, config)
    with pytest.raises(error, match=says) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


SECTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "rope": (lambda mla: mla.pop("rope"), "mla.rope is 'cached'; where keys turn by cameras it is 'head'"),
    "present": (lambda mla: mla.update(present="latent"), "mla.present is 'latent'"),
    "key norm": (lambda mla: mla.update(key_norm="latent"), "mla.key_norm is 'latent'"),
    "narrow heads": (lambda mla: mla["layers"][0].update(v_head_dim=8), "heads stay 16 wide"),
    "bits": (
        lambda mla: mla["layers"][1].update(cache_bits=[[4, 6]]) or mla.update(format_version=3),
        "nothing is cached in bits",
    ),
    "a rank": (lambda mla: mla["layers"][1].update(kv_lora_rank=6), r"has shape \[5, 48\], expected \[6, 48\]"),
    "no layers": (lambda mla: mla.update(layers=[]), "has 0 entries for 2 layers"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_converted_model_is_held_to_its_section(tmp_path: Path, case: str) -> None:
    change, says = SECTIONS[case]
    convert(make_worldplay(tmp_path), tmp_path / "out", ConvertRecipe(init="random", kv_rank=5))
    with pytest.raises(InputError, match=says):
        open_checkpoint(spoil(tmp_path / "out", keep, lambda raw: change(raw["mla"])))
