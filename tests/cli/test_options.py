"""The command line's options: none is lost or renamed, and each is described by a sentence.

``options.json`` lists options by command, as they were. ``python tests/cli/test_options.py`` writes
it anew, after an option was added or a default was moved on purpose.
"""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import click
import pytest
from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from scalekd.cli._output import Reported
from scalekd.cli._record import GroupedCommand, given, record_command, record_options
from scalekd.cli.main import group
from scalekd.errors import CacheCorrupt, UsageError
from scalekd.options import Options
from scalekd.training.config import TrainConfig

OPTIONS = Path(__file__).with_name("options.json")


def commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, f"{path} {name}".strip())
    else:
        yield path, command


def described(parameter: click.Parameter) -> dict[str, Any]:
    default = parameter.to_info_dict()["default"]
    facts: dict[str, Any] = {"names": [*parameter.opts, *parameter.secondary_opts]}
    if default not in (None, False, ()) and "UNSET" not in repr(default).upper():
        facts["default"] = (
            default if isinstance(default, bool | int | float | str) else str(default)
        )
    if getattr(parameter, "shown_default", None):
        facts["shown"] = parameter.shown_default  # type: ignore[attr-defined]
    if parameter.required:
        facts["required"] = True
    if parameter.multiple:
        facts["multiple"] = True
    if isinstance(parameter.type, click.Choice):
        facts["choices"] = list(parameter.type.choices)
    return facts


def current() -> dict[str, list[dict[str, Any]]]:
    return {
        path: sorted(map(described, command.params), key=lambda facts: str(facts["names"]))
        for path, command in commands(group)
    }


def test_options_and_defaults_are_those_recorded() -> None:
    written, found = json.loads(OPTIONS.read_text(encoding="utf-8")), current()
    assert found.keys() >= written.keys()
    for path, options in written.items():
        here = {name: facts for facts in found[path] for name in facts["names"]}
        for facts in options:
            same = {id(here[name]) for name in facts["names"]}
            assert len(same) == 1, (path, facts)
            now = here[facts["names"][0]]
            assert set(facts.pop("choices", ())) <= set(now.get("choices", ())), (path, facts)
            assert set(facts.pop("names")) <= set(now["names"]), (path, facts)
            if "default" in facts and now.get("shown"):
                default = facts.pop("default")
                assert now["shown"] == ("on" if default is True else str(default)), (path, now)
            assert facts == {name: now.get(name) for name in facts}, path


FROM_RECORDS = {
    "cache export": ["scalekd.pipelines._cache_options.ExportTargetsConfig"],
    "cache show": ["scalekd.pipelines._source_options.ShowConfig"],
    "cache extend": ["scalekd.pipelines._source_options.ExtendConfig"],
    "cache verify": ["scalekd.pipelines._source_options.VerifyConfig"],
    "cache repair": ["scalekd.pipelines._source_options.RepairConfig"],
    "evaluate": ["scalekd.pipelines._run_options.EvaluateConfig"],
    "train-student": ["scalekd.training.config.TrainConfig"],
    "cache-teacher": [
        "scalekd.pipelines._cache_options.TeacherOptions",
        "scalekd.pipelines._cache_options.CacheOptions",
    ],
    "cache convert": ["scalekd.pipelines._cache_options.ConvertConfig"],
    "cache push": ["scalekd.pipelines._cache_options.ShareConfig"],
    "cache pull": ["scalekd.pipelines._cache_options.ShareConfig"],
    "cache merge": ["scalekd.pipelines._cache_options.MergeConfig"],
    "cache ls": ["scalekd.pipelines._cache_options.ListConfig"],
    "cache info": ["scalekd.pipelines._cache_options.InfoConfig"],
    "doctor": ["scalekd.pipelines._source_options.DoctorConfig"],
    "export": ["scalekd.pipelines._run_options.ExportConfig"],
    "report": ["scalekd.pipelines._run_options.ReportConfig"],
    "demo": ["scalekd.pipelines._run_options.DemoConfig"],
    "recipes": ["scalekd.pipelines._run_options.RecipesConfig"],
    "models": ["scalekd.options.Options"],
}


