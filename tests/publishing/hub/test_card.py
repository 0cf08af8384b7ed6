"""Publishing and reading back, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import invoke
from hub_cases import EVALUATION, REPO, edit_json, once, states
from hub_server import Blob, Hub
from huggingface_hub import ModelCard
from support import randomize

from mlaconvert.config.geometry import WanConfig
from mlaconvert.config.mla import MLAConfig, MLALayer
from mlaconvert.config.streaming import StreamingConfig
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import CheckpointError, InputError, MLAConvertError
from mlaconvert.files import names
from mlaconvert.files.names import CONFIG_NAME, HEALING_NAME, WEIGHTS_NAME
from mlaconvert.model.wan import WanModel
from mlaconvert.publishing.hub import Stated, push
from mlaconvert.reports.card import CardFacts, CardModel, is_generated, write_card

# The client's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SaveFolder = Callable[..., Path]


def test_metadata_and_licence_come_from_the_base_model(hub: Hub, folder: Path) -> None:
    hub.create("Wan-AI/Wan2.1-T2V-1.3B", card={"license": "apache-2.0"})
    source = {"name": "Wan-AI/Wan2.1-T2V-1.3B/transformer", "subfolder": "", "sha256": "ab12"}
    edit_json(folder / "conversion.json", source=source)
    card = ModelCard(push(folder, REPO).plan.card)
    assert card.data.to_dict() == {
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B",
        "base_model_relation": "finetune",
        "library_name": "mlaconvert",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-video",
        "tags": ["multi-head-latent-attention", "mla", "kv-cache", "video-diffusion", "wan"],
    }
    assert "# wan-mla\n" in card.text
    assert "[Wan-AI/Wan2.1-T2V-1.3B](https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B)" in card.text
    assert "caches 48 scalars instead of 576 (91.7% less)" in card.text
    assert f"`mlaconvert evaluate {REPO}` measures it again" in card.text
    assert "SHA-256 of the source's weight files, in order of their names: `ab12`" in card.text


@pytest.mark.parametrize(
    ("rope", "said", "cached"),
    [
        ("cached", "one of 4 scalars for all heads of a layer, cached beside the latent", "9 to 96"),
        ("latent", "one of 4 scalars for all heads of a layer, read from the latent", "5 to 96"),
        ("head", "each head's own content keys", "5 to 96"),
    ],
)
def test_the_geometry_says_where_the_rotary_key_is(rope: Any, said: str, cached: str) -> None:
    pairs = () if rope == "head" else ((0, 1), (3, 1))
    layer = MLALayer(kv_lora_rank=5, qk_nope_head_dim=12, v_head_dim=16, rope_components=pairs)
    mla = MLAConfig(q_lora_rank=7, key_norm="latent", softmax_scale=0.25, layers=(layer, None), rope=rope)
    config = WanConfig(dim=48, num_heads=3, num_layers=2, ffn_dim=20, mla=mla)
    model = CardModel(subfolder="", config=config, description="", conversion={}, healing={}, evaluation={})
    card = write_card(CardFacts(repo=REPO, models=(model,), base_model=None, license={}))
    assert f"| rotary key | {said}" in card
    assert f"| cached for a token, a layer | {cached} scalars, dense 96 |" in card
    assert "| converted layers | 1 of 2 |" in card


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ("exact", "exact: a chunk sees itself through the source's own keys and values, and its past through latents"),
        ("latent", "latent: a chunk sees itself through its latents, as it is cached"),
    ],
)
def test_the_geometry_says_what_a_chunk_sees_of_itself(present: Any, said: str) -> None:
    layer = MLALayer(kv_lora_rank=5, qk_nope_head_dim=16, v_head_dim=16, rope_components=())
    mla = MLAConfig(
        q_lora_rank=None, key_norm="token", softmax_scale=0.25, layers=(layer, None), rope="head", present=present
    )
    config = WanConfig(dim=48, num_heads=3, num_layers=2, ffn_dim=20, mla=mla, streaming=StreamingConfig())
    model = CardModel(subfolder="", config=config, description="", conversion={}, healing={}, evaluation={})
    card = write_card(CardFacts(repo=REPO, models=(model,), base_model=None, license={}))
    assert f"| present | {said} |" in card
    assert "| cached for a token, a layer | 6 to 96 scalars, dense 96 |" in card


def test_an_exact_present_is_pushed_and_pulled(hub: Hub, golden: Path, tmp_path: Path) -> None:
    """The same files come back, and the recipe in the card makes the same model again."""
    window = StreamingConfig(chunk_frames=2, window_frames=5)
    recipe = ConvertRecipe(init="svd", kv_rank=9, present="exact", rope="head", v_dim=17, streaming=window)
    convert(golden, tmp_path / "made", recipe)
    card = push(tmp_path / "made", REPO).plan.card
    assert "| present | exact" in card
    (settings,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(settings)
    result = invoke("convert", golden, "-o", tmp_path / "again", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    pulled = hub.repos[REPO].files
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
        assert name in pulled


def test_a_licence_is_inherited_whole_or_not_invented(hub: Hub, folder: Path) -> None:
    own = {"license": "other", "license_name": "skywork", "license_link": "https://example.org/licence"}
    hub.create("sky/work", card=own | {"language": "en"})
    hub.create("sky/silent")

    def metadata(**options: Any) -> tuple[dict[str, Any], str]:
        plan = push(folder, REPO, dry_run=True, stated=Stated(**options)).plan
        return ModelCard(plan.card).data.to_dict(), " ".join(plan.notes)

    data, notes = metadata(base_model="sky/work")
    assert own.items() <= data.items()
    assert notes == ""
    for base in ("sky/silent", "sky/gone"):
        data, notes = metadata(base_model=base)
        assert "license" not in data
        assert "give --license ID" in notes
    data, notes = metadata()
    assert {"license", "base_model", "base_model_relation"}.isdisjoint(data)
    assert "give --base-model USER/REPO" in notes
    assert metadata(base_model="sky/work", license="mit")[0]["license"] == "mit"
    hub.before = once("GET /api/models/sky/work", 503)
    with pytest.raises(MLAConvertError, match="sky/work: the Hub answered with status 503"):
        metadata(base_model="sky/work")


def test_a_licence_that_the_hub_does_not_know(hub: Hub, folder: Path) -> None:
    with pytest.raises(InputError, match="the Hub refused the files or the card"):
        push(folder, REPO, stated=Stated(license="nonsense"))
    assert set(hub.repos[REPO].files) == {".gitattributes"}


def test_the_recipe_in_the_card_makes_the_same_model(hub: Hub, folder: Path, golden: Path, tmp_path: Path) -> None:
    card = push(folder, REPO, dry_run=True).plan.card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = invoke("convert", golden, "-o", tmp_path / "again", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_figures_stand_with_their_conditions(hub: Hub, folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    stage = {"recipe": {"stage": "distill", "steps": 300, "ema": None}, "teacher": "wan_tiny", "written": {"step": 250}}
    last = {"recipe": {"stage": "dmd", "betas": [0.0, 0.9]}, "losses": {"rows": [[1, 0.5]] * 400}, "before": [stage]}
    (folder / "healing.json").write_text(json.dumps(last))
    card = push(folder, REPO, dry_run=True).plan.card
    for row in (
        "| validation loss | 0.25 | 0.28 (+12.0%) |",
        "| velocity, relative error |  | 3.45% |",
        "| attention output of a layer, relative error |  | mean 20.00%, worst 30.00% (layer 1) |",
        "| KV cache of one video, measured | 4 KiB | 512 B (-87.5%) |",
        "| video frames per second, without the VAE | 2 | 3.5 |",
        "| VBench imaging_quality | 0.6400 | 0.6100 |",
    ):
        assert row in card
    conditions, recipe, first, second = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", card, re.DOTALL))
    expected = {name: EVALUATION[name] for name in ("teacher", "data", "conditions", "versions")}
    assert conditions == expected | {"data": {"from": "somewhere", "clips": 7, "seeds": "40 values"}}
    assert recipe["kv_rank"] == 10
    assert first == {"stage": "distill", "steps": 300}
    assert second == last["recipe"]
    assert "teacher wan_tiny, the weights of step 250, with this recipe" in card
    assert "healed by training" in card
    assert "not been trained since" not in card
    assert "not been evaluated" not in card


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"models": "none"},
        {"models": [{"teacher_loss": 0.1, "student_loss": 0.2}] * 2},
        {"models": [{"teacher_loss": "low", "attention_errors": [None], "cache_bytes": 3, "velocity_error": True}]},
    ],
)
def test_records_of_another_shape_do_not_break_the_card(hub: Hub, folder: Path, evaluation: dict[str, Any]) -> None:
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    edit_json(folder / "conversion.json", recipe=None, source="unknown")
    card = push(folder, REPO, dry_run=True).plan.card
    assert "| validation loss" not in card
    assert "its recipe is not known" in card
    (folder / "conversion.json").unlink()
    push(folder, REPO)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json: it is not readable JSON"):
        push(folder, REPO)


def test_an_edited_card_is_kept_and_a_generated_one_renewed(hub: Hub, folder: Path) -> None:
    """Edited in the folder, edited on the Hub, and left as generated."""

    def repo() -> str:
        return hub.repos[REPO].files["README.md"].data.decode()

    first = push(folder, REPO).plan.card
    report = push(folder, REPO, stated=Stated(license="mit"), update=True)
    assert [file.path for file in report.plan.changes] == ["README.md"]
    assert repo() != first

    mine = repo().replace("## Known limits", "## Known limits\n\n- My own remark.")
    hub.repos[REPO].files["README.md"] = Blob(mine.encode(), False)
    edit_json(folder / "conversion.json", remark="to have something to commit")
    report = push(folder, REPO, stated=Stated(license="apache-2.0"), update=True)
    assert states(report)["README.md"] == "kept"
    assert "edited on the Hub" in " ".join(report.plan.notes)
    assert repo() == report.plan.card == mine

    (folder / "README.md").write_text("# My model\n")
    report = push(folder, REPO, update=True)
    assert [file.path for file in report.plan.changes] == ["README.md"]
    assert repo() == report.plan.card == "# My model\n"


def test_what_counts_as_generated(hub: Hub, folder: Path) -> None:
    stub = (folder / "README.md").read_text()
    card = push(folder, REPO, dry_run=True).plan.card
    for text in (stub, card):
        assert is_generated(text)
        for edited in (text + "more\n", "more\n" + text, text.replace("Attention", "attention"), text[:-3]):
            assert not is_generated(edited)
    assert not is_generated("")
    assert not is_generated("# My model\n")


@pytest.mark.parametrize("init", ["lossless", "random"])
def test_every_stub_of_convert_counts_as_generated(golden: Path, tmp_path: Path, init: Any) -> None:
    convert(golden, tmp_path / "out", ConvertRecipe(init=init, layers="0,2"))
    assert is_generated((tmp_path / "out" / "README.md").read_text())


STUB = """\
# my.model, with latent attention

