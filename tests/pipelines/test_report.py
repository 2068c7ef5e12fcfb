"""``scalekd report``: what the page says of runs, from the files that runs keep."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from scalekd.cli.main import main
from scalekd.errors import DataError, UsageError
from scalekd.pipelines.report import report
from scalekd.training.config import TrainConfig
from scalekd.training.logs import EpochSummary


def _write_run(
    folder: Path, top1: list[float] | None, *, seed: int = 0, objective: str = "kd", lr: float = 0.1
) -> Path:
    folder.mkdir(parents=True)
    config = TrainConfig(
        model="resnet18", objective=objective, lr=lr, seed=seed, output=str(folder), workers=0
    )
    (folder / "args.yaml").write_text(config.to_yaml())
    summary = EpochSummary(folder / "summary.csv")
    for epoch, score in enumerate(top1 or [0.0, 0.0]):
        row = {"epoch": epoch, "train_loss": 2.0 - epoch, "train_task_loss": 1.0 / (epoch + 1)}
        row |= {"samples_viewed": 100 * (epoch + 1), "seconds": 7.5}
        summary.write(row | ({"eval_top1": score} if top1 else {}))
    return folder


class _Cells(HTMLParser):
    """Rows of the page's table, and every address that it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "td"
        self.loads += [v or "" for k, v in attrs if k == "src" or (tag == "link" and k == "href")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def _cells(page: Path) -> _Cells:
    parser = _Cells()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_seeds_make_one_row_with_mean_and_standard_deviation(tmp_path: Path) -> None:
    for seed, last in enumerate((50.0, 54.0, 58.0)):
        _write_run(tmp_path / f"kd-{seed}", [60.0, last], seed=seed)
    _write_run(tmp_path / "none-0", [10.0, 12.5], objective="none")
    found = report([tmp_path], tmp_path / "page.html")
    kd, none = found.rows
    assert (kd.name, none.name) == ("kd", "none")
    assert (kd.top1, kd.top1_spread, kd.best_top1) == (54.0, 4.0, 60.0)
    assert (none.top1, none.top1_spread) == (12.5, None)
    assert (kd.epochs, kd.samples_viewed, kd.seconds) == (2, 200, 15.0)
    page = _cells(tmp_path / "page.html")
    assert page.rows[1][0] == "kd"
    assert page.rows[1][3:8] == ["3", "2", "200", "54.00 ± 4.00 %", "60.00 %"]
    assert page.loads == []


def test_a_folder_at_the_output_is_not_replaced(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", [1.0])
    with pytest.raises(UsageError, match="is a folder"):
        report([run], tmp_path)


def test_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    runs = [_write_run(tmp_path / f"r{lr}", [1.0], lr=lr) for lr in (0.1, 0.2)]
    found = report(runs, tmp_path / "page.html")
    assert [row.name for row in found.rows] == ["kd, lr=0.1", "kd, lr=0.2"]


def test_a_run_without_validation_says_so(tmp_path: Path) -> None:
    found = report([_write_run(tmp_path / "run", None)], tmp_path / "page.html")
    assert found.rows[0].top1 is None
    assert _cells(tmp_path / "page.html").rows[1][6] == "not validated"


def test_names_from_a_run_are_text_not_markup(tmp_path: Path) -> None:
    runs = [_write_run(tmp_path / f"<script>{n}", [1.0], lr=n) for n in (1, 2)]
    report(runs, tmp_path / "page.html")
    assert not re.search(r"<script", (tmp_path / "page.html").read_text())


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", [1.0, 2.0])
    pages = []
    for name in ("a.html", "b.html"):
        report([run], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "neither a training run nor a folder of runs"),
        ("", 3, "not the summary of a run"),
        ("epoch,samples_viewed\n0,many\n", 3, "not the summary of a run"),
        ("epoch,samples_viewed,seconds\n0,10,1\n", 3, "has no train_loss"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line_and_an_exit_code(
    content: str | None,
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    if content is None:
        run.mkdir()
    else:
        _write_run(run, [1.0])
        (run / "summary.csv").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--output", str(tmp_path / "page.html")])
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_the_command_prints_json_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _write_run(tmp_path / "run", [1.0])
    main(["report", str(run), "--output", str(tmp_path / "page.html"), "--json"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"][0]["top1"] == 1.0


def test_the_folder_of_the_page_is_created(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", [1.0, 2.0])
    report([run], tmp_path / "new/folder/page.html")
    assert (tmp_path / "new/folder/page.html").is_file()


SUMMARY = "epoch,train_loss,train_task_loss,samples_viewed,seconds\n0,1,1,100,1\n"


@pytest.mark.parametrize(
    "name",
    [
        "$\\frac{$",
        "$x$",
        "_hidden",
        "<script>",
        "\x1b[31mred",
        "\u202eevil",
        "模型",
        "x" * 5000,
        "a\nb",
    ],
)
def test_any_name_is_shown_as_text(tmp_path: Path, name: str) -> None:
    one = _write_run(tmp_path / "one", [50.0])
    two = _write_run(tmp_path / "two", [60.0])
    config = TrainConfig(model=name, objective="kd", output="o", lr=0.1, workers=0)
    (two / "args.yaml").write_text(config.to_yaml())
    result = report([one, two], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    picture = re.search(r"<svg.*</svg>", page, re.DOTALL)
    assert picture
    ElementTree.fromstring(picture[0])
    assert "<script" not in page
    assert "\x1b" not in page
    assert all(len(row.name) <= 200 for row in result.rows)
    # The legend shows both, whatever their names.
    assert picture[0].count("kd, model=") == 2 or picture[0].count("kd (") == 2


@pytest.mark.parametrize(
    "text",
    [
        SUMMARY.replace("0,1,1,100,1", "0,1,1,inf,1"),
        SUMMARY.replace("0,1,1,100,1", "0,nan,1,100,1"),
        SUMMARY.replace("0,1,1,100,1", f"0,{'1' * 200_000},1,100,1"),
        SUMMARY.replace("0,1,1,100,1", "0,1,1,1e300,1"),
        SUMMARY.replace("epoch,", "").replace("0,", "", 1),
        SUMMARY.replace("0,1,1,100,1", ""),
        SUMMARY + "\0,\0\n",
        "",
    ],
)
def test_a_damaged_summary_is_one_line(tmp_path: Path, text: str) -> None:
    run = _write_run(tmp_path / "run", [50.0])
    (run / "summary.csv").write_text(text)
    with pytest.raises(DataError, match=r"summary\.csv: ") as caught:
        report([run], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "row",
    ["0,1,0,100,1", "0,0,-1,100,1", "0,1e29,1e29,100,1", "9007199254740993,1,1,100,1", "0,1,,1,1"],
)
def test_odd_but_possible_rows_make_a_page(tmp_path: Path, row: str) -> None:
    runs = [_write_run(tmp_path / str(number), None, seed=number) for number in range(2)]
    (runs[0] / "summary.csv").write_text(SUMMARY.replace("0,1,1,100,1", row))
    assert len(report(runs, tmp_path / "report.html").rows) == 1


@pytest.mark.parametrize("text", ["[" * 5000, "a: &a [*a]", "\x00", "[]", "model: 1", "x: 1"])
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    run = _write_run(tmp_path / "run", [50.0])
    (run / "args.yaml").write_text(text)
    with pytest.raises(DataError, match=r"args\.yaml") as caught:
        report([run], tmp_path / "report.html")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", "\x00", '{"format_version": 2}'])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, text: str) -> None:
    run = _write_run(tmp_path / "run", [50.0])
    (run / "last").mkdir()
    (run / "last/state.json").write_text(text)
    with pytest.raises(DataError, match="last: ") as caught:
        report([run], tmp_path / "report.html")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cache.html", "a page?.html", 'x"><script>.html'])
def test_the_page_of_the_cache_is_linked(tmp_path: Path, name: str) -> None:
    run = _write_run(tmp_path / "runs" / "a", [1.0])
    output = tmp_path / "pages" / "report.html"
    report([run], output)
    assert "<a " not in output.read_text()
    page = output.with_name(name)
    page.write_text("the cache")
    report([run], output, cache_page=None if name == "cache.html" else page)
    addresses = re.findall(r'<a href="([^"]*)">', output.read_text())
    assert len(addresses) == 1
    assert (output.parent / unquote(addresses[0])).read_text() == "the cache"
    assert "<script" not in output.read_text()


def test_a_page_of_the_cache_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "runs" / "a", [1.0])
    with pytest.raises(DataError, match="scalekd cache show CACHE"):
        report([run], tmp_path / "report.html", cache_page=tmp_path / "none.html")
