"""``scalekd demo``."""

from typing import TYPE_CHECKING

from scalekd.cli._output import echo
from scalekd.cli._record import record_command
from scalekd.errors import UsageError
from scalekd.pipelines._run_options import DemoConfig

if TYPE_CHECKING:
    from scalekd.pipelines.demo import DemoResult


@record_command("demo", DemoConfig)
def command(config: DemoConfig) -> "DemoResult":
    """Train a teacher, write its cache and train nine students on scikit-learn's digits.

    Takes about a minute and a half on two cores, and leaves at most 50 MB in --output.
    """
    import shutil

    output = config.output
    if output.exists() and any(output.iterdir()):
        if not config.overwrite or not (output / "data").is_dir():
            raise UsageError(
                f"{output} is not empty; choose another --output, or --overwrite a demo"
            )
        shutil.rmtree(output)
    echo("· loading PyTorch", err=True)
    from scalekd.pipelines.demo import default_processes, run_demo

    return run_demo(
        output, processes=default_processes(), say=lambda line: echo(f"· {line}", err=True)
    )
