"""HY-WorldPlay's autoregressive model, dense and converted, against what its own class computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_relatives import make_worldplay, vectors
from support import relative
from torch import Tensor

from mlaconvert import load_camera_model, load_model
from mlaconvert.conversion.recipe import ConvertRecipe
from mlaconvert.conversion.run import convert
from mlaconvert.errors import InputError, UnsupportedModelError
from mlaconvert.model.camera.model import CameraModel, Frames, Past, Text
from mlaconvert.model.camera.turns import Cameras

TOLERANCE = 1e-5
PAST_TIME, TIME = 14.0, 731.25


@pytest.fixture(scope="module")
def v() -> dict[str, Tensor]:
    return vectors("worldplay_tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_worldplay(tmp_path_factory.mktemp("golden"), glyphs=True)


def read(model: CameraModel, v: dict[str, Tensor], *, image: bool = True) -> Text:
    states, letters = (
        v[name][:, v[mask][0].bool()] for name, mask in (("text", "text_mask"), ("glyphs", "glyph_mask"))
    )
    return model.read(states, letters=letters, image=v["image"] if image else None)


def frames(v: dict[str, Tensor], prefix: str, time: float) -> Frames:
    latents = v["past" if prefix else "chunk"]
    cameras = Cameras(v[f"{prefix}viewmats"][0], v[f"{prefix}intrinsics"][0])
    return Frames(latents, torch.full((latents.shape[2],), time), v[f"{prefix}actions"][0], cameras)


def run(model: CameraModel, v: dict[str, Tensor], *, image: bool = True) -> tuple[Tensor, Past]:
    """The chunk behind its past, and that."""
    text = read(model, v, image=image)
    past = model.remember(frames(v, "past_", PAST_TIME), text)
    return model(frames(v, "", TIME), text, past), past


@pytest.mark.parametrize("image", [True, False])
def test_it_computes_what_their_class_does(folder: Path, v: dict[str, Tensor], image: bool) -> None:
    model, case = load_camera_model(folder), "" if image else "t2v."
    text = read(model, v, image=image)
    for layer, (k, value) in enumerate(text):
        assert relative(k.transpose(1, 2), v[f"{case}k_txt.{layer}"]) < TOLERANCE
        assert relative(value.transpose(1, 2), v[f"{case}v_txt.{layer}"]) < TOLERANCE
    out, past = run(model, v, image=image)
    assert relative(out, v[f"{case}out"]) < TOLERANCE
    assert relative(v["out"], v["t2v.out"]) > 0.1
    if not image:
        return
    assert relative(model(frames(v, "", TIME), text), v["first.out"]) < TOLERANCE
    assert relative(v["out"], v["first.out"]) > 0.1
    for layer, cached in enumerate(past.layers):
        for name, both in (("k", cached[:2]), ("v", cached[2:])):
            assert relative(torch.cat(both).transpose(1, 2), v[f"{name}_vision.{layer}"]) < TOLERANCE


@pytest.mark.parametrize("layers", ["0-1", "1"])
def test_a_latent_as_wide_as_the_model_changes_nothing(
    folder: Path, v: dict[str, Tensor], tmp_path: Path, layers: str
) -> None:
    convert(folder, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=48, layers=layers))
    out, past = run(load_camera_model(tmp_path / "out"), v)
    assert relative(out, v["out"]) < TOLERANCE
    assert [len(layer) for layer in past.layers] == [2 if str(i) in layers.split("-") else 4 for i in range(2)]


def test_a_narrow_latent_changes_the_past_alone(folder: Path, v: dict[str, Tensor], tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=12))
    model = load_camera_model(tmp_path / "out")
    assert 0.02 < relative(run(model, v)[0], v["out"]) < 0.3
    assert relative(model(frames(v, "", TIME), read(model, v)), v["first.out"]) < TOLERANCE


@pytest.mark.parametrize(("rank", "scalars"), [(None, 4 * 48), (13, 13 + 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_the_plan_says(
    folder: Path, v: dict[str, Tensor], tmp_path: Path, rank: int | None, scalars: int, dtype: torch.dtype
) -> None:
    """A latent and a norm of each head; or keys and values, turned in two ways."""
    if rank is not None:
        convert(folder, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=rank))
    model = load_camera_model(folder if rank is None else tmp_path / "out", dtype=dtype)
    _, past = run(model, v)
    assert model.config.cached_bytes(dtype.itemsize) == (scalars * dtype.itemsize,) * 2
    assert past.nbytes == 3 * sum(model.config.frame_bytes(dtype.itemsize, 2 * 3)) == 18 * 2 * scalars * dtype.itemsize
    assert past.frames == 3


def test_cameras_and_actions_count(folder: Path, v: dict[str, Tensor], tmp_path: Path) -> None:
    """Those of the past, too, which a converted layer turns when the past is read."""
    convert(folder, tmp_path / "out", ConvertRecipe(init="svd", kv_rank=48))
    model = load_camera_model(tmp_path / "out")
    for name in ("viewmats", "past_viewmats", "intrinsics", "past_intrinsics", "actions", "past_actions"):
        other = v[name].flip(1) if v[name].ndim > 2 else v[name] + 1
        assert relative(run(model, v | {name: other})[0], v["out"]) > 1e-3, name
    hidden = v["intrinsics"].clone()
    hidden[..., :2, 2] = 0.1  # where the lens points is not looked at
    assert torch.equal(run(model, v | {"intrinsics": hidden})[0], run(model, v)[0])


def cut(field: str, change: Callable[[Any], Any]) -> Callable[[Frames], Frames]:
    return lambda given: given._replace(**{field: change(getattr(given, field))})


WRONG: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "channels": (cut("latents", lambda x: x[:, 1:]), r"latents must be \[1, 11, F, H, W\] .* not \[1, 10, 2, 4, 6\]"),
    "two videos": (cut("latents", lambda x: x.repeat(2, 1, 1, 1, 1)), r"latents must be \[1, 11"),
    "odd height": (cut("latents", lambda x: x[..., 1:, :]), "in multiples of 2 and 2"),
    "no frames": (cut("latents", lambda x: x[:, :, :0]), "latents must be"),
    "timesteps": (cut("timesteps", lambda x: x[:1]), r"timesteps must be \[2\] for 2 latent frames, not \[1\]"),
    "actions": (cut("actions", lambda x: x[None]), r"actions must be \[2\] .*not \[1, 2\]"),
    "cameras": (cut("cameras", lambda c: c._replace(viewmats=c.viewmats[:, :3])), "viewmats must be"),
    "no focal length": (
        cut("cameras", lambda c: c._replace(intrinsics=torch.diag(torch.tensor([1.5, 0, 1])).repeat(2, 1, 1))),
        r"intrinsics have focal lengths \[\[1.5, 0.0\], \[1.5, 0.0\]\]; give finite numbers other than 0",
    ),
    "no number": (
        cut("cameras", lambda c: c._replace(intrinsics=c.intrinsics * float("nan"))), "intrinsics have focal lengths",
    ),
    "lenses": (cut("cameras", lambda c: c._replace(intrinsics=c.intrinsics[:1])), "intrinsics must be"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_are_named(tmp_path: Path, v: dict[str, Tensor], wrong: str) -> None:
    change, says = WRONG[wrong]
    model = load_camera_model(make_worldplay(tmp_path))
    text = model.read(v["text"])
    for call in (model, model.remember):
        with pytest.raises(InputError, match=says):
            call(change(frames(v, "", TIME)), text)


def test_a_prompt_of_another_shape_is_named(tmp_path: Path, v: dict[str, Tensor]) -> None:
    model = load_camera_model(make_worldplay(tmp_path))
    for given, says in (
        ({"states": v["text"][..., 1:]}, r"states must be \[1, tokens, 28\], not \[1, 7, 27\]"),
        ({"states": v["text"][:, :0]}, r"states must be \[1, tokens, 28\], not \[1, 0, 28\]"),
        ({"states": v["text"], "image": v["image"][0]}, r"image must be \[1, tokens, 20\], not \[6, 20\]"),
        ({"states": v["text"], "letters": v["glyphs"]}, "letters are given, and the model reads none"),
    ):
        with pytest.raises(InputError, match=says):
            model.read(**given)  # type: ignore[arg-type]


def test_each_kind_of_model_has_its_loader(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a camera for every frame.*load_camera_model"):
        load_model(make_worldplay(tmp_path))
    with pytest.raises(UnsupportedModelError, match="it is given no cameras; load it with load_model"):
        load_camera_model(golden)