Converted from my.model, transformer (wan t2v, native layout, 3 layers) by mlaconvert 0.0.9.dev3.

Self-attention in layers 0,2-3 is Multi-Head Latent Attention (init svd). A token caches 1,234 scalars instead of \
12,345 (-3.0% less). All other tensors are the source's. `conversion.json` records the recipe, the source's hash and \
each layer's spectrum and errors.

Healed by mlaconvert 0.1.0: stage distill, 300 steps of batch 8 a process, teacher Wan-AI/Wan2.1-T2V-1.3B; \
`healing.json` has the recipe and the curves, `healing.png` draws them. The weights are those of step 250.

Healed by mlaconvert 0.1.1: stage few-step-ode, 20 steps of batch 1 a process, teacher wan; \
`healing.json` has the recipe and the curves, `healing.png` draws them. The weights are those of step 0.
"""


def test_a_stub_of_an_earlier_version_counts_as_generated() -> None:
    """As it stands in folders that were written before; a word more or less is somebody's own."""
    assert is_generated(STUB)
    untrained = STUB.split("\n\nHealed", maxsplit=1)[0] + " The model has not been trained since.\n"
    assert is_generated(untrained)
    for old, new in (
        ("1,234 scalars", "only 1,234 scalars"),
        ("of 12,345 (", "of about 12,345 ("),
        ("300 steps", "300 good steps"),
        ("step 0.", "step 0. Enjoy!"),
        ("init svd", "init: svd"),
        ("my.model, with", "my\nmodel, with"),
        (" the curves", " curves"),
    ):
        assert old in STUB
        assert not is_generated(STUB.replace(old, new)), new


