"""Command line of scalekd; each command is imported when it is called."""

import importlib
import signal
import sys
from collections.abc import Sequence

import click

from scalekd import __version__
from scalekd.cli._output import (
    Reported,
    echo,
    emit_failure,
    escaping,
    print_error,
    show_traceback,
)
from scalekd.errors import (
    INTERNAL_ERROR,
    EnvironmentFault,
    ScaleKDError,
    TrainingInterrupted,
    UsageError,
    advice_on,
)
from scalekd.pipelines._notes import is_main_process
from scalekd.signals import Terminated
from scalekd.text import did_you_mean

_COMMANDS = {
    "cache-teacher": ("cache_teacher", "Run a teacher once and write its features and logits."),
    "train-student": ("train_student", "Train a student from a cache."),
    "evaluate": ("commands", "Measure a trained student or any timm model."),
    "export": ("commands", "Write a trained student for use elsewhere."),
    "report": ("commands", "Compare training runs on one page with their curves."),
    "demo": ("commands", "Train teacher and students on scikit-learn's digits, in a few minutes."),
    "recipes": ("commands", "List the published teacher-student pairs."),
    "doctor": ("commands", "Check this machine, and that it redraws a cache's views exactly."),
    "models": ("commands", "List the teachers and students known by a short name."),
}
"""Module and summary of each command; the module is imported when the command is called."""

_CACHE_COMMANDS = {
    name: ("cache_commands", summary)
    for name, summary in {
        "ls": "List the caches below a folder or in a bucket.",
        "info": "Describe a cache.",
        "show": "Write a page with a cache's views, features and answers.",
        "export": "Write decoded logits or features for other programs.",
        "verify": "Check every byte of a cache.",
        "convert": "Write a cache in its other form: Zarr arrays or tars.",
        "repair": "Write damaged and missing files again, with the same bytes.",
        "extend": "Add passes, stages, or another teacher's targets.",
        "merge": "Join parts that were written on different machines.",
        "push": "Send a cache, or a part of it, to another location.",
        "pull": "Fetch a cache, or a part of it.",
    }.items()
}


class _LazyGroup(click.Group):
    """Group that stores the names and summaries of its commands, and imports them when called."""

    def __init__(self, commands: dict[str, tuple[str, str]], **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._lazy = commands

    def list_commands(self, context: click.Context) -> list[str]:
        return [*self._lazy, *self.commands]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self._lazy:
            return super().get_command(context, name)
        module = importlib.import_module(f"scalekd.cli.{self._lazy[name][0]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(context, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(context))
            context.fail(f"No such command {args[0]!r}{hint or '; --help lists the commands'}")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, summary) for name, (_, summary) in self._lazy.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


group = _LazyGroup(
    _COMMANDS,
    name="scalekd",
    help="Offline teacher-feature caches, and students trained from them with ScaleKD.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
group = click.version_option(__version__, prog_name="scalekd")(group)
group.add_command(_LazyGroup(_CACHE_COMMANDS, name="cache", help="Inspect and maintain caches."))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors become one line and an exit code.

    Exit codes: 0 success, 2 usage, 3 input data, 4 cache integrity or mismatch, 5 environment,
    130 interrupted, 143 terminated.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with escaping():
        try:
            group.main(args=arguments, prog_name="scalekd", standalone_mode=False)
            return
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            for line in error.format_message().splitlines():
                echo(line, err=True)
            code = error.exit_code
        except Reported as reported:
            print_error(reported.failure)
            code = reported.failure.exit_code
        except (Exception, KeyboardInterrupt, Terminated) as error:
            failure = _failure(error)
            if failure is not error and failure.name == INTERNAL_ERROR:
                show_traceback(error)
            print_error(failure)
            if "--json" in arguments and is_main_process():
                emit_failure(failure)
            code = failure.exit_code
    if code:
        sys.exit(code)


def _failure(error: BaseException) -> ScaleKDError:
    """Return the error as which an exception is reported."""
    if isinstance(error, ScaleKDError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt | Terminated):
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return TrainingInterrupted(
            "interrupted; committed work is kept, and the same command continues from there",
            number,
        )
    if isinstance(error, click.ClickException):
        message = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message = f"{message.rstrip('.')}; see '{error.ctx.command_path} --help'"
        return UsageError(message)
    if isinstance(error, OSError):
        advice = advice_on(error)
        return EnvironmentFault(
            f"{error} ({advice})" if advice else f"{type(error).__name__}: {error}"
        )
    return ScaleKDError(f"{type(error).__name__}: {error}")  # a bug


if __name__ == "__main__":
    main()