NO_OPTIONS = {
    "cache verify": {"workers", "local_cache", "local_cache_size"},
    "cache show": {"workers"},
}
"""Fields of a command's record that are no options of it."""


def _fields(path: str) -> Iterator[tuple[str, Any]]:
    for record in FROM_RECORDS[path]:
        module, _, name = record.rpartition(".")
        for field, info in getattr(importlib.import_module(module), name).model_fields.items():
            if field not in NO_OPTIONS.get(path, ()):
                yield field, info


@pytest.mark.parametrize("path", FROM_RECORDS)
def test_a_mistyped_number_of_workers_does_not_fill_the_memory(path: str) -> None:
    for field, info in _fields(path):
        if field == "workers":
            adapter: TypeAdapter[object] = TypeAdapter(Annotated[info.annotation, info])
            assert adapter.validate_python(64) == 64
            with pytest.raises(ValidationError):
                adapter.validate_python(999_999)


@pytest.mark.parametrize("path", FROM_RECORDS)
def test_every_field_of_a_record_is_an_option_described_by_a_sentence(path: str) -> None:
    parameters = {parameter.name: parameter for parameter in dict(commands(group))[path].params}
    for field, info in _fields(path):
        parameter = parameters[field]
        if isinstance(parameter, click.Argument):
            continue
        assert isinstance(parameter, click.Option)
        assert (parameter.help or "").startswith(info.description.replace("\n", " "))
        sentence = re.sub(r"  \[default: [^]]+\]$", "", parameter.help or "")
        assert sentence[0].isupper(), (field, sentence)
        assert sentence.endswith("."), (field, sentence)
        assert len(sentence.split()) >= 2


def test_every_option_of_every_command_is_described_by_a_sentence() -> None:
    for path, command in commands(group):
        for option in command.params:
            if isinstance(option, click.Option):
                text = re.sub(r"\s*\[default[^]]*\]$", "", option.help or "")
                assert text.endswith("."), (path, option.opts, text)
                assert len(text.split()) >= 2, (path, option.opts, text)


