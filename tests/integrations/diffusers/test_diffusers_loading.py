"""Which class loads a converted folder, and what comes along with its weights."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import succeed
from hub_server import Blob, Hub
from support import SaveFolder, relative

from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError
from mlaconvert.families.classes import converted_config
from mlaconvert.families.open import open_checkpoint
from mlaconvert.files.names import CONFIG_NAME, WEIGHTS_NAME
from mlaconvert.model.load import load_model

diffusers = pytest.importorskip("diffusers")

from wan_diffusers import inputs, reference  # noqa: E402

from mlaconvert.families.source import Source  # noqa: E402
from mlaconvert.integrations.diffusers import WanMLATransformer3DModel  # noqa: E402

RECORDS = ("conversion.json", "healing.json")
HEALED = '{"recipe": {"stage": "distill"}, "written": {"step": 3}}\n'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversions of a small model in both layouts, each with the record of a healing."""
    root = tmp_path_factory.mktemp("loading")
    reference().save_pretrained(root / "source")
    for layout in ("native", "diffusers"):
        recipe = ConvertRecipe(init="svd", layers="0,2", layout=layout, streaming=StreamingConfig(chunk_frames=2))
        convert(root / "source", root / layout, recipe)
        (root / layout / "healing.json").write_text(HEALED)
    return {name: root / name for name in ("source", "native", "diffusers")}


