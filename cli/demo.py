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

    Takes a few minutes on a CPU.
    """
    import shutil

    from scalekd.pipelines.demo import run_demo

    output = config.output
    if output.exists() and any(output.iterdir()):
        if not config.overwrite or not (output / "data").is_dir():
            raise UsageError(
                f"{output} is not empty; choose another --output, or --overwrite a demo"
            )
        shutil.rmtree(output)
    return run_demo(output, say=lambda line: echo(f"· {line}", err=True))
