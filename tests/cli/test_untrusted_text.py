"""Nothing that a document, a folder's name or a library says can steer the terminal."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard

import scalekd.cli
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import FileDigest, Manifest, Plan, ShardRecord
from scalekd.cache.sharing.card import dataset_card
from scalekd.cli import main as main_module
from scalekd.cli._output import print_result
from scalekd.errors import CacheCorrupt

Run = Callable[..., Any]

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31m\rspoof\nscalekd: error: pay\x9b1m\u2028\u202egpj\u200b\0 "
    "| `x` [a](http://evil) <script>alert(1)</script>\n---\nlicense: mit\n"
)


def hostile_copy(cache: Path, text: str) -> Path:
    """Write ``text`` wherever the documents of a cache take free text, and reseal it."""
    manifest = Manifest.model_validate_json((cache / "manifest.json").read_bytes())
    old = manifest.plan
    environment = {**old.identity.views.environment, "python": text}
    identity = old.identity.model_copy(
        update={
            "teacher": {**old.identity.teacher, "model": text[:400]},  # longer is refused
            "views": old.identity.views.model_copy(update={"environment": environment}),
        }
    )
    provenance = old.provenance.model_copy(
        update={"note": text, "licence": text, "software": {"torch": text}}
    )
    plan = Plan.of(identity, provenance)
    records = {}
    for name in manifest.records:
        record = ShardRecord.model_validate_json((cache / name).read_bytes())
        data = canonical(record.model_copy(update={"cache_id": plan.cache_id}))
        (cache / name).write_bytes(data)
        records[name] = _sha256(data)
    (cache / "plan.json").write_bytes(canonical(plan))
    digest = FileDigest(num_bytes=len(canonical(plan)), sha256=_sha256(canonical(plan)))
    grown = digest.num_bytes - manifest.files["plan.json"].num_bytes
    sealed = manifest.model_copy(
        update={
            "plan": plan,
            "records": records,
            "files": {**manifest.files, "plan.json": digest},
            "total_bytes": manifest.total_bytes + grown,
        }
    )
    (cache / "manifest.json").write_bytes(canonical(sealed.sealed()))
    return cache


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def assert_harmless(shown: str) -> None:
    bad = {c for c in shown if not c.isprintable() and c != "\n"}
    assert not bad, [unicodedata.name(c, repr(c)) for c in bad]
    assert all(len(line) <= 2100 for line in shown.split("\n"))
    assert not [line for line in shown.split("\n") if line.startswith("scalekd: error: pay")]


@pytest.mark.parametrize("text", [HOSTILE, 2 * 10**5 * "long\x1b"], ids=["hostile", "long"])
def test_text_of_a_cache_cannot_control_the_terminal(
    text: str, cache_copy: Path, run: Run, tiny_images: Path, tmp_path: Path
) -> None:
    cache = hostile_copy(cache_copy, text)
    shown = []
    for arguments in (
        ("info", cache),
        ("ls", tmp_path),
        ("verify", "--deep", 1, "--data-dir", tiny_images, cache),
        ("pull", cache, tmp_path / "pulled"),
        ("repair", cache),
        ("extend", cache, "--data-dir", tiny_images, "--passes", 3),
        ("convert", cache, tmp_path / "tars", "--format", "webdataset"),
    ):
        ran = run("cache", *arguments)
        shown.append(ran.out + ran.err)
    train = ("--model", "test_resnet", "--output", tmp_path / "run", "-j", 0)
    for arguments in (
        ("doctor", "--cache", cache),
        ("train-student", "--cache", cache, "--data-dir", tiny_images, "--online", *train),
        ("evaluate", "test_resnet", "--data-dir", tiny_images, "--teacher-cache", cache),
    ):
        ran = run(*arguments)
        shown.append(ran.out + ran.err)
    for output in shown:
        assert_harmless(output)
        assert len(output) < 30_000
    escaped = r"\x1b" if text is HOSTILE else "long"
    assert sum(escaped in output for output in shown) >= 5
    ran = run("cache", "info", cache, "--json")
    assert ran.out.isascii()
    assert ran.out.removesuffix("\n").isprintable()
    assert ran.json["note"] == text


def test_the_name_of_a_folder_cannot_control_the_terminal(cache_copy: Path, run: Run) -> None:
    folder = cache_copy.rename(cache_copy.with_name("a\nscalekd: error: pay\x1b[31m\u202e"))
    odd = Path(os.fsdecode(bytes(folder.with_name("b")) + b"\xff"))
    odd.mkdir()
    for arguments in (
        ("cache", "info", folder),
        ("cache", "info", odd),
        ("cache", "ls", folder.parent),
        ("cache", "info", "a", folder),
        ("cache", folder.name),
        ("report", odd),
        ("evaluate", odd, "--data-dir", folder),
        ("export", folder, "--output", odd),
        ("cache-teacher", "--model", folder.name, "--data-dir", odd, "--output", odd),
        ("cache-teacher", "--model-kwargs", folder.name),
        ("train-student", "--recipe", folder),
    ):
        ran = run(*arguments)
        assert_harmless(ran.out + ran.err)
        assert r"\x1b" in ran.out + ran.err or r"\udcff" in ran.out + ran.err


def test_a_card_shows_text_of_a_cache_without_markup(cache_copy: Path) -> None:
    cache = hostile_copy(cache_copy, HOSTILE)
    manifest = Manifest.model_validate_json((cache / "manifest.json").read_bytes())
    card = dataset_card(manifest.plan, manifest, "hf://datasets/lab/cache")
    assert_harmless(card)
    metadata = DatasetCard(card).data
    assert metadata.license == "other"
    assert r"\x1b]0;owned" in metadata.license_name
    assert r"\x1b]0;owned" in metadata.pretty_name
    body = DatasetCard(card).text
    assert "<script" not in re.sub("`+ .*? `+", "", body)
    assert not re.search(r"(?<!\\)\]\(http://evil\)", re.sub("`+ .*? `+", "", body))
    long = hostile_copy(cache, 10**5 * "x")
    manifest = Manifest.model_validate_json((long / "manifest.json").read_bytes())
    assert len(dataset_card(manifest.plan, manifest, "hf://datasets/lab/cache")) < 10_000


def test_a_traceback_is_printed_with_control_characters_escaped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise KeyError(HOSTILE) from ValueError(HOSTILE)

    monkeypatch.setattr(main_module.group, "main", fail)
    ran = run("models")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "in fail" in ran.err
    assert not [c for c in ran.err if not c.isprintable() and c != "\n"]


def test_warnings_and_log_records_of_libraries_are_escaped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = warnings.formatwarning, logging.getLogRecordFactory()
    seen = []

    def speak(**options: Any) -> None:
        seen.append(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "file.py", 1, ""))
        record = logging.getLogRecordFactory()
        seen.append(record("timm", 30, "file.py", 1, "%s", (HOSTILE,), None).getMessage())
        raise CacheCorrupt(HOSTILE)

    monkeypatch.setattr(main_module.group, "main", speak)
    ran = run("models")
    assert ran.code == 4
    for text in (*seen, ran.err):
        assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert before == (warnings.formatwarning, logging.getLogRecordFactory())


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_output_works_in_any_terminal_encoding(
    environment: dict[str, str], cache_copy: Path
) -> None:
    cache = hostile_copy(cache_copy, "é – … 猫")
    cache = cache.rename(cache.with_name("κρύπτη–猫"))
    program = (
        "import sys; from scalekd.cli.main import main\n"
        "for name in ('info', 'ls'): main(['cache', name, sys.argv[1]])\n"
        "main(['cache', 'info', sys.argv[1] + '-missing'])"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    ended = subprocess.run(
        [sys.executable, "-c", program, cache],
        env={**inherited, **environment},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.startswith(b"scalekd: error: ")
    assert ended.stderr.count(b"\n") == 1
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    shown = ended.stdout.decode(encoding)
    assert r"\u732b" in shown


def test_every_line_goes_through_one_function() -> None:
    folder = Path(scalekd.cli.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    writing = r"click\.(secho|echo)|\bprint\(|sys\.std(out|err)|\.show\("
    assert [name for name, text in sources.items() if re.search(writing, text)] == ["_output.py"]


class _Noted(dict[str, str]):
    def lines(self) -> list[str]:
        return [self["note"]]


def test_json_is_ascii_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(map(chr, range(256))) + "\u202e\udcff"
    print_result(_Noted(note=text), as_json=True)
    line = capsys.readouterr().out
    assert line.removesuffix("\n").isascii()
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line) == {"note": text}
