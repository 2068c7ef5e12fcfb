"""Command line of scalekd; each command is imported when it is called."""

import importlib
import signal
import sys
from collections.abc import Sequence

import click

from scalekd import __version__
from scalekd.cli._output import complain, complain_of_usage, escaping, show_traceback
from scalekd.errors import EnvironmentFault, ScaleKDError, advice_on
from scalekd.pipelines._signals import Terminated

_COMMANDS = {
    "cache-teacher": ("cache_teacher", "Run a teacher once and write its features and logits."),
    "train-student": ("train_student", "Train a student from a cache."),
    "evaluate": ("evaluate", "Measure a trained student or any timm model."),
    "export": ("export", "Write a trained student for use elsewhere."),
    "report": ("report", "Compare training runs on one page with their curves."),
    "demo": ("demo", "Train teacher and students on scikit-learn's digits, in a few minutes."),
    "recipes": ("recipes", "List the published teacher-student pairs."),
    "doctor": ("doctor", "Check this machine, and that it redraws a cache's views exactly."),
    "models": ("models", "List the teachers and students known by a short name."),
}
_CACHE_COMMANDS = {
    "ls": ("cache_ls", "List the caches below a folder or in a bucket."),
    "info": ("cache_info", "Describe a cache."),
    "verify": ("cache_verify", "Check every byte of a cache."),
    "convert": ("cache_convert", "Write a cache in its other form: Zarr arrays or tars."),
    "repair": ("cache_repair", "Write damaged and missing files again, with the same bytes."),
    "extend": ("cache_extend", "Add passes, stages, or another teacher's targets."),
    "merge": ("cache_merge", "Join parts that were written on different machines."),
    "push": ("cache_push", "Send a cache, or a part of it, to another location."),
    "pull": ("cache_pull", "Fetch a cache, or a part of it."),
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
        command: click.Command = module.command
        return command

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
    with escaping():
        code = _run(arguments)
    if code:
        sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command line and return its exit code."""
    try:
        group.main(args=arguments, prog_name="scalekd", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        complain_of_usage(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort, Terminated) as stop:
        complain("interrupted; committed work is kept, and the same command continues from there")
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except ScaleKDError as error:
        complain(str(error))
        return error.exit_code
    except OSError as error:
        advice = advice_on(error)
        complain(f"{error} ({advice})" if advice else f"{type(error).__name__}: {error}")
        return EnvironmentFault.exit_code
    except Exception as error:  # a bug; the text may quote a document
        show_traceback(error)
        return 1
    return 0


if __name__ == "__main__":
    main()
