"""``scalekd report``."""

from typing import TYPE_CHECKING

from scalekd.cli._record import record_command
from scalekd.pipelines._run_options import ReportConfig

if TYPE_CHECKING:
    from scalekd.pipelines.report import Report


@record_command("report", ReportConfig, arguments=("runs",))
def command(config: ReportConfig) -> "Report":
    """Compare training RUNS, or all runs in folders, on one page with their curves.

    Runs that differ only in their seed form one row.
    """
    from scalekd.pipelines.report import report

    return report(config.runs, config.output, cache_page=config.cache_page)