def blobs(folder: Path, prefix: str = "", without: tuple[str, ...] = ()) -> dict[str, Blob]:
    return {
        prefix + file.name: Blob(file.read_bytes(), file.suffix == ".safetensors")
        for file in folder.iterdir()
        if file.name not in without
    }


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way of sending files
@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("inside", ["", "low/expert/"])
def test_records_come_along_from_the_hub(
    folders: dict[str, Path], hub: Hub, tmp_path: Path, layout: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a private repository, a subfolder, an older revision, and the cache without a network."""
    repo = hub.create("alice/model", private=True)
    wanted = repo.commit(blobs(folders[layout], inside))
    repo.commit({name: Blob(b"not what was asked for", False) for name in blobs(folders[layout], inside)})
    for place in ("online", "offline"):
        if place == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        options: dict[str, Any] = {"subfolder": inside.rstrip("/")} if inside else {}
        model = WanMLATransformer3DModel.from_pretrained("alice/model", revision=wanted, **options)
        model.save_pretrained(tmp_path / place)
        for name in (WEIGHTS_NAME, CONFIG_NAME, *RECORDS):
            assert filecmp.cmp(folders[layout] / name, tmp_path / place / name, shallow=False), name


def test_a_repository_without_records_loads(folders: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.create("alice/model").commit(blobs(folders["native"], without=(*RECORDS, "README.md")))
    WanMLATransformer3DModel.from_pretrained("alice/model").save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {WEIGHTS_NAME, CONFIG_NAME}


def test_only_records_are_fetched_beside_the_weights(folders: dict[str, Path], hub: Hub) -> None:
    more = {"notes.json": Blob(b"{}", False), "inner/conversion.json": Blob(b"{}", False)}
    hub.create("alice/model").commit(blobs(folders["native"]) | more)
    with open_checkpoint("alice/model") as checkpoint:
        found = {file.name for file in checkpoint.store.path.parent.rglob("*") if file.is_file()}
    assert found == {WEIGHTS_NAME, CONFIG_NAME, *RECORDS}


def test_an_empty_record_is_kept_as_well(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["native"], tmp_path / "model")
    (tmp_path / "model" / "healing.json").write_text("{}")
    WanMLATransformer3DModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "healing.json").read_text() == "{}"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"[" * 100_000, b'{"source": 3}'])
def test_a_damaged_record_is_an_input_error(folders: dict[str, Path], tmp_path: Path, damage: bytes) -> None:
    shutil.copytree(folders["native"], tmp_path / "model")
    (tmp_path / "model" / "conversion.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"conversion\.json"):
        WanMLATransformer3DModel.from_pretrained(tmp_path / "model")


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_auto_model_loads_the_class_that_the_folder_names(folders: dict[str, Path], layout: str) -> None:
    model = diffusers.AutoModel.from_pretrained(str(folders[layout]))
    assert type(model) is WanMLATransformer3DModel
    expected = WanMLATransformer3DModel.from_pretrained(folders[layout]).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


NOT_IMPORTED = """
import sys, diffusers
for folder in sys.argv[1:]:
    try:
        diffusers.AutoModel.from_pretrained(folder)
    except Exception as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.mark.slow
def test_auto_model_that_does_not_know_the_class_says_so(folders: dict[str, Path]) -> None:
    """In a process that has imported nothing of ours, from both layouts."""
    places = [str(folders[layout]) for layout in ("native", "diffusers")]
    done = subprocess.run(
        [sys.executable, "-c", NOT_IMPORTED, *places], capture_output=True, text=True, timeout=120, check=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert all("has no class `WanMLATransformer3DModel`" in line for line in said)


@pytest.fixture
def pipeline_folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A pipeline whose transformer is read from the folder `transformer`; the rest is left out."""
    (tmp_path / "pipe" / "scheduler").mkdir(parents=True)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    parts = {name: [None, None] for name in ("tokenizer", "text_encoder", "vae", "transformer_2")}
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | parts))
    return tmp_path / "pipe"


NOTHING: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "transformer_2": None}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_dense_class_refuses_the_folder_in_one_line(
    folders: dict[str, Path], pipeline_folder: Path, layout: str
) -> None:
    """It would fill what it knows, and leave the rest without values."""
    shutil.copytree(folders[layout], pipeline_folder / "transformer")
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    loads = [
        lambda: diffusers.WanTransformer3DModel.from_pretrained(folders[layout]),
        lambda: diffusers.SkyReelsV2Transformer3DModel.from_pretrained(folders[layout]),
        lambda: diffusers.WanPipeline.from_pretrained(pipeline_folder, vae=vae, **NOTHING),
    ]
    for load in loads:
        with pytest.raises(
            ValueError, match=r"mlaconvert\.integrations\.diffusers\.WanMLATransformer3DModel"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["diffusers", "mlaconvert.integrations.diffusers"])
def test_a_pipeline_that_names_the_class_loads_it(
    folders: dict[str, Path], pipeline_folder: Path, library: str
) -> None:
    shutil.copytree(folders["native"], pipeline_folder / "transformer")
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    index["transformer"] = [library, "WanMLATransformer3DModel"]
    (pipeline_folder / "model_index.json").write_text(json.dumps(index))
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline.from_pretrained(pipeline_folder, vae=vae, **NOTHING)
    assert type(pipe.transformer) is WanMLATransformer3DModel


def test_dense_folders_keep_their_class(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["source"] / CONFIG_NAME).read_text())
    assert converted_config(raw) == raw
    WanMLATransformer3DModel.from_pretrained(folders["source"]).save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / CONFIG_NAME).read_text()) == raw
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path / "dense"))) is diffusers.WanTransformer3DModel


@pytest.mark.parametrize(("layout", "name"), [("native", "CausalWanModel"), ("diffusers", "WanTransformer3DModel")])
def test_folders_of_older_versions_load_everywhere(
    folders: dict[str, Path], tmp_path: Path, layout: str, name: str
) -> None:
    """They name the class of the dense model. Saved again, they name the one that reads them."""
    old = tmp_path / "old"
    shutil.copytree(folders[layout], old)
    raw = json.loads((old / CONFIG_NAME).read_text())
    del raw["quantization_config"]
    (old / CONFIG_NAME).write_text(json.dumps(raw | {"_class_name": name}))
    with torch.no_grad():
        assert relative(load_model(old)(*inputs()), load_model(folders[layout])(*inputs())) == 0
    with open_checkpoint(old) as found, open_checkpoint(folders[layout]) as expected:
        assert found.config == expected.config
    succeed("analyze", old)
    WanMLATransformer3DModel.from_pretrained(old).save_pretrained(tmp_path / "new")
    assert filecmp.cmp(tmp_path / "new" / WEIGHTS_NAME, old / WEIGHTS_NAME, shallow=False)
    again = json.loads((tmp_path / "new" / CONFIG_NAME).read_text())
    assert again == json.loads((folders[layout] / CONFIG_NAME).read_text())


def test_a_source_without_config_is_converted_to_one_that_names_the_class(
    save_folder: SaveFolder, golden_state: dict[str, Any], tmp_path: Path, golden_config: dict[str, Any]
) -> None:
    source = save_folder(golden_state)
    (tmp_path / "c.json").write_text(json.dumps(golden_config))
    convert(Source(source, config=tmp_path / "c.json"), tmp_path / "out", ConvertRecipe(init="svd"))
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["_class_name"] == "WanMLATransformer3DModel"