def test_what_heal_adds_to_the_stub_counts_as_generated(folder: Path, tmp_path: Path) -> None:
    from mlaconvert.healing import output
    from mlaconvert.healing.loop import Curves
    from mlaconvert.healing.recipe import HealRecipe

    report = output.HealReport(
        output=tmp_path / "healed",
        recipe=HealRecipe(stage="teacher-forcing"),
        teacher="Wan-AI/Wan2.1-T2V-1.3B",
        curves=Curves(),
        best=(250, 0.125),
        occupancy={},
    )
    for _ in range(2):
        (folder / "README.md").write_text(output._readme(folder, report))
        assert is_generated((folder / "README.md").read_text())
    assert (folder / "README.md").read_text().count("Healed by") == 2
    assert names.HEALING_NAME == HEALING_NAME


@pytest.mark.parametrize(("few_step", "sampler"), [(False, "many_step(20)"), (True, "few_step()")])
def test_the_snippet_samples_as_the_model_was_trained(hub: Hub, folder: Path, few_step: bool, sampler: str) -> None:
    edit_json(folder / CONFIG_NAME, streaming={}, few_step=few_step)
    assert f"Sampler.{sampler}" in push(folder, REPO, dry_run=True).plan.card


def image_to_video(save_folder: SaveFolder) -> Path:
    """A converted image-to-video model with a CLIP branch, a reference image, and three latent channels."""
    config = WanConfig(
        dim=36, num_heads=3, num_layers=2, ffn_dim=20, freq_dim=14, text_dim=18, in_dim=7, out_dim=3, image_dim=10,
        reference_dim=3,
    )  # fmt: skip
    model = WanModel(config)
    randomize(model)
    raw = {"_class_name": "WanModel", "model_type": "i2v", "num_heads": 3}
    source = save_folder(model.state_dict(), raw, "i2v")
    convert(source, source.with_name("i2v-mla"), ConvertRecipe(init="svd"))
    return source.with_name("i2v-mla")


@pytest.mark.parametrize("kind", [pytest.param("streaming", marks=pytest.mark.slow), "bidirectional", "image"])
def test_the_usage_snippets_run_as_printed(
    hub: Hub, folder: Path, tmp_path: Path, save_folder: SaveFolder, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "streaming":
        folder = tmp_path / "tiny-mla"
        convert("tiny", folder, ConvertRecipe(init="svd"))
    elif kind == "image":
        folder = image_to_video(save_folder)
    card = push(folder, REPO).plan.card
    assert f"pipeline_tag: {'image' if kind == 'image' else 'text'}-to-video" in card
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("reference=reference" in python) == (kind == "image")
    exec(compile(python, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    shape = {"streaming": [1, 3, 3, 24, 32], "bidirectional": [1, 16, 3, 60, 104], "image": [1, 3, 3, 24, 32]}[kind]
    assert printed == [f"torch.Size({shape})"] * (2 if kind == "streaming" else 1)
    (bash,) = re.findall(r"```bash\nmlaconvert (.*?)\n```", card, re.DOTALL)
    result = invoke(*bash.split())
    assert result.exit_code == 0, result.stderr
