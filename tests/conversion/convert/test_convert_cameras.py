"""Converting a model that is given a camera for every frame: what its cache holds of the past is made of latents."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command_line import invoke
from golden_relatives import make_worldplay
from safetensors.torch import load_file, save_file
from support import relative

from mlaconvert.config.camera import CameraConfig
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.analyze import analyze
from mlaconvert.conversion.from_weights import layer_modulation, time_modulation
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.recipes import mla_config, resolve_recipe
from mlaconvert.conversion.run import convert, preview
from mlaconvert.errors import CheckpointError, InputError
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.source import Source
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, README_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_camera_model
from mlaconvert.model.memory import StreamedVideo, plan_memory

# That of the published files, by their code and the class's own config.
PUBLISHED = CameraConfig(
    dim=2048, num_heads=16, num_layers=54, ffn_dim=8192, in_dim=65, out_dim=32, text_dim=3584, image_dim=1152,
    patch_size=(1, 1, 1), rope_dims=(16, 56, 56), refiner_dim=8192, glyph_dims=(1472, 2048, 2048),
    streaming=StreamingConfig(chunk_frames=4, window_frames=24, sink_frames=0),
)  # fmt: skip
MADE = {
    *("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_b_proj", "k_norm_proj", "k_norm", "v_proj"),
}


def test_from_weights(tmp_path: Path) -> None:
    source = make_worldplay(tmp_path)
    made = convert(source, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=11, layers="1"), verify=True)
    (model,) = made.models
    assert model.verification is not None
    assert model.verification.attention_errors.keys() == {1}
    dense, latent = load_file(source / WEIGHTS_NAME), load_file(tmp_path / "out" / WEIGHTS_NAME)
    block = "double_blocks.1.img_attn"
    same = {name for name in dense if name not in latent}
    assert same == {f"{block}_{p}" for p in ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias",
                                             "q_norm.weight", "k_norm.weight")}  # fmt: skip
    assert all(torch.equal(latent[name], tensor) for name, tensor in dense.items() if name in latent)
    assert {name.split(".")[3] for name in latent.keys() - dense.keys()} == MADE
    for ours, theirs in (("q_a_proj", "q"), ("k_norm_proj", "k"), ("v_proj", "v")):
        assert torch.equal(latent[f"{block}.{ours}.weight"], dense[f"{block}_{theirs}.weight"])
    assert torch.equal(latent[f"{block}.k_norm.weight"], dense[f"{block}_k_norm.weight"])
    assert latent[f"{block}.kv_b_proj.weight"].shape == (2 * 48, 11)
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["_class_name"] == "HunyuanVideo_1_5_MLATransformer"
    assert "mlaconvert.load_camera_model" in config["quantization_config"]["quant_method"]
    assert config["mla"]["layers"][0] == {"dense": True}
    assert config["mla"]["calibration"]["timesteps"] == [14.0]
    assert config["streaming"]["window_frames"] == 24
    record = json.loads((tmp_path / "out" / CONVERSION_NAME).read_text())
    assert record["cache_scalars_per_token"] == {"dense": 2 * 192, "mla": 192 + 11 + 3}
    assert "caches 206 scalars instead of 384" in (tmp_path / "out" / README_NAME).read_text()


def test_errors_fall_with_the_latent(tmp_path: Path) -> None:
    """To rounding where it is as wide as the model; a drawn one is no start."""
    source, errors = make_worldplay(tmp_path), []
    for rank in (6, 20, 40, 48):
        report = convert(source, tmp_path / f"{rank}", ConvertRecipe(init="svd", kv_rank=rank), verify=True)
        found = report.models[0].verification
        assert found is not None
        errors.append(max(found.attention_errors.values()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8
    assert errors[-1] < 1e-5
    drawn = convert(source, tmp_path / "drawn", ConvertRecipe(init="random", kv_rank=20), verify=True)
    assert drawn.models[0].verification is not None
    assert min(drawn.models[0].verification.attention_errors.values()) > 2 * errors[1]


def test_a_layer_that_puts_out_nothing_is_verified(tmp_path: Path) -> None:
    source = make_worldplay(tmp_path)
    state = load_file(source / WEIGHTS_NAME)
    outputs = [name for name in state if name.startswith("double_blocks.1.img_attn_p")]
    assert len(outputs) == 4  # weights and biases of both projections
    save_file(state | {name: torch.zeros_like(state[name]) for name in outputs}, source / WEIGHTS_NAME)
    verified = (
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=11), verify=True).models[0].verification
    )
    assert verified is not None
    assert verified.attention_errors[1] == 0 < verified.attention_errors[0]


def test_statistics_are_of_the_timestep_at_which_a_past_is_cached(tmp_path: Path) -> None:
    """Against the model's own modulation, while nothing is done."""
    model = load_camera_model(make_worldplay(tmp_path))
    with open_checkpoint(tmp_path / "worldplay") as checkpoint:
        found = layer_modulation(checkpoint, 1, time_modulation(checkpoint, [14.0, 600.0]))
    for i, timestep in enumerate((14.0, 600.0)):
        time = F.silu(model.time_embedding(torch.tensor([timestep])) + model.action_embedding(torch.zeros(1)))
        block = model.blocks[1]
        expected = F.linear(time, block.modulation.weight, block.modulation.bias)[0].unflatten(0, (6, -1))[:2]
        assert relative(found[i].float(), expected) < 1e-5


