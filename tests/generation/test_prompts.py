"""Prompts to video: words through the text encoder, the model and the VAE into movie files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_base
from command_line import invoke, succeed
from safetensors.torch import load_file, save_file
from support import relative
from torch import Tensor

from mlaconvert.base.repository import open_base
from mlaconvert.base.text import embed_texts
from mlaconvert.base.vae import Vae
from mlaconvert.clips.footage import Footage, to_pixels
from mlaconvert.errors import ConfigError, InputError, OutputError
from mlaconvert.generation import movies, output
from mlaconvert.generation import run as generation
from mlaconvert.generation import text as text_module
from mlaconvert.generation.plan import plan_generation
from mlaconvert.generation.request import Generation, Runtime
from mlaconvert.generation.run import generate
from mlaconvert.generation.vbench_names import generate_for_vbench
from mlaconvert.model.load import load_model
from mlaconvert.model.rollout import Given, LatentSize, rollout
from mlaconvert.model.schedule import Sampler

PROMPTS = ("a cat in the snow", "the red sea at night")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_base.save_base(tmp_path_factory.mktemp("base"))


def wanted(base: Path | None, **options: Any) -> Generation:
    small = {"frames": 6, "height": 32, "width": 48, "timesteps": (900.0, 300.0), "prompts": PROMPTS[:1]}
    return Generation(base=None if base is None else str(base), **small | options)


def embedded(base: Path, *texts: str) -> list[Tensor]:
    return [text[None].float() for text in embed_texts(open_base(str(base)), texts)]


def pixels(base: Path, latents: Tensor) -> Tensor:
    """[3, F, H, W] by diffusers' own decode of the whole."""
    vae = Vae.load(open_base(str(base)))
    return vae.model.decode(latents[None] * vae._std + vae._mean).sample[0]


def read_movie(path: Path, height: int = 32, width: int = 48, fps: int = 16) -> Tensor:
    with Footage(path, height=height, width=width, fps=fps) as footage:
        return torch.stack([to_pixels(frame) for frame in footage], 1)


def assert_shows(path: Path, expected: Tensor) -> None:
    """Up to what compression takes, which is less than what the frames differ by among themselves."""
    found = read_movie(path)
    assert found.shape == expected.shape
    error = float((found - expected).square().mean().sqrt())
    assert error < 0.6 * float((expected[:, 1:] - expected[:, :-1]).square().mean().sqrt())


# --- one video -------------------------------------------------------------------------------------------------------


def test_words_become_a_movie(golden: Path, base: Path, tmp_path: Path) -> None:
    """Two prompts in time, with guidance away from a third, against every step by hand."""
    flags = ("--base", base, "--height", 32, "--width", 48, "--frames", 6, "--steps", 2, "--guidance", 3, "--seed", 4)
    result = invoke("generate", golden, *PROMPTS, "-o", tmp_path / "out", "--negative-prompt", "slowly", *flags)
    assert result.exit_code == 0, result.stderr
    *contexts, negative = embedded(base, *PROMPTS, "slowly")
    chunks = rollout(
        load_model(golden),
        [(0, contexts[0]), (3, contexts[1])],
        size=LatentSize(frames=6, height=4, width=6),
        given=Given(null_context=negative),
        sampler=Sampler.many_step(2, guidance=3),
        seed=4,
    )
    expected = torch.cat(list(chunks), 2)
    assert relative(load_file(tmp_path / "out" / "latents.safetensors")["latents"], expected) < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "latents.safetensors",
        "generation.json",
        "video-4.mp4",
    }
    assert_shows(tmp_path / "out" / "video-4.mp4", pixels(base, expected[0]))
    settings = json.loads((tmp_path / "out" / "generation.json").read_text())["settings"]
    assert settings["text"] == {"base": str(base), "prompts": list(PROMPTS), "negative": "slowly"}


