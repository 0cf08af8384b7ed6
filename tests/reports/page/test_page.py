"""The HTML page: well-formed, complete, self-contained, and its charts and previews right."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from page_cases import Page, model, report, video
from PIL import Image

from mlaconvert.errors import OutputError
from mlaconvert.reports.page.pictures import previews
from mlaconvert.reports.page.sections import render, write_page
from mlaconvert.reports.page.svg import Series, chart, ticks


def test_the_page_needs_nothing_else(text: str) -> None:
    """No script, no stylesheet, no font and no picture from elsewhere; every picture is a PNG in the page."""
    page = Page(text)
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "base"}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|@import|url\(", text)
    assert len(page.all("img")) == 2 * 3  # videos x (teacher and two models)


def test_names_are_escaped(text: str) -> None:
    page = Page(text)
    assert "two" not in {tag for tag, _ in page.elements}
    assert any("<two>" in part for part in page.text)
    assert any("wan & co" in part for part in page.text)
    assert "a<b" in page.text


def test_every_section_is_there(text: str) -> None:
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert headings == [
        "Summary",
        "Frames",
        "Errors by layer",
        "Velocity by timestep",
        "Drift",
        "VBench",
        "Spectra of the teacher’s weights",
        "How it was made and measured",
    ]
    cells = set(re.findall(r"<td>([^<]+)</td>", text))
    assert {"+10.0%", "+20.0%"} <= {c for cell in cells for c in re.findall(r"\((.*?)\)", cell)}  # excess
    assert {"12.5 (1.25x)", "91.00", "92.00", "0f" * 32, "0", "150", "0.1025"} <= cells  # speed, VBench, recipes
    assert "1 KiB (-75.0%)" in cells


def test_every_chart_has_its_numbers_in_a_table(text: str) -> None:
    """Charts whose numbers share a table are counted once: velocity errors and losses, energies and ranks."""
    drift = text.split('id="drift"')[1].split("</section>", maxsplit=1)[0]
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", drift)
    assert re.findall(r"<summary>(.+?), as a table</summary>", drift) == titles
    assert len(titles) == 5
    table = drift.split("<caption>Motion")[1]
    first = re.search(r'<th scope="row">1</th><td>([^<]+)</td><td>([^<]+)</td>', table)
    assert first is not None
    expected = [float((video(i, 3)[:, :, 1] - video(i, 3)[:, :, 0]).square().mean().sqrt()) for i in (0, 1)]
    assert [float(value) for value in first.groups()] == pytest.approx(expected, rel=1e-3)


def test_what_was_not_measured_has_no_section() -> None:
    bare = dataclasses.replace(
        model("one", 1),
        drift=None,
        speed=None,
        teacher_video=None,
        video=None,
        conversion=None,
        healing=None,
        vbench=None,
    )
    page = render(report(bare, rollout=None))
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    assert headings == ["Summary", "Errors by layer", "Velocity by timestep", "How it was made and measured"]
    Page(page)


def test_reading_aloud_and_keyboards(text: str) -> None:
    """A language, a title, unique ids, labelled charts and pictures, headed tables, and scrolling by keyboard."""
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    for attributes in page.all("section"):
        assert attributes["aria-labelledby"] in ids
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in page.all("svg"))
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes["scope"] in ("row", "col") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    scrolled = [a for _, a in page.elements if "scroll" in (a.get("class") or "").split()]
    assert all(a["tabindex"] == "0" and a["aria-label"] and a["role"] for a in scrolled)


def test_light_and_dark_text_is_legible(text: str) -> None:
    """WCAG contrast of text (4.5) and of lines (3) against the page in both schemes."""
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style[1].split("prefers-color-scheme: dark"))
    assert light.keys() == dark.keys()

    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for scheme in (light, dark):
        for name, color in scheme.items():
            bright, dim = sorted((luminance(color), luminance(scheme["bg"])), reverse=True)
            least = {"ink": 7, "dim": 4.5, "bg": 1, "panel": 1, "rule": 1}.get(name, 3)
            assert (bright + 0.05) / (dim + 0.05) >= least, (name, color)


def test_charts_put_points_where_they_belong() -> None:
    points = [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]
    found = chart("Some <title>", "x", [Series("a", points, 0, marker=True)], str)
    line = re.search(r'points="([^"]+)"', found)
    assert line is not None
    spots = [tuple(map(float, spot.split(","))) for spot in line[1].split()]
    xs, ys = zip(*spots, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    # Upwards is larger, in proportion, with zero on the axis.
    unit = (ys[0] - ys[1]) / 2
    assert unit > 0
    assert ys[2] - ys[1] == pytest.approx(unit, abs=0.2)
    lowest = max(float(y) for y in re.findall(r'class="grid" [^>]*y1="([\d.]+)"', found))
    assert lowest - ys[0] == pytest.approx(unit, abs=0.2)
    assert "Some &lt;title&gt;" in found
    assert "nan" not in chart("t", "x", [Series("a", [(0, math.nan), (1, 1.0)], None)], str)


@pytest.mark.parametrize(("low", "high"), [(0, 1.04), (-0.3, 0.1), (0, 0), (5, 5), (0, 1e-7), (3, 12345)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 6)
    assert 2 <= len(found) <= 9
    assert found[0] <= low <= high <= found[-1]
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-6
    assert low == high or (found[0] > low - step and found[-1] < high + step)


def test_whole_ticks_are_integers() -> None:
    assert ticks(0, 2, 6, whole=True) == [0, 1, 2]
    assert ticks(0, 29, 6, whole=True)[-1] >= 29


def test_pixels_are_shown_as_they_are() -> None:
    strip = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 5)
    (picture,) = previews([strip], pixels=True)
    assert picture.shape == (1, 2, 4, 5, 3)
    assert picture[0, 0, 0, 0].tolist() == [0, 128, 255]
    other = strip.clone()
    other[:, :, 1] = 1.0
    (picture,) = previews([other], pixels=True)
    assert picture[0, 0, 0, 0].tolist() != picture[0, 1, 0, 0].tolist()


def test_latents_are_shown_by_the_teachers_principal_components() -> None:
    """Against numpy's SVD; the student is shown in the teacher's colours, whatever its own are."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator) * torch.tensor([4.0, 2.0, 1.0, *[0.1] * 5])[:, None]
    teacher = torch.einsum("bcfhw,cd->bdfhw", torch.randn(2, 8, 3, 6, 9, generator=generator), mixing) + 0.7
    student = teacher * 0.5
    found = previews([teacher, student], pixels=False)
    assert [picture.shape for picture in found] == [(2, 3, 6, 9, 3)] * 2
    data = teacher.movedim(1, 0).flatten(1).double().numpy()
    mean = data.mean(1, keepdims=True)
    left, _, _ = np.linalg.svd(data - mean, full_matrices=False)
    for k in range(3):
        expected = left[:, k] @ (data - mean)
        shown = found[0][..., k].double().flatten().numpy()
        inside = (shown > 0) & (shown < 255)
        assert abs(np.corrcoef(expected[inside], shown[inside])[0, 1]) > 0.999
    assert found[1].double().std() < found[0].double().std()
    # One channel becomes grey.
    (grey,) = previews([teacher[:, :1]], pixels=False)
    assert torch.equal(grey[..., 0], grey[..., 2])