def test_help_made_from_records_loads_no_torch() -> None:
    program = (
        "import sys; from scalekd.cli.main import main\n"
        f"for path in {list(FROM_RECORDS)!r}:\n"
        "    try: main([*path.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'zarr', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    pages = ended.stdout.decode().split("Usage: scalekd")[1:]
    assert len(pages) == len(FROM_RECORDS)
    for page in pages:  # --json and --help come last, and no row is without a text
        assert page.rindex("Other:") == max(map(page.rindex, re.findall(r"(?m)^\S.*:$", page)))
        assert not re.search(r"(?m)^  [A-Z]+$", page)


class _Numbers(Options):
    number: int = Field(ge=0)
    """Number of it."""


class _Inner(BaseModel):
    heads: int = 1


class _Record(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)
    headings: ClassVar[dict[str, str]] = {"rate": "Rates", "name": "Names"}

    name: str = "a"
    """Name of it."""
    kind: Literal["x", "y"] | None = None
    """Kind of it."""
    tags: tuple[str, ...] = ()
    """Tag of it."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Argument of it."""
    inner: _Inner = _Inner()
    """Setting of it."""
    rate: float = 0.5
    """Rate of it."""
    flag: bool = False
    """Switch it on."""
    betas: tuple[float, ...] = (0.9, 0.99)
    """Betas of it."""
    shards: tuple[int, int] | None = None
    """Range of it."""
    stages: tuple[Literal[3, 4], ...] = (3, 4)
    """Stages of it."""
    place: str | Path = "."
    """Place of it."""
    size: ByteSize = ByteSize(10**9)
    """Size of it."""


def test_a_records_fields_become_options() -> None:
    values: dict[str, Any] = {}

    @click.command("it", cls=GroupedCommand)
    @record_options(_Record)
    def it(**options: Any) -> None:
        values.update(given(options))

    it.main([], standalone_mode=False)
    assert values == {}
    line = (
        "--name b --kind y --tags p --tags q --extra k=false --extra l=1 --inner heads=3 --rate 0.1"
        " --no-flag --betas 0.5,0.6 --shards 2-3 --stages none"
        " --place /x --size 2GB"
    )
    it.main(line.split(), standalone_mode=False)
    assert values.pop("inner") == (("heads", 3),)
    assert values == {
        "name": "b",
        "kind": "y",
        "tags": ("p", "q"),
        "extra": {"k": False, "l": 1},
        "rate": 0.1,
        "flag": False,
        "betas": (0.5, 0.6),
        "shards": (2, 3),
        "stages": (),
        "place": "/x",
        "size": "2GB",
    }
    assert _Record(**values).size == 2 * 10**9
    with pytest.raises(click.BadParameter, match="'z' is not one of"):
        it.main(["--kind", "z"], standalone_mode=False)
    text = " ".join(it.get_help(click.Context(it)).split())
    assert text.index("Rates:") < text.index("--rate") < text.index("Names:") < text.index("--name")
    for default in ("[default: a]", "[default: 0.5]", "[default: 0.9,0.99]", "[default: 1GB]"):
        assert default in text
    assert text.count("[default") == 6


def test_both_names_of_a_checkpoint_are_one_option() -> None:
    every = dict(commands(group))
    for path in ("cache-teacher", "train-student", "evaluate", "cache extend", "cache repair"):
        options = [p for p in every[path].params if {"--checkpoint"} & set(p.opts)]
        assert [set(p.opts) for p in options] == [{"--checkpoint", "--initial-checkpoint"}], path


class _Judged(BaseModel):
    number: int

    def lines(self) -> list[str]:
        return [f"number {self.number}"]

    def failure(self) -> CacheCorrupt | None:
        return CacheCorrupt(f"{self.number} problems") if self.number else None


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_commands_result_is_printed_before_its_failure_is_raised(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @record_command("it", _Numbers, arguments=("number",))
    def it(config: _Numbers) -> _Judged:
        return _Judged(number=config.number)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    line = '{"number": 3}\n' if flags else "number 3\n"
    with pytest.raises(Reported, match="3 problems"):
        it.main(["3", *flags], standalone_mode=False)
    printed = capsys.readouterr().out
    if flags:
        error = json.loads(printed)["error"]
        assert (error["exit_code"], json.loads(printed)["number"]) == (4, 3)
    else:
        assert printed == line
    monkeypatch.setenv("LOCAL_RANK", "1")
    for rank, printed in (("1", ""), ("0", line.replace("3", "0"))):
        monkeypatch.setenv("RANK", rank)
        it.main(["0", *flags], standalone_mode=False)
        assert capsys.readouterr().out == printed
    with pytest.raises(UsageError, match="--number"):
        it.main(["--", "-1"], standalone_mode=False)


@pytest.mark.parametrize("name", ["--amp", "--precision"])
@pytest.mark.parametrize("value", ["fp32", "no"])
def test_both_names_of_precision_are_one_option(name: str, value: str) -> None:
    command = dict(commands(group))["train-student"]
    amp = command.make_context("train-student", [name, value]).params["amp"]
    assert TrainConfig(model="m", output="o", amp=amp).amp == "no"
    needed = ["--model", "m", "--data-dir", "d", "--output", "o"]
    command = dict(commands(group))["cache-teacher"]
    assert command.make_context("it", [*needed, name, value]).params["precision"] == "fp32"


if __name__ == "__main__":
    lines = [
        f"{json.dumps(path)}: [\n  " + ",\n  ".join(map(json.dumps, options)) + "\n ]"
        for path, options in current().items()
    ]
    OPTIONS.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