def test_the_published_size_caches_what_the_documentation_says() -> None:
    """8192 scalars a token and layer become 298 and 16; 20 frames of the past took 26 GiB."""
    mla = mla_config(resolve_recipe(ConvertRecipe(init="svd"), PUBLISHED), PUBLISHED)
    converted = dataclasses.replace(PUBLISHED, mla=mla)
    assert PUBLISHED.cached_scalars() == (8192,) * 54
    assert converted.cached_scalars() == (298 + 16,) * 54
    assert [part.width for part in converted.cached_parts(0)] == [(298,), (16,)]
    assert [part.width for part in PUBLISHED.cached_parts(0)] == [(16, 128)] * 4
    plan = plan_memory(
        PUBLISHED, mla, video=StreamedVideo(height=480, width=832, window_frames=20, vae_stride=(4, 16, 16))
    )
    assert plan.frame_tokens == 1560
    assert plan.dense.bytes_per_token == 864 * 1024
    assert plan.dense.bytes_per_window == 20 * 1560 * 54 * 8192 * 2
    assert plan.mla.bytes_per_window == 20 * 1560 * 54 * 314 * 2
    assert 25.6 < plan.dense.bytes_per_window / 2**30 < 26


def test_spectra_are_those_of_the_videos_keys_and_values(tmp_path: Path) -> None:
    source = make_worldplay(tmp_path)
    found, state = analyze(source, kv_rank=7).layers[1], load_file(source / WEIGHTS_NAME)
    both = torch.cat([state[f"double_blocks.1.img_attn_{part}.weight"] for part in "kv"]).double()
    assert relative(found.joint.singular_values, torch.linalg.svdvals(both)) < 1e-10  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [None, 9])
def test_analyze_shows_it(tmp_path: Path, rank: int | None) -> None:
    source = make_worldplay(tmp_path)
    if rank is not None:
        convert(source, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=rank))
        source = tmp_path / "out"
    code, out, err = invoke("analyze", source, "--json")
    assert code == 0, err
    memory = json.loads(out)["memory"]
    assert memory["dense"]["bytes_per_token"] == 2 * 2 * 192
    assert memory["mla"]["bytes_per_token"] == 2 * 2 * ((rank or 7) + 3)
    assert (memory["window_frames"], memory["frame_tokens"]) == (24, 15 * 26)
    if rank is None:  # else its config.json says it
        assert "taken for the autoregressive model" in err
        assert "a window of 24 latent frames, chunks of 4, no sink" in err


