"""The documentation site: it builds without a warning, and its links resolve."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
GROUPS = ["Tutorials", "How-to guides", "Reference", "Explanation"]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attrs}
        self.ids |= {facts[name] for name in ("id", "name") if name in facts}
        if tag == "a" and "href" in facts:
            self.links.append(facts["href"])
        if tag in ("img", "script", "iframe") and "src" in facts:
            self.loaded.append(facts["src"])
        if tag == "link" and facts.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(facts["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("needs the extra docs: mkdocs-material and mkdocstrings-python")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_links_and_pictures_of_the_site_resolve(site: Path) -> None:
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                assert link in page.links, f"{path.name} loads {link} from elsewhere"
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = target.resolve()
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__"}, f"{path.name}: {link}"


@pytest.mark.slow
def test_the_reference_has_every_command_and_option(site: Path) -> None:
    from scalekd.cli.main import group
    from tests.cli.test_options import commands

    text = (site / "command-line.html").read_text(encoding="utf-8")
    sections = re.split(r'<h2 id="scalekd-', text)[1:]
    by_command = {re.split(r'"', section)[0]: section for section in sections}
    listed = dict(commands(group))
    assert by_command.keys() == {path.replace(" ", "-") for path in listed}
    for path, command in listed.items():
        section = by_command[path.replace(" ", "-")]
        for parameter in command.params:
            for name in parameter.opts if parameter.param_type_name == "option" else ():
                assert re.search(rf"{re.escape(name)}(?![\w-])", section), (path, name)


def test_pages_are_in_four_groups_and_each_page_once() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["nav"][1:]
    assert [next(iter(entry)) for entry in entries] == GROUPS
    pages = [
        page
        for entry in entries
        for each in entry.values()
        for row in each
        for page in row.values()
    ]
    assert len(set(pages)) == len(pages)
    generated = {"command-line.md"}
    assert {page for page in pages if not (REPOSITORY / "docs" / page).is_file()} == generated


def test_the_readme_links_to_pages_that_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    links = re.findall(r"\]\(([^)#]+)", text)
    local = [link for link in links if "://" not in link]
    assert len(local) > 10
    assert [link for link in local if not (REPOSITORY / link).exists()] == []
