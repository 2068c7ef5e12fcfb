"""Experiment trackers, through Accelerate, beside the CSV and JSON lines that are always written.

Files of a tracker go into the run's folder, and no tracker needs the network: wandb runs offline
unless it is logged in or ``WANDB_MODE`` is set, mlflow writes to a database in the run's folder
unless ``MLFLOW_TRACKING_URI`` names a server. Trackio keeps its own store (``TRACKIO_DIR``).
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.text import did_you_mean

_PACKAGES = {"comet_ml": "comet-ml"}  # where the package to install is not called as the tracker


def check_trackers(names: Sequence[str]) -> None:
    """Raise before expensive work for trackers that Accelerate would silently ignore.

    Raises:
        UsageError: A tracker is unknown, or its package is not installed.
    """
    available = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UsageError(
                f"--log-with {name}: no such tracker; there are {known}"
                f"{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            package = _PACKAGES.get(name, name)
            raise UsageError(
                f"--log-with {name}: the package {package} is not installed; "
                f"`pip install {package}`, or leave the option out (summary.csv and log.jsonl "
                "are always written)"
            )


class Trackers:
    """The trackers of a run in its main process; does nothing in other processes.

    Args:
        accelerator: Accelerator that was made with ``log_with``.
        run: The run's folder.
    """

    def __init__(self, accelerator: Accelerator, run: Path) -> None:
        self._accelerator = accelerator
        self._run = run.absolute()

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin, and store the configuration.

        Raises:
            EnvironmentFault: A tracker cannot be reached or written.
        """
        names = [str(kind) for kind in self._accelerator.log_with]
        if not names:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to results
                self._accelerator.init_trackers("scalekd", flat(config), self._settings(names))
        except Exception as error:  # each tracker has its own
            raise EnvironmentFault(
                f"--log-with {' '.join(names)}: {type(error).__name__} while it started: {error}"
            ) from error

    def log(self, values: Mapping[str, float], *, step: int, say: Callable[[str], None]) -> None:
        """Log a record. A tracker that fails is removed, and training continues."""
        for tracker in list(self._accelerator.trackers):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # each tracker has its own
                self._accelerator.trackers.remove(tracker)
                say(
                    f"--log-with {tracker.name}: {type(error).__name__}: {error}. It receives no "
                    "more records; summary.csv and log.jsonl are still written"
                )

    def close(self) -> None:
        """Flush and close."""
        with contextlib.redirect_stdout(sys.stderr):
            while self._accelerator.trackers:  # Accelerate would finish what is left a second time
                _finish(self._accelerator.trackers.pop())

    def _settings(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = {}
        if "wandb" in names:
            settings["wandb"] = {"dir": str(self._run), **_wandb_mode()}
        if "mlflow" in names:
            import mlflow

            settings["mlflow"] = {"run_name": self._run.name}
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                mlflow.set_tracking_uri(f"sqlite:///{self._run / 'mlflow.db'}")
                settings["mlflow"]["logging_dir"] = (self._run / "mlflow").as_uri()
        return settings


def _finish(tracker: GeneralTracker) -> None:
    if tracker.name == "trackio":
        # Accelerate's own leaves it to end again, and to print, when Python exits.
        importlib.import_module("trackio").finish()
    else:
        tracker.finish()


def _wandb_mode() -> dict[str, str]:
    import wandb

    decided = os.environ.get("WANDB_MODE") or wandb.api.api_key
    return {} if decided else {"mode": "offline"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names; values other than numbers become text."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            plain = value if isinstance(value, bool | int | float | str) else str(value)
            result[prefix + name] = plain
    return result
