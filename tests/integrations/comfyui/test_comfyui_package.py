"""The package that ComfyUI's registry takes, and the workflows in it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfyui_stand_in import PACKAGE, Slot, install
from packaging.requirements import Requirement

import mlaconvert

tomllib = pytest.importorskip("tomllib")
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
WORKFLOWS = sorted((PACKAGE / "example_workflows").glob("*.json"))
# ComfyUI's own nodes in the workflows: their inputs by name, and their outputs, of version 0.3.64.
OWN: dict[str, tuple[dict[str, str], list[str]]] = {
    "CLIPLoader": ({"clip_name": "COMBO", "type": "COMBO", "device": "COMBO"}, ["CLIP"]),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ["CONDITIONING"]),
    "VAELoader": ({"vae_name": "COMBO"}, ["VAE"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "CreateVideo": ({"images": "IMAGE", "fps": "FLOAT", "audio": "AUDIO"}, ["VIDEO"]),
    "SaveVideo": ({"video": "VIDEO", "filename_prefix": "STRING", "format": "COMBO", "codec": "COMBO"}, []),
    "SaveAnimatedWEBP": (
        {
            **{"images": "IMAGE", "filename_prefix": "STRING", "fps": "FLOAT", "lossless": "BOOLEAN"},
            **{"quality": "INT", "method": "COMBO"},
        },
        [],
    ),
}
WIDGETS = {"COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"}


@pytest.fixture
def schemas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each node says of itself, by its id."""
    package, _ = install(monkeypatch, tmp_path)
    nodes = asyncio.run(asyncio.run(package.comfy_entrypoint()).get_node_list())
    made = [node.define_schema() for node in nodes]
    assert len({schema.node_id for schema in made}) == len(made)
    return {schema.node_id: schema for schema in made}


def test_the_registry_can_read_the_project() -> None:
    """By its specification: https://docs.comfy.org/registry/specifications."""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])+", project["name"])
    assert len(project["name"]) < 100
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"text": "Apache-2.0"}
    assert {"Repository"} <= PROJECT["project"]["urls"].keys()
    assert {"PublisherId", "DisplayName"} <= comfy.keys()
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_the_nodes_need_this_version_and_nothing_else() -> None:
    (needed,) = map(Requirement, PROJECT["project"]["dependencies"])
    assert needed.name == "mlaconvert"
    assert needed.specifier.contains(mlaconvert.__version__)
    assert (PACKAGE / "requirements.txt").read_text().split() == [str(needed)]


def test_the_nodes_are_no_part_of_the_library() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert built["packages"] == ["mlaconvert"]


def test_every_node_says_what_its_inputs_are(schemas: dict[str, Any]) -> None:
    for schema in schemas.values():
        assert schema.node_id.startswith("Mlaconvert")
        assert schema.description
        for slot in schema.inputs:
            assert slot.default is None or slot.min is None or slot.min <= slot.default <= slot.max, slot


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_only_what_is_there(path: Path, schemas: dict[str, Any]) -> None:
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in nodes.values() if node["type"] in schemas]
    assert len(ours) >= 3
    for node in nodes.values():
        inputs, outputs = known(node["type"], schemas)
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs, node["type"]
        assert [slot["type"] for slot in node.get("outputs", [])] == outputs, node["type"]
    for number, start, output, end, place, kind in workflow["links"]:
        assert nodes[start]["outputs"][output]["type"] == nodes[end]["inputs"][place]["type"] == kind
        assert nodes[end]["inputs"][place]["link"] == number
    for node in ours:
        fed = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        needed = {slot.id for slot in schemas[node["type"]].inputs if not slot.optional and slot.kind not in WIDGETS}
        assert needed <= fed, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflows_widgets_have_values_that_the_nodes_take(path: Path, schemas: dict[str, Any]) -> None:
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] not in schemas:
            continue
        values = list(node.get("widgets_values") or [])
        for slot in schemas[node["type"]].inputs:
            if slot.kind in WIDGETS:
                check(slot, values.pop(0))
            if slot.control_after_generate:
                assert values.pop(0) == "fixed"  # so that the example repeats
        assert values == []


def test_the_example_makes_whole_chunks() -> None:
    """Three latent frames each, as Self-Forcing's student was trained; of video four, and one for the first."""
    workflow = json.loads((PACKAGE / "example_workflows" / "wan_streaming.json").read_text())
    (node,) = [node for node in workflow["nodes"] if node["type"] == "MlaconvertSample"]
    assert node["widgets_values"][4] == 4 * (3 * 20 - 1) + 1


def check(slot: Slot, value: Any) -> None:
    """Whether a widget takes this value; folders are the user's own."""
    if slot.kind == "COMBO":
        assert value in (slot.options or []) or slot.id == "folder", slot.id
    elif slot.kind == "STRING":
        assert isinstance(value, str), slot.id
    else:
        assert slot.min is not None
        assert slot.max is not None
        assert slot.min <= value <= slot.max, slot.id
        assert isinstance(value, int) or slot.kind == "FLOAT", slot.id


def known(kind: str, schemas: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Inputs and outputs of a node of that kind, by our schema or by ComfyUI's."""
    if kind not in schemas:
        return OWN[kind]
    schema = schemas[kind]
    return {slot.id: slot.kind for slot in schema.inputs}, [slot.kind for slot in schema.outputs]