def test_an_output_may_be_the_movie_alone(golden: Path, base: Path, tmp_path: Path) -> None:
    generate(golden, tmp_path / "out", wanted(base))
    report = generate(golden, tmp_path / "out.mp4", wanted(base))
    assert (report.files, report.video_seconds) == (("out.mp4",), 1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.mp4"]
    assert torch.equal(read_movie(tmp_path / "out.mp4"), read_movie(tmp_path / "out" / "video-0.mp4"))
    with pytest.raises(OutputError, match=r"out\.mp4 exists"):
        generate(golden, tmp_path / "out.mp4", wanted(base))
    generate(golden, tmp_path / "out.mp4", wanted(base, frames=3), overwrite=True)
    assert read_movie(tmp_path / "out.mp4").shape[1] == 9


def test_the_tiny_model_writes_a_file_too(tmp_path: Path) -> None:
    caption = "large red disc right, sky"
    for name in ("out.mp4", "out.gif"):
        result = invoke("generate", "tiny", caption, "-o", tmp_path / name, "--frames", 3, "--steps", 1)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.endswith(f"); {tmp_path / name}\n")
    assert read_movie(tmp_path / "out.mp4", 96, 128).shape[1] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gif", "out.mp4"]


def test_the_base_is_the_one_that_was_converted(golden: Path, base: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(base, tmp_path / "wan"))
    shutil.copytree(golden, repo / "transformer")
    succeed("convert", repo, "-o", tmp_path / "mla", "--init", "svd")
    generate(tmp_path / "mla", tmp_path / "found.mp4", wanted(None))
    generate(tmp_path / "mla", tmp_path / "named.mp4", wanted(base))
    assert torch.equal(read_movie(tmp_path / "found.mp4"), read_movie(tmp_path / "named.mp4"))


def test_embeddings_need_no_encoder(golden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (context,) = embedded(base, PROMPTS[0])
    save_file({"context": context}, tmp_path / "text.safetensors")
    generate(golden, tmp_path / "words.mp4", wanted(base))
    monkeypatch.setattr("mlaconvert.base.text._load_encoder", lambda *_: pytest.fail("not needed"))
    rows = wanted(base, prompts=(), embeddings=tmp_path / "text.safetensors")
    generate(golden, tmp_path / "rows", rows)
    assert torch.equal(read_movie(tmp_path / "rows" / "video-0.mp4"), read_movie(tmp_path / "words.mp4"))


def test_the_models_are_loaded_one_after_the_other(
    golden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from mlaconvert.base import text

    alive: dict[str, Any] = {}
    load_encoder, load, decode = text._load_encoder, Runtime.load, Vae.decode

    def watched_encoder(*arguments: Any) -> Any:
        found = load_encoder(*arguments)
        alive["encoder"] = weakref.ref(found)
        return found

    def watched_model(*arguments: Any, **options: Any) -> Any:
        assert alive["encoder"]() is None
        found = load(*arguments, **options)
        alive["model"] = weakref.ref(found)
        return found

    def watched_decode(*arguments: Any) -> Any:
        assert alive["model"]() is None
        alive["decoded"] = True
        return decode(*arguments)

    monkeypatch.setattr(text, "_load_encoder", watched_encoder)
    monkeypatch.setattr(Runtime, "load", watched_model)
    monkeypatch.setattr(Vae, "decode", watched_decode)
    generate(golden, tmp_path / "out.mp4", wanted(base))
    assert alive["decoded"]


def test_an_interruption_while_decoding_keeps_the_latents(
    golden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = movies.save_movie
    left = [2]

    def stop(frames: Any, path: Path, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            next(iter(frames))
            raise KeyboardInterrupt
        original(frames, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(output, "save_movie", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(golden, tmp_path / "out", wanted(base, samples=2))
    first = tmp_path / ".out.partial" / "video" / "video-0.mp4"
    before = first.stat().st_mtime_ns
    seen: list[tuple[str, int, int, str]] = []
    # Embeddings need not come out the same to the last bit.
    monkeypatch.setattr(text_module, "embed_texts", lambda *a, **o: (text * 1.01 for text in embed_texts(*a, **o)))
    report = generate(golden, tmp_path / "out", wanted(base, samples=2), progress=lambda *state: seen.append(state))
    assert report.resumed_frames == 6
    assert (tmp_path / "out" / "video-0.mp4").stat().st_mtime_ns == before
    latents = load_file(tmp_path / "out" / "latents.safetensors")["latents"]
    assert_shows(tmp_path / "out" / "video-1.mp4", pixels(base, latents[1]))
    decoded = [(done, total) for stage, done, total, *_ in seen if stage == "decode"]
    assert decoded == [(done, 12) for done in (6, 6, 7, 8, 9, 10, 11, 12)]
    assert [done for stage, done, *_ in seen if stage == "text"] == [0, 1]


def test_other_words_do_not_continue(golden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(generation, "decode_movies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(golden, tmp_path / "out", wanted(base))
    with pytest.raises(OutputError, match="unfinished video with other settings"):
        generate(golden, tmp_path / "out", wanted(base, prompts=PROMPTS[1:]))
    assert generate(golden, tmp_path / "out", wanted(base)).resumed_frames == 6


def test_wan22_5b_plays_at_its_own_rate(golden: Path, tmp_path: Path) -> None:
    import dataclasses

    save_file({"context": torch.zeros(2, 3, 40)}, tmp_path / "text.safetensors")
    config = dataclasses.replace(load_model(golden).config, in_dim=48, out_dim=48)
    request = Generation(embeddings=tmp_path / "text.safetensors", seconds=5, switch=(2.0,))
    plan = plan_generation(request, config)
    assert (plan.fps, plan.frames, plan.size) == (24, 30, (30, 52))
    assert [start for start, _ in plan.schedule] == [0, 12]


# --- VBench ----------------------------------------------------------------------------------------------------------


def test_vbench_prompts_are_embedded_and_decoded(golden: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--base", base, "--height", 32, "--width", 48, "--frames", 3, "--timesteps", "900", "--samples", 2)
    arguments = (golden, "-o", tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--vbench-names", *flags)
    result = invoke("generate", *arguments)
    assert result.exit_code == 0, result.stderr
    names = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    (tmp_path / "out" / f"{PROMPTS[1]}-0.mp4").unlink()
    before = (tmp_path / "out" / f"{PROMPTS[0]}-0.mp4").stat().st_mtime_ns
    assert invoke("generate", *arguments).exit_code == 0
    assert (tmp_path / "out" / f"{PROMPTS[0]}-0.mp4").stat().st_mtime_ns == before
    chunks = rollout(
        load_model(golden),
        embedded(base, PROMPTS[1])[0],
        size=LatentSize(frames=3, height=4, width=6),
        sampler=Sampler.few_step((900,)),
    )
    assert_shows(tmp_path / "out" / f"{PROMPTS[1]}-0.mp4", pixels(base, torch.cat(list(chunks), 2)[0]))
    # All there: neither text nor model is loaded.
    same = wanted(base, prompts=(), samples=2, frames=3, timesteps=(900.0,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "load", lambda *_, **__: pytest.fail("nothing is left to do"))
        assert len(generate_for_vbench(golden, tmp_path / "out", PROMPTS, same)) == 4


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_requests_are_named_before_anything_is_loaded(
    golden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlaconvert.base.text._load_encoder", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(Runtime, "load", lambda *_, **__: pytest.fail("too late"))
    cases: list[tuple[Generation, dict[str, Any], str]] = [
        (wanted(base, height=40), {}, "height is 40 pixels"),
        (wanted(base, prompts=PROMPTS, switch=(9.0,)), {}, "would begin at latent frames"),
        (wanted(None), {}, "its text encoder and VAE are not known; name its base repository with --base"),
        (wanted(base), {"movie": "gif"}, "a GIF would lie in memory as a whole"),
        (wanted(None, prompts=()), {}, "this model needs text embeddings: give a prompt"),
        (wanted(base), {"runtime": Runtime(text_device="abacus")}, "device 'abacus' is none that torch knows"),
    ]
    for request, options, message in cases:
        with pytest.raises(InputError, match=message):
            generate(golden, tmp_path / "out", request, **options)
    files: list[tuple[Generation, dict[str, Any], str]] = [
        (wanted(base, samples=2), {}, "is one movie, and 2 samples are several; give a folder"),
        (wanted(base), {"movie": "gif"}, "says mp4, and --format gif"),
    ]
    for request, options, message in files:
        with pytest.raises(ConfigError, match=message):
            generate(golden, tmp_path / "out.mp4", request, **options)
    with pytest.raises(OutputError, match="create it first"):
        generate(golden, tmp_path / "a" / "out.mp4", wanted(base))
    with pytest.raises(ConfigError, match="leave --base out"):
        generate("tiny", tmp_path / "out", Generation(base=str(base)))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match="exists"):
        generate(golden, tmp_path / "folder.mp4", wanted(base), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_base_of_another_family_is_refused(golden: Path, base: Path, tmp_path: Path) -> None:
    other = wan_base.save_base(tmp_path / "other", text_dim=24)
    with pytest.raises(InputError, match="its text encoder gives 24 channels, the model takes 40"):
        generate(golden, tmp_path / "out", wanted(other))
    shutil.rmtree(other / "vae")
    wan_base.make_vae(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(other / "vae")
    with pytest.raises(InputError, match="its VAE has 4 latent channels, the model 16"):
        generate(golden, tmp_path / "out", wanted(other))
    assert not (tmp_path / "out").exists()
