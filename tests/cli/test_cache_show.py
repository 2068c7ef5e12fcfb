"""``scalekd cache show``: one valid page without outside references, in which names stay text."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scalekd.cache import open_cache, read_features
from scalekd.pipelines._token_maps import ColourBasis, heat, token_errors

Run = Callable[..., Any]

_VOID = {"meta", "img", "br", "link", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&\u202e"


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _image(address: str | None) -> Image.Image:
    assert address is not None
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def _folder(tmp_path: Path, classes: tuple[str, str], *, side: int = 48) -> Path:
    random = np.random.default_rng(1)
    for name in classes:
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (side, side + 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"photo {number}.png")
    return tmp_path / "photos"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return _folder(tmp_path, ("dogs", "cats"))


@pytest.fixture
def cache(run: Run, photos: Path, tmp_path: Path) -> Path:
    return _cache(run, photos, tmp_path / "cache")


def _cache(run: Run, photos: Path, output: Path, *options: object) -> Path:
    written = run(
        *("cache-teacher", "--model", "test_vit.r160_in1k", "--no-pretrained", "--img-size", 32),
        *("--model-kwargs", "num_classes=2", "--data-dir", photos, "--output", output),
        *("--codec", "int8", "-b", 6, "-j", 0, "--class-map", "none", *options),
    )
    assert written.code == 0, written.err
    return output


def test_the_page_shows_views_features_and_answers(
    run: Run, cache: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pages" / "cache.html"
    shown = run(
        *("cache", "show", cache, "--data-dir", photos, "--views", 5, "--teacher", "--json"),
        *("--output", output),
    )
    assert shown.code == 0, shown.err
    assert shown.json["num_without_pixels"] == 0
    assert all(0 < error < 1e-3 for each in shown.json["errors"] for error in each.values())
    text = output.read_text(encoding="utf-8")
    assert len(text.encode()) == shown.json["num_bytes"]
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in text
    assert len(page.all("article")) == 5
    assert len(page.all("img")) == 5 * (2 + 2 * 3)
    headings = [key for key in shown.json["keys"] if key in page.text]
    assert headings == shown.json["keys"]
    assert {"dogs", "cats"} <= {line.split(" ·")[0].strip() for line in page.text}
    # The view is shown as the teacher saw it: 32 px, and at its place in the whole image.
    first = next(a for a in page.all("img") if str(a["alt"]).startswith("view of"))
    assert _image(first["src"]).size == (32, 32)
    assert len(page.all("i")) == 5


def test_the_page_refers_to_no_other_file(
    run: Run, cache: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cache.html"
    assert run("cache", "show", cache, "--data-dir", photos, "--output", output).code == 0
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "data", "srcset"):
                assert str(value).startswith("data:image/")
    assert not re.search(r"url\(|@import|https?:", text)


def test_hostile_names_are_shown_as_text(run: Run, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_")
    photos = _folder(tmp_path, (name, "cats"))
    cache = _cache(run, photos, tmp_path / "cache", "--note", HOSTILE)
    output = tmp_path / "cache.html"
    shown = run("cache", "show", cache, "--data-dir", photos, "--output", output)
    assert shown.code == 0, shown.err
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("script")
    assert "\u202e" not in text
    written = name.replace("\u202e", "\\u202e")
    assert any(written in part for part in page.text)
    assert HOSTILE.replace("\u202e", "\\u202e") in page.text


def test_views_are_chosen_by_key_class_and_error(
    run: Run, cache: Path, photos: Path, tmp_path: Path
) -> None:
    show = ("cache", "show", cache, "--data-dir", photos, "--output", tmp_path / "c.html", "--json")
    keys = ["dogs/photo 3.png", "cats/photo 0.png"]
    found = run(*show, "--keys", keys[0], "--keys", keys[1])
    assert found.json["keys"] == keys
    dogs = run(*show, "--class", "dogs").json["keys"]
    assert len(dogs) == 6
    assert all(key.startswith("dogs/") for key in dogs)
    everything = run(*show, "--teacher").json
    worst = run(*show, "--worst", 3).json
    errors = [max(each.values()) for each in everything["errors"]]
    order = sorted(range(12), key=lambda row: -errors[row])
    assert worst["keys"] == [everything["keys"][row] for row in order[:3]]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--keys", "dogs/photo 9.png"), 3, "has no sample"),
        (("--class", "dog"), 3, "did you mean 'dogs'"),
        (("--pass", 3), 2, "the cache has passes 0"),
        (("--keys", "x", "--worst", 2), 2, "leave out --worst"),
    ],
)
def test_wrong_choices_of_views_are_one_line(
    run: Run, cache: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    output = tmp_path / "c.html"
    found = run("cache", "show", cache, "--output", output, *options)
    assert found.code == code, found.err
    assert message in found.err
    assert not output.exists()


def test_a_cache_without_images_logits_or_labels_is_shown(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    cache = _cache(
        *(run, photos, tmp_path / "cache", "--logits", "none", "--labels", "none"),
        *("--stages", "final"),
    )
    output = tmp_path / "c.html"
    shown = run("cache", "show", cache, "--output", output)
    assert shown.code == 0, shown.err
    page = Page(output.read_text(encoding="utf-8"))
    assert len(page.all("article")) == 12
    assert "pass --data-dir" in shown.out
    teacher = run("cache", "show", cache, "--output", output, "--teacher")
    assert teacher.code == 2
    assert "pass --data-dir" in teacher.err


@pytest.mark.parametrize("embed", ["source", "view", "pixels"])
def test_embedded_images_are_shown_without_data_dir(
    run: Run, photos: Path, tmp_path: Path, embed: str
) -> None:
    cache = _cache(
        *(run, photos, tmp_path / "cache", "--format", "webdataset", "--embed", embed),
    )
    output = tmp_path / "c.html"
    shown = run("cache", "show", cache, "--output", output, "--json")
    assert shown.code == 0, shown.err
    assert shown.json["num_without_pixels"] == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert "this machine redraws" not in " ".join(page.text)
    assert len(page.all("i")) == (12 if embed == "source" else 0)


def test_topk_logits_give_probabilities(run: Run, photos: Path, tmp_path: Path) -> None:
    cache = _cache(run, photos, tmp_path / "cache", "--logits", "topk:1")
    output = tmp_path / "c.html"
    assert run("cache", "show", cache, "--output", output).code == 0
    meters = [float(str(a["value"])) for a in Page(output.read_text()).all("meter")]
    sums = np.array(meters).reshape(-1, 2).sum(axis=1)
    assert np.allclose(sums, 1, atol=2e-3)


def test_colours_have_a_common_basis_and_distinguish_tokens(cache: Path) -> None:
    reader = open_cache(cache)
    shape = reader.codecs.stages[4].shape
    tokens = read_features(reader, stage=4, pass_index=0, first=0, count=12)
    views = list(tokens[:, shape.num_prefix_tokens :])
    basis = ColourBasis.fit(views)
    pictures = [basis.colours(view, shape.grid) for view in views]
    assert all(picture.shape == (*shape.grid, 3) for picture in pictures)
    assert all(
        (basis.colours(view, shape.grid) == picture).all()
        for view, picture in zip(views, pictures, strict=True)
    )
    stacked = np.stack(pictures).reshape(-1, 3)
    assert (stacked.min(axis=0) < 30).all()
    assert (stacked.max(axis=0) > 225).all()
    # Scaling a token changes nothing: the losses compare unit vectors.
    assert (basis.colours(3 * views[0], shape.grid) == pictures[0]).all()


def test_errors_of_tokens_equal_numbers_worked_by_hand() -> None:
    live = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], np.float32)
    stored = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    errors = token_errors(stored, live)
    assert errors.tolist() == [0.0, 0.25, 1.0]
    colours = heat(errors, 1.0, (1, 3))
    assert colours.shape == (1, 3, 3)
    assert colours[0, 0].sum() < colours[0, 1].sum() < colours[0, 2].sum()


def test_the_label_is_marked_by_the_teachers_class_and_not_by_its_name(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    """Labels are cats and dogs, 0 and 1; the teacher calls them dog (0) and felis (1)."""
    (tmp_path / "names.txt").write_text("dog\nfelis\n")
    (tmp_path / "map.txt").write_text("felis\ndog\n")
    cache = _cache(
        *(run, photos, tmp_path / "cache", "--teacher-classes", tmp_path / "names.txt"),
        *("--class-map", tmp_path / "map.txt"),
    )
    output = tmp_path / "c.html"
    assert run("cache", "show", cache, "--output", output).code == 0
    text = output.read_text(encoding="utf-8")
    for article in text.split("<article")[1:]:
        label = "felis" if "<h3>cats/" in article else "dog"
        marked = re.findall(r'<tr class="is-label"><td>(\w+)<', article.split("</article>")[0])
        assert marked == [label]
