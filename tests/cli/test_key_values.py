"""Values of ``key=value`` options, which every command reads alike."""

from collections.abc import Callable
from typing import Any

import click
import pytest

from scalekd.cli._options import KeyValue, parse_value
from scalekd.cli.main import group


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, False) for text in ("false", "False", "FALSE", "no", "off", " false ")],
        *[(text, True) for text in ("true", "True", "yes", "on")],
        *[(text, None) for text in ("null", "none", "None", "~")],
        ("3", 3),
        ("0", 0),
        ("-1.5", -1.5),
        ("1e-3", 1e-3),
        ("[2, 2]", [2, 2]),
        ("(2, 2)", (2, 2)),
        ("[true, avg, 1]", [True, "avg", 1]),
        ("[true, [no, 2]]", [True, [False, 2]]),
        ("'false'", "false"),
        ("avg", "avg"),
        ("010", "010"),  # neither eight nor ten for certain
        ("16:9", "16:9"),
        ("a=b", "a=b"),
        ("", ""),
        ("[", "["),
    ],
)
def test_values_are_read_as_yaml_reads_them(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def _options(name: str) -> list[tuple[str, click.Parameter]]:
    """Every option of the name, of every command."""

    def walk(command: click.Command, path: str) -> list[tuple[str, click.Parameter]]:
        if isinstance(command, click.Group):
            context = click.Context(command)
            return [
                pair
                for inner in command.list_commands(context)
                if (found := command.get_command(context, inner)) is not None
                for pair in walk(found, f"{path} {inner}")
            ]
        return [(path, option) for option in command.params if name in option.opts]

    return walk(group, "scalekd")


@pytest.mark.parametrize("name", ["--model-kwargs", "--opt-args", "--distillation"])
def test_every_command_reads_them_with_one_parser(name: str) -> None:
    options = _options(name)
    assert len(options) >= (4 if name == "--model-kwargs" else 1)
    for path, option in options:
        assert isinstance(option.type, KeyValue), path
        key, value = option.type.convert("bias=false", option, None)
        assert (key, value) == ("bias", False), path


def test_only_settings_of_the_objective_have_dotted_names() -> None:
    assert KeyValue(dotted=True).convert("stage3.heads=2", None, None) == ("stage3.heads", 2)
    for text in ("stage3.heads=2", "heads", "=2", "a b=1"):
        with pytest.raises(click.BadParameter, match="key=value"):
            KeyValue().convert(text, None, None)


def test_names_of_teachers_may_have_hyphens_and_dots() -> None:
    assert KeyValue(dotted=True).convert("dino-v3.2.weight=0.5", None, None) == (
        "dino-v3.2.weight",
        0.5,
    )
    for bad in (".weight=1", "a..b=1", "a.=1", "a b.c=1"):
        with pytest.raises(click.BadParameter):
            KeyValue(dotted=True).convert(bad, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr -1", "--lr: Input should be greater than 0 (got -1.0)"),
        ("--layer-decay 3", "--layer-decay: Input should be less than or equal to 1 (got 3.0)"),
        ("--distillation kd_alpha=2", "--distillation kd_alpha: Input should be less than"),
        ("--distillation stage4.spatial_weight=-1", "--distillation stage4.spatial_weight: Input"),
        ("--distillation summry=direction", "--distillation: unknown key 'summry'; did you mean"),
        ("--distillation stage4.heads=2", "--distillation: unknown key 'stage4.heads'; did you"),
        ("--targets base,b.c --distillation b.c.wieght=2", "--distillation: b.c.wieght: Extra"),
        ("--epochs 0 --recipe swin_l-resnet50", "--epochs: Input should be greater than or equal"),
    ],
)
def test_a_value_of_train_student_is_refused_by_the_name_of_its_option(
    run: Callable[..., Any], options: str, message: str
) -> None:
    ran = run("train-student", "--model", "resnet18", "--output", "run", *options.split())
    assert ran.code == 2
    assert message in ran.err
    assert "the options" not in ran.err
    assert "is not possible" not in ran.err


def test_a_missing_option_of_train_student_is_named(run: Callable[..., Any]) -> None:
    assert "--model is missing" in run("train-student", "--output", "run").err
