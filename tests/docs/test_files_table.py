"""Each row of the table of what is read, made small and given to the reader: the documentation says what happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlaconvert.clips.captions import read_captions
from mlaconvert.config.camera import CameraConfig
from mlaconvert.conversion.source import open_models
from mlaconvert.errors import InputError
from mlaconvert.families.lora import LoraFile
from mlaconvert.families.merged import merge_loras, remarks
from mlaconvert.families.open import open_checkpoint
from mlaconvert.families.wan import WanFamily
from mlaconvert.families.worldplay import WorldPlayFamily
from mlaconvert.files.names import WEIGHTS_NAME

ROOT = Path(__file__).parents[2]
State = dict[str, Tensor]
INDEX = f"{WEIGHTS_NAME}.index.json"
Q = "blocks.0.self_attn.q.weight"
WORLDPLAY = "HY-WorldPlay, autoregressive"
D = 256


@pytest.fixture(scope="module")
def state() -> State:
    """A Wan transformer of two blocks with heads of 128, whose geometry its shapes say."""
    from mlaconvert.config.geometry import WanConfig

    draw = torch.Generator().manual_seed(3)
    config = WanConfig(dim=D, num_heads=2, num_layers=2, ffn_dim=96, freq_dim=32, text_dim=24)
    shapes = WanFamily().expected_shapes(config)
    return {name: (torch.randn(shape, generator=draw) * 0.06).bfloat16() for name, shape in shapes.items()}


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def diffusers(state: State) -> State:
    return {WanFamily().source(name, "diffusers"): tensor for name, tensor in state.items()}


def one(change: Callable[[State], State], name: str = "m.safetensors") -> Callable[[Path, State], Path]:
    """Writes one file of what `change` makes of the model."""

    def write(folder: Path, state: State) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(change(state), folder / name)
        return folder / name

    return write


def pickle(change: Callable[[State], Any]) -> Callable[[Path, State], Path]:
    def write(folder: Path, state: State) -> Path:
        torch.save(change(state), folder / "m.pt")
        return folder / "m.pt"

    return write


def pickled_shards(folder: Path, state: State) -> Path:
    places = {name: f"m-0000{1 + ('blocks.1' in name)}-of-00002.bin" for name in state}
    for file in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    (folder / "m.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def plus(**shapes: tuple[int, ...]) -> Callable[[Path, State], Path]:
    return one(lambda s: s | {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()})


def shards(folder: Path, state: State, *, variant: str = "", index: bool = True, blocks: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    places, files = {}, {}
    for name, tensor in state.items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        file = f"diffusion_pytorch_model{variant}-0000{1 if block else 2}-of-00002.safetensors"
        if blocks:
            file = f"block_{block}.safetensors" if block else "non_block.safetensors"
        places[name] = file
        files.setdefault(file, {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    if index:
        name = INDEX.replace("index", f"index{variant}") if variant else INDEX
        (folder / name).write_text(json.dumps({"weight_map": places}))
    return folder


def experts(folder: Path, state: State) -> Path:
    for expert in ("high_noise_model", "low_noise_model"):
        one(dict, f"{expert}/{WEIGHTS_NAME}")(folder, state)
    return folder


def with_encoders(folder: Path, state: State) -> Path:
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "models_clip_open-clip-xlm-roberta.pth"):
        torch.save({"a": torch.ones(2)}, folder / name)
    return one(dict, "distill_models/distill_model.safetensors")(folder, state).parents[1]


def split_files(folder: Path, state: State) -> Path:
    one(lambda _: {"a": torch.ones(1)}, "split_files/text_encoders/umt5_xxl_fp16.safetensors")(folder, state)
    return one(dict, "split_files/diffusion_models/wan.safetensors")(folder, state).parents[2]


def hub_cache(folder: Path, state: State) -> Path:
    root = folder / "models--user--wan"
    shards(root / "blobs", state)
    there = root / "snapshots" / ("a" * 40) / "transformer"
    there.mkdir(parents=True)
    for blob in (root / "blobs").iterdir():
        (there / blob.name).symlink_to(blob)
    return root


def scaled(leaf: str, *, rows: bool = False, more: State | None = None) -> Callable[[Path, State], Path]:
    def change(state: State) -> State:
        weight = state[Q].float()
        scale = weight.abs().amax(1 if rows else None, keepdim=rows) / 200
        return state | {Q: (weight / scale).to(torch.float8_e4m3fn), Q.replace("weight", leaf): scale} | (more or {})

    return one(change)


def in_blocks(state: State) -> State:
    squares = state[Q].float().view(D // 128, 128, D // 128, 128)
    scale = squares.abs().amax((1, 3)) / 448
    small = (squares / scale[:, None, :, None]).view(D, D).to(torch.float8_e4m3fn)
    return state | {Q: small, Q.replace("weight", "weight_scale_inv"): scale}


def gguf(folder: Path, state: State) -> Path:
    import gguf as package

    writer = package.GGUFWriter(folder / "wan-Q8_0.gguf", "wan")
    kind = package.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        if name == Q:
            writer.add_tensor(name, package.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def distributed(script: str, name: str) -> Callable[[Path, State], Path]:
    """What torch.distributed saves, in a process of its own."""

    def write(folder: Path, state: State) -> Path:
        head = (
            "import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
            "from torch.distributed.device_mesh import init_device_mesh\n"
            "from torch.distributed.tensor import Shard, distribute_tensor\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        )
        whole = head + script + "\ndist.destroy_process_group()"  # its threads would otherwise abort the exit, at times
        subprocess.run([sys.executable, "-c", whole, str(folder / name)], check=True, capture_output=True)
        return folder / name

    return write


def worldplay(_: State) -> State:
    """The published file, which lies without its config.json, in two heads of 128."""
    family, config = WorldPlayFamily(), CameraConfig(
        dim=D, num_heads=2, num_layers=2, ffn_dim=96, text_dim=24, image_dim=20, in_dim=33, rope_dims=(16, 56, 56),
        patch_size=(1, 1, 1), refiner_dim=40, glyph_dims=(12, 14, 10),
    )  # fmt: skip
    shapes = family.expected_shapes(config).items()
    return {family.source(name, "native"): torch.full(shape, 0.1).bfloat16() for name, shape in shapes}


def latent_of_another_code(state: State) -> State:
    """The model with down- and up-projections of made-up names in the place of keys and values."""
    kept = {name: tensor for name, tensor in state.items() if ".self_attn.k" not in name and ".self_attn.v" not in name}
    parts = {"kv_down.weight": (6, D), "kv_up.weight": (2 * D, 6)}
    made = {f"blocks.{i}.self_attn.{part}": torch.ones(shape) for i in (0, 1) for part, shape in parts.items()}
    return kept | made


FLAT = {"text_encoders.t5.shared.weight": torch.ones(3, 2), "vae.conv1.weight": torch.ones(2)}
CAMERA = {"patch_embedding_wancamctrl__weight": (D, 8), "blocks__1__cam_injector_layer1__weight": (D, D)}

# Row -> (what writes it, what is said of it; for what is refused, the message).
MODELS: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "Wan2.1 and 2.2, native": (shards, ""),
    "Wan2.1 and 2.2, diffusers": (
        lambda f, s: shards(f / "transformer", diffusers(s), variant=".fp16").parent, "",
    ),
    "shards of PyTorch's (`.bin.index.json`)": (pickled_shards, ""),
    "Wan2.2 A14B": (experts, ""),
    "Self-Forcing, CausVid, LongLive `.pt`": (
        pickle(lambda s: {"critic": s, "generator": below("model.", {n: t + 1 for n, t in s.items()}),
                          "generator_ema": below("model.", s)}), "",
    ),
    "the same, flattened into safetensors": (
        one(lambda s: below("generator_ema.model.", s) | below("critic.model.", s)), "left out.*: critic",
    ),
    "Krea Realtime 14B": (one(lambda s: below("model.", s), "krea-realtime-video-14b.safetensors"), ""),
    "LongLive 2.0": (pickle(lambda s: {"generator": below("model.", s)}), ""),
    "rCM, TurboDiffusion `net.`": (
        one(lambda s: below("net.", s | {"patch_embedding.weight": s["patch_embedding.weight"].flatten(1)})), "",
    ),
    "DiffSynth `pipe.dit.`": (one(lambda s: below("pipe.dit.", s)), ""),
    "ComfyUI `model.diffusion_model.`": (one(lambda s: below("model.diffusion_model.", s)), ""),
    "ComfyUI all in one": (
        one(lambda s: below("model.diffusion_model.", s) | FLAT), "left out, beside the transformer: .*text_encoders",
    ),
    "ComfyUI `split_files/`": (split_files, ""),
    "LightX2V, root with encoders": (with_encoders, ""),
    "LightX2V, block files": (lambda f, s: shards(f, s, index=False, blocks=True), ""),
    "Hub cache `models--user--repo`": (hub_cache, ""),
    "`.sft`, `.SAFETENSORS`": (one(dict, "M.SFT"), ""),
    "float8, plain": (one(lambda s: s | {Q: s[Q].to(torch.float8_e5m2)}), r"quantised weights \(float8_e5m2\)"),
    "ComfyUI scaled float8 (`scale_weight`)": (
        scaled("scale_weight", more={"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}), "with scales",
    ),
    "LightX2V scaled float8 (`weight_scale`)": (scaled("weight_scale", rows=True), "with scales"),
    "ComfyUI `comfy_quant` float8": (
        scaled("weight_scale", more={Q.replace("weight", "comfy_quant"): torch.zeros(25, dtype=torch.uint8)}),
        "with scales",
    ),
    "float8 in blocks (`weight_scale_inv`)": (one(in_blocks), "with scales of blocks of 128 x 128"),
    "GGUF, Q8_0 and K-quants": (gguf, "GGUF F32, Q8_0"),
    "LingBot-World": (plus(**CAMERA), "2 tensors beyond Wan's, of camera injectors"),
    "Matrix-Game": (
        one(lambda s: {n: t for n, t in s.items() if "text_embedding" not in n and "cross_attn.norm" not in n}
            | {"blocks.0.action_model.t_qkv.weight": torch.ones(4, 5)}),
        "of action modules",
    ),
    "DreamZero": (
        one(lambda s: below("action_head.model.", s) | {"action_head.action_encoder.w": torch.ones(3)}), "left out",
    ),
    "VACE": (plus(vace_blocks__0__before_proj__weight=(D, D)), "of VACE's control blocks"),
    "FLF2V": (
        one(lambda s: s | {"img_emb.emb_pos": torch.ones(1, 4, 6)}), "of the positions of a first and a last frame",
    ),
    "Animate": (plus(motion_encoder__w=(3,), face_adapter__fuser_blocks__0__w=(4,)), "of Animate's motion and face"),
    "S2V": (plus(casual_audio_encoder__w=(3,), audio_injector__w=(4,)), "of S2V's audio branch"),
    "HuMo": (plus(audio_proj__audio_proj_glob_1__layer__weight=(4, 5)), "of an audio branch"),
    "Wan Fun InP": (
        one(lambda s: s | {"patch_embedding.weight": torch.cat([s["patch_embedding.weight"]] * 3, 1)[:, :36].clone()}),
        "",
    ),
    "Wan Fun Control, with a reference": (plus(ref_conv__weight=(D, 16, 2, 2), ref_conv__bias=(D,)), ""),
    "Wan Fun, camera": (plus(control_adapter__conv__weight=(3,)), "of camera control"),
    "SkyReels-V2 with a frame rate": (
        plus(fps_embedding__weight=(2, D), fps_projection__0__weight=(D, D), fps_projection__0__bias=(D,),
             fps_projection__2__weight=(6 * D, D), fps_projection__2__bias=(6 * D,)),
        "",
    ),
    "ReCamMaster": (plus(blocks__0__cam_encoder__weight=(D, 12)), "of a camera encoder"),
    "AnyFlow": (
        one(lambda s: diffusers(s) | {"condition_embedder.delta_embedder.linear_1.bias": torch.ones(D)}),
        "of the embedding of a second time",
    ),
    "MiniMax-Remover": (
        one(lambda s: {n: t for n, t in diffusers(s).items() if "attn2" not in n and "text_embedder" not in n}),
        "without 24 of Wan's own tensors, of text_embedding and cross_attn",
    ),
    "FastWan (VSA)": (plus(blocks__0__to_gate_compress__bias=(D,)), r"FastWan, VSA"),
    "TurboDiffusion SLA": (plus(blocks__0__self_attn__attn_op__local_attn__proj_l__weight=(D,)), "sparse-linear"),
    "Video-As-Prompt": (
        one(lambda s: diffusers(s) | {"blocks.0.attn1_mot_ref.to_q.weight": torch.ones(D)}), "Video-As-Prompt",
    ),
    "HunyuanVideo 1.5": (
        one(lambda _: {f"double_blocks.{i}.img_attn_{p}.weight": torch.ones(D, D) for i in range(2) for p in "qkv"}),
        "HunyuanVideo .*text and video see each other at every timestep, so it has no cache",
    ),
    "minWM on HunyuanVideo 1.5, without actions": (
        one(lambda s: {name: tensor for name, tensor in worldplay(s).items() if not name.startswith("action_in.")}),
        "models without discrete actions, such as minWM's, are not converted",
    ),
    "minWM on Wan2.1, with cameras": (plus(blocks__0__self_attn__prope_o__weight=(D, D)), "also turns by cameras"),
    WORLDPLAY: (one(worldplay), ""),
    "VideoMLA's own `model.pt`": (
        pickle(lambda s: {"generator_ema": below("model.", latent_of_another_code(s))}), "open an issue with the list",
    ),
    "a Git LFS pointer, an HTML page": (
        lambda f, _: (f / "m.pt").write_text("version https://git-lfs.github.com/spec/v1\n") and f / "m.pt",
        "a Git LFS pointer",
    ),
    "another kind under the name (safetensors as `.pt`, PyTorch as `.safetensors`)": (
        lambda f, s: one(dict)(f, s).rename(f / "m.pt"), "a safetensors file by its contents; rename it",
    ),
    "NF4, int8 of bitsandbytes": (plus(blocks__0__ffn__0__weight__absmax=(3,)), "bitsandbytes"),
    "SVDQuant (Nunchaku)": (plus(blocks__0__ffn__0__wscales=(3,)), "SVDQuant"),
    "NVFP4, MXFP8 of ComfyUI": (
        one(lambda s: s | {Q: s[Q].to(torch.float8_e4m3fn), Q + "_scale": torch.ones(D, D // 32).to(torch.uint8)}),
        "MXFP8",
    ),
    "NVFP4 of LongLive 2.0": (plus(blocks__0__ffn__0__quantized_weight_values=(3,)), "NVFP4"),
    "FSDP2 `.pt` of DTensors": (
        distributed("torch.save({'w': distribute_tensor(torch.ones(4, 3), init_device_mesh('cpu', (1,)), [Shard(0)])}, "
                    "sys.argv[1])", "fsdp2.pt"),
        "full_tensor",
    ),
    "`.distcp` folder": (
        distributed("dcp.save({'w': torch.ones(3)}, checkpoint_id=sys.argv[1])", "step_1"), "format_utils dcp_to_torch",
    ),
}  # fmt: skip


def factors(pattern: str, leaf: str = "weight", dtype: torch.dtype = torch.float32) -> State:
    """A LoRA of one module, of rank three; `pattern` has {part} for A or B."""
    return {
        pattern.format(part=part) + leaf: torch.full(shape, 0.5).to(dtype)
        for part, shape in (("A", (3, D)), ("B", (D, 3)))
    }


NAME = "blocks.0.self_attn.q"
KOHYA = {f"lora_unet__{NAME.replace('.', '_')}.lora_{part}.weight" for part in ("down", "up")}
COMFY = factors(f"diffusion_model.{NAME}.lora_{{part}}.")
LORAS: dict[str, tuple[State, str]] = {
    "PEFT, diffusers": (factors("transformer.blocks.0.attn1.to_q.lora_{part}."), ""),
    "LongLive `generator_lora`": (factors(f"base_model.model.model.{NAME}.lora_{{part}}."), ""),
    "ComfyUI": (COMFY | {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, D)}, ""),
    "kohya, Wan-Fun `lora_unet__`": (
        {key: torch.full((3, D) if "down" in key else (D, 3), 0.5) for key in sorted(KOHYA)}, "",
    ),
    "DiffSynth, UniAnimate-DiT `pipe.dit.`": (factors(f"pipe.dit.{NAME}.lora_{{part}}.default."), ""),
    "float8 factors": (factors(f"{NAME}.lora_{{part}}.", dtype=torch.float8_e4m3fn), ""),
    "Wan2.1 I2V LoRA on Wan2.2 I2V": (
        COMFY | factors("diffusion_model.blocks.0.cross_attn.k_img.lora_{part}."), "2 keys of branches .*k_img",
    ),
    "DoRA": (COMFY | {f"diffusion_model.{NAME}.dora_scale": torch.ones(D, 1)}, ""),
    "LoKr, LoHa": (
        {f"lycoris_{NAME.replace('.', '_')}.lokr_w1": torch.ones(2, 2),
         f"lycoris_{NAME.replace('.', '_')}.lokr_w2": torch.full((D // 2, D // 2), 0.75)},
        "",
    ),
    "OFT, GLoRA": ({f"lycoris_{NAME.replace('.', '_')}.oft_blocks": torch.ones(2, 2)}, "an OFT"),
}  # fmt: skip

CAPTIONS: dict[str, tuple[str, bytes]] = {
    "CSV: commas, semicolons, tabs, a byte order mark": ("c.csv", b"\xef\xbb\xbffile;caption\na.mp4;a cat\n"),
    "columns of Open-Sora, DiffSynth, musubi": ("c.csv", b"path,text\na.mp4,a cat\n"),
    "JSON lines, the Hub's `metadata.jsonl`": ("metadata.jsonl", b'{"file_name": "a.mp4", "text": "a cat"}\n'),
    "a JSON array": ("c.json", b'[{"file": "a.mp4", "caption": "a cat"}]'),
    "UTF-16, with a byte order mark or without": ("c.csv", "file,caption\na.mp4,a cat\n".encode("utf-16-le")),
}


def table(heading: str) -> dict[str, str]:
    """Layout -> what becomes of it, of one of the tables."""
    text = (ROOT / "docs" / "files.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return dict(rows[1:])  # the first is its head


def test_every_row_is_a_test() -> None:
    assert list(table("Models")) == list(MODELS)
    assert list(table("LoRAs")) == list(LORAS)
    assert list(table("Captions")) == list(CAPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("row", MODELS)
def test_models(row: str, state: State, tmp_path: Path) -> None:
    write, says = MODELS[row]
    source, outcome = write(tmp_path, state), table("Models")[row]
    if outcome.startswith("refused"):
        with pytest.raises(InputError, match=says):
            open_checkpoint(source)
        return
    with open_models(str(source)) as models:
        assert len(models) == (2 if row == "Wan2.2 A14B" else 1)
        for model in models.values():
            lines = "\n".join(remarks(model))
            assert re.search(says, lines), lines
            assert bool(model.passengers) == outcome.startswith("carried along")
            if row == WORLDPLAY:
                assert model.config.rope_split == (8, 28, 28)
                assert model.config.dense_scalars == 4 * D
            for name in state if row != WORLDPLAY else ():
                if name in model.names:
                    found = model.read(name).float()
                    if row == "Wan Fun InP" and name == "patch_embedding.weight":
                        assert found.shape == (D, 36, 1, 2, 2)
                        found = found[:, :16]
                    near = 0.1 * state[name].float().abs() + 0.005 if model.store.decoded else torch.zeros(())
                    assert bool(((found - state[name].float()).abs() <= near).all()), name


@pytest.mark.parametrize("row", LORAS)
def test_loras(row: str, state: State, tmp_path: Path) -> None:
    tensors, says = LORAS[row]
    source = one(dict)(tmp_path, {name: tensor.float() for name, tensor in state.items()})
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    if row == "LongLive `generator_lora`":
        file = tmp_path / "lora.pt"
        torch.save({"generator_lora": tensors, "critic_lora": {"a.lora_A.weight": torch.ones(2, 2)}}, file)
    if table("LoRAs")[row].startswith("refused"):
        with open_checkpoint(source) as opened, pytest.raises(InputError, match=says):
            merge_loras(opened, [LoraFile(path=file)])
        return
    with merge_loras(open_checkpoint(source), [LoraFile(path=file)]) as model:
        assert re.search(says, "\n".join(remarks(model)))
        expected = state[Q].float() + 0.75  # three times a half times a half
        if row == "DoRA":
            expected = expected / expected.norm(dim=1, keepdim=True)
        assert torch.allclose(model.read(Q), expected)
        changed = {name for name in state if not torch.equal(model.read(name), state[name].float())}
        assert changed == {Q} | ({"blocks.0.modulation"} if row == "ComfyUI" else set())


@pytest.mark.parametrize("row", CAPTIONS)
def test_captions(row: str, tmp_path: Path) -> None:
    name, data = CAPTIONS[row]
    (tmp_path / name).write_bytes(data)
    if table("Captions")[row].startswith("refused"):
        with pytest.raises(InputError, match="UTF-8"):
            read_captions(tmp_path / name)
    else:
        assert read_captions(tmp_path / name) == {"a.mp4": "a cat"}