SETTINGS = {
    "calibrated": (
        {},
        "a camera for every frame, which no clips and prompts say; mlaconvert.load_camera_model runs its chunks, and "
        "mlaconvert convert takes it with --init svd or random",
    ),
    "lossless": ({"init": "lossless"}, "init is lossless.*svd with kv_rank 48 keeps everything"),
    "rope": ({"init": "svd", "rope": "latent"}, "rope is 'latent', and where keys turn by cameras too it is 'head'"),
    "key norm": ({"init": "svd", "key_norm": "latent"}, "key_norm is 'latent'"),
    "queries": ({"init": "random", "q_rank": 7}, "q_rank is 7"),
    "values": ({"init": "svd", "v_dim": 8}, "v_dim is 8"),
    "rotary": ({"init": "svd", "rope_dim": 4}, "rope head keeps whole heads"),
    "present": ({"init": "svd", "present": "latent"}, "present is 'latent'"),
    "bidirectional": ({"init": "svd", "bidirectional": True}, "only what is past is made of latents"),
    "layout": ({"init": "svd", "layout": "diffusers"}, "HY-WorldPlay has no diffusers layout"),
    "rank": ({"init": "svd", "kv_rank": 49}, "kv_rank is 49, larger than the layer"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_it_has_not_are_refused(tmp_path: Path, case: str) -> None:
    given, says = SETTINGS[case]
    source = make_worldplay(tmp_path)
    for call in (convert, preview):
        with pytest.raises(InputError, match=says):
            call(source, tmp_path / "out", ConvertRecipe(**given))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_commands_that_need_clips_say_so(tmp_path: Path) -> None:
    source = make_worldplay(tmp_path)
    convert(source, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=9))
    for command, says in (
        (("generate", "a fox", "-o", tmp_path / "movie"), "a camera for every frame"),
        (("heal", "--stage", "distill", "-o", tmp_path / "healed"), "cannot be healed yet"),
        (("evaluate",), "a camera for every frame"),
        (("bench",), ": a geometry with cameras is not measured"),
        (("analyze", "--calibrated"), "a camera for every frame"),
    ):
        for model in (source, tmp_path / "out") if command[0] in ("generate", "bench") else (tmp_path / "out",):
            code, _, err = invoke(command[0], model, *command[1:])
            assert code == 2, err
            assert says in " ".join(err.split()) or command == ("analyze", "--calibrated"), err
            if model == tmp_path / "out":  # it is converted, so nobody is told to
                assert "--init" not in err
            if command[0] != "heal":
                assert str(model) in "".join(err.split()) or command[0] == "analyze"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "worldplay"]


@pytest.mark.parametrize(
    ("text", "streaming"),
    [
        ("timestep_shift: 5", StreamingConfig(chunk_frames=4, window_frames=24, sink_frames=0, positions="window")),
        (
            "local_attn_size: 12\nnum_frame_per_block: 2",
            StreamingConfig(chunk_frames=2, window_frames=12, sink_frames=0, positions="window"),
        ),
        ("is_causal: false", None),
    ],
)
def test_a_yaml_file_says_of_time_what_it_says(tmp_path: Path, text: str, streaming: StreamingConfig | None) -> None:
    """Where it says nothing of chunks, they are its pipeline's."""
    source, config = make_worldplay(tmp_path), tmp_path / "y.yaml"
    config.write_text(text)
    with open_checkpoint(Source(source, config=config)) as checkpoint:
        assert checkpoint.config.streaming == streaming
    if streaming is not None:
        convert(Source(source, config=config), tmp_path / "out", ConvertRecipe(init="svd", kv_rank=9))


@pytest.mark.parametrize("name", ["double_blocks.1.img_attn_v.weight", "double_blocks.0.img_attn_prope_proj.weight"])
def test_what_is_not_finite_is_named(tmp_path: Path, name: str) -> None:
    source = make_worldplay(tmp_path)
    state = load_file(source / WEIGHTS_NAME)
    state[name][3, 2] = float("nan")
    save_file(state, source / WEIGHTS_NAME)
    for init in ("svd", "random"):
        with pytest.raises(CheckpointError, match=rf"{name}.* NaN"):
            convert(source, tmp_path / "out", ConvertRecipe(init=init))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=rf"{name}.* NaN"):
        load_camera_model(source)


def test_its_card_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(make_worldplay(tmp_path), tmp_path / "out", ConvertRecipe(init="svd", kv_rank=9))
    code, out, err = invoke("push", tmp_path / "out", "me/worldplay", "--dry-run")
    assert code == 0, err
    assert "exact, 3 more scalars a token" in out
    assert "sees of the past what it is given with each chunk" in out
    python = out.partition("```python\n")[2].partition("```")[0]
    exec(compile(python.replace('"me/worldplay"', repr(str(tmp_path / "out"))), "card", "exec"), {})
    assert f"torch.Size([1, 5, 4, 30, 52]) {20 * 15 * 26 * 2 * 12 * 4}" in capsys.readouterr().out