def test_pictures_of_the_page_are_the_frames(text: str) -> None:
    """The first picture holds eight of the teacher's eleven frames, enlarged without smoothing, with gaps between."""
    source = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert source is not None
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))).convert("RGBA"))
    scale = picture.shape[0] // 6
    gap = (picture.shape[1] - 80 * scale) // 7
    assert picture.shape == (6 * scale, 80 * scale + 7 * gap, 4)
    assert picture.shape[1] >= 900
    assert gap >= 4
    shown = torch.linspace(0, 10, 8).round().long()
    frames = ((video(0, 3)[0, :, shown] + 1) * 127.5).round()  # [3, 8, 6, 10]
    for i, expected in enumerate(frames.permute(1, 2, 3, 0).numpy()):
        left = i * (10 * scale + gap)
        found = picture[::scale, left : left + 10 * scale : scale]
        assert np.abs(found[..., :3].astype(float) - expected).max() <= 1
        assert (picture[:, left + 10 * scale : left + 10 * scale + gap, 3] == 0).all()  # see-through, in light and dark


def test_frames_of_a_strip_are_numbered(text: str) -> None:
    """Once a video; the given ones are marked."""
    found = re.findall(r'<div class="strip numbers">(.*?)</div>', text)
    assert len(found) == 2
    numbers = re.findall(r"<span>(\d+)( \(given\))?</span>", found[0])
    assert [int(number) for number, _ in numbers] == torch.linspace(0, 10, 8).round().long().tolist()


def test_latent_models_are_labelled_as_a_preview() -> None:
    page = render(report(model("one", 1, channels=16), pixels=False))
    assert "A linear preview, not decoded video" in page
    assert "RGB frames." not in page


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found = report(model("one", 1))
    write_page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == render(found)
    with pytest.raises(OutputError, match="cannot write the page"):
        write_page(found, tmp_path / "none" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
