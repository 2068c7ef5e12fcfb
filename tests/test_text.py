"""Text that others wrote, as it is shown."""

import html.parser
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalekd import text
from scalekd.errors import CacheCorrupt

HOSTILE = {
    "a newline": ("cat\nscalekd: error: pay", r"cat\nscalekd: error: pay"),
    "a carriage return": ("cat\rdog", r"cat\rdog"),
    "a colour": ("\x1b[31mcat", r"\x1b[31mcat"),
    "a link (OSC 8)": ("\x1b]8;;http://evil\x07cat", r"\x1b]8;;http://evil\x07cat"),
    "C1": ("\x9b31mcat\x85", r"\x9b31mcat\x85"),
    "NUL and DEL": ("c\0a\x7ft", r"c\x00a\x7ft"),
    "a directional override": ("\u202egpj.exe", r"\u202egpj.exe"),
    "a directional isolate": ("\u2066cat\u2069", r"\u2066cat\u2069"),
    "zero width": ("c\u200ba\u2060t\ufeff\u00ad", r"c\u200ba\u2060t\ufeff\xad"),
    "invisible and printable": ("c\u034fa\u3164t\ufe0f", r"c\u034fa\u3164t\ufe0f"),
    "separators of lines": ("cat\u2028dog\u2029", r"cat\u2028dog\u2029"),
    "tags": ("cat\U000e0041", r"cat\U000e0041"),
    "a lone surrogate": ("cat\udcff", r"cat\udcff"),
    "a wide space": ("cat\u3000dog\xa0", "cat dog "),
}


@pytest.mark.parametrize(("given", "shown"), HOSTILE.values(), ids=list(HOSTILE))
def test_invisible_characters_are_written_as_escapes(given: str, shown: str) -> None:
    assert text.printable(given) == shown


@pytest.mark.parametrize(
    "given", ["swin_l", "n01440764 tench, Tinca tinca", "Käsespätzle", "猫", "a\\b", "🐈", "–·±…"]
)
def test_visible_characters_are_unchanged(given: str) -> None:
    assert text.printable(given) == given


@given(st.text(st.characters()), st.integers(8, 60))
def test_a_printable_line_is_bounded_and_has_only_visible_characters(
    given: str, limit: int
) -> None:
    shown = text.printable(given, limit=limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
    assert text.printable(shown, limit=limit) == shown
    shown.encode()


def test_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = text.printable("first " + 10**6 * "x" + " last")
    assert len(shown) == text.MAX_LINE
    assert shown.startswith("first x")
    assert shown.endswith("x last")
    assert "x…x" in shown
    assert len(text.printable(10**6 * "\x1b")) == text.MAX_LINE


def test_an_error_is_one_line_of_visible_characters() -> None:
    assert str(CacheCorrupt("class\n  'a\x1b[2Jb'\u202e")) == r"class 'a\x1b[2Jb'\u202e"
    assert len(str(CacheCorrupt(10**6 * "x"))) == text.MAX_LINE


MARKUP = [
    "a|b",
    "`a` ``b``",
    "``` c",
    "[click](http://evil)",
    "![x](http://evil/x.png)",
    "<script>alert(1)</script>",
    "<!-- ",
    "**bold** _italic_ ~~struck~~ $x$",
    "a\\|b",
    "&lt;b&gt;",
    "\n\n# heading\n---\n",
    "| --- |\n| x |",
]


@pytest.mark.parametrize("given", MARKUP)
@pytest.mark.parametrize("written", [text.markdown, text.markdown_code], ids=["text", "code"])
def test_markdown_shows_text_as_it_is(given: str, written: object) -> None:
    """As an implementation of CommonMark with tables renders it."""
    markdown_it = pytest.importorskip("markdown_it")
    page = f"| | |\n| --- | --- |\n| a | {written(given)} |\n| z | end |\n"  # type: ignore[operator]
    html = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(page)
    seen = _Seen(html)
    allowed = {"table", "thead", "tbody", "tr", "th", "td"}
    assert seen.tags - allowed == ({"code"} if written is text.markdown_code else set())
    expected = " ".join(given.split())
    assert [cell.strip() for cell in seen.cells[2:]] == ["a", expected, "z", "end"]


class _Seen(html.parser.HTMLParser):
    """The tags of a page and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.strip("\n")


def test_names_of_models_need_no_backslash_in_markdown() -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    assert text.markdown(name) == name
    assert text.markdown("_x_ y_") == r"\_x\_ y\_"


def test_html_is_text() -> None:
    assert text.html('<b a="x">\'&\x1b\u202e') == (
        r"&lt;b a=&quot;x&quot;&gt;&#x27;&amp;\x1b\u202e"
    )
    assert len(text.html(10**6 * "x")) == text.MAX_LINE


def test_a_fence_is_longer_than_any_run_inside() -> None:
    assert text.markdown_fence("a") == "```"
    assert text.markdown_fence("a ```` b ``") == "`````"


@pytest.mark.parametrize(
    ("number", "noun", "written"),
    [
        (1, "pass", "1 pass"),
        (2, "pass", "2 passes"),
        (0, "shard", "0 shards"),
        (1, "shard", "1 shard"),
        (1_281_167, "sample", "1,281,167 samples"),
    ],
)
def test_a_count_has_the_noun_in_its_number(number: int, noun: str, written: str) -> None:
    assert text.counted(number, noun) == written
