"""Resolution of model names from the user to timm models.

Names of teachers and students have the same forms: a short alias, an architecture,
``architecture.tag``, ``hf-hub:owner/name``, ``local-dir:path``, or the path of a folder that timm
exported.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.models.arguments import check_model_kwargs
from scalekd.models.hub import cached_only_when_unreachable

_NUM_SUGGESTIONS = 5
_MAX_CONFIG_BYTES = 32 << 20  # names and descriptions of 21,841 classes take 3 MB
_LOCAL, _HUB = "local-dir", "hf-hub"


@dataclass(frozen=True)
class ModelSource:
    """A model's name and configuration, before weights are read.

    Attributes:
        name: Name for ``timm.create_model``.
        label: Name for messages and manifests: ``architecture.tag``, or the name of the folder or
            repository.
        architecture: Name of the model in timm, without tag.
        pretrained_cfg: timm's description of the weights: preprocessing, classes, licence.
        model_args: Constructor arguments stored beside the weights of a folder or repository.
        folder: Folder on disk that the configuration was read from, if any.
    """

    name: str
    label: str
    architecture: str
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def nearest_names(name: str, candidates: list[str]) -> list[str]:
    """Return the candidates most similar to a misspelt name, nearest first."""
    close = difflib.get_close_matches(name, candidates, n=_NUM_SUGGESTIONS, cutoff=0.5)
    within = [candidate for candidate in candidates if name and name in candidate]
    return list(dict.fromkeys(close + within))[:_NUM_SUGGESTIONS]


def resolve_name(name: str, aliases: Mapping[str, str]) -> tuple[str, str | None]:
    """Expand an alias, add timm's default tag, or make a folder's path absolute.

    Args:
        name: Name from the user.
        aliases: Full ``architecture.tag`` of each short name.

    Returns:
        The name for :func:`describe_model`, and a sentence to print if it differs from ``name``.

    Raises:
        UsageError: The model, tag or folder does not exist; the message suggests similar names.
    """
    from timm.models import (
        get_arch_pretrained_cfgs,
        get_pretrained_cfg,
        is_model,
        split_model_name_tag,
    )
    from timm.models._registry import get_deprecated_models  # not re-exported by timm

    from scalekd.models import architectures as _registered  # noqa: F401  (names for timm)

    typed, name = name, name.strip()
    if name in aliases:
        return aliases[name], f"{name} stands for {aliases[name]}"
    prefix, colon, rest = name.partition(":")
    if colon and prefix == _LOCAL:
        return f"{_LOCAL}:{_exported_folder(rest)}", None
    if colon and prefix in (_HUB, "hf_hub"):
        if rest.count("/") != 1 or rest.count("@") > 1:
            raise UsageError(
                f"{typed!r} is not of the form hf-hub:owner/name or hf-hub:owner/name@revision"
            )
        return f"{_HUB}:{rest}", None
    if (Path(name).expanduser() / "config.json").is_file():
        resolved = f"{_LOCAL}:{_exported_folder(name)}"
        return resolved, f"{name} is a folder and stands for {resolved}"
    if name in (renamed := get_deprecated_models()) and renamed[name]:
        return resolve_name(str(renamed[name]), {})[0], f"{name} is now called {renamed[name]}"
    architecture, tag = split_model_name_tag(name)
    if colon or "/" in name or not is_model(architecture) or architecture in renamed:
        raise UsageError(_unknown_model(typed, aliases))
    tagged = get_arch_pretrained_cfgs(architecture)
    if tag:
        if name not in tagged:
            known = ", ".join(tagged) or "none"
            raise UsageError(f"{architecture} has no weights tagged {tag!r}; timm has: {known}")
        return name, None
    default = get_pretrained_cfg(architecture)
    if default is None or not default.tag:
        return architecture, None
    resolved = f"{architecture}.{default.tag}"
    return resolved, f"{name} stands for {resolved}, timm's default tag"


def describe_model(name: str) -> ModelSource:
    """Read the configuration of a name that :func:`resolve_name` returned.

    Raises:
        UsageError: A folder's configuration names an architecture that timm does not know.
        DataError: A folder's ``config.json`` cannot be read.
        EnvironmentFault: A hub repository cannot be reached.
    """
    from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

    from scalekd.models import architectures as _registered  # noqa: F401  (names for timm)

    prefix, colon, rest = name.partition(":")
    if not colon:
        architecture, _ = split_model_name_tag(name)
        known = get_pretrained_cfg(name, allow_unregistered=True)
        return ModelSource(name, name, architecture, asdict(known) if known else {})
    cfg, architecture, model_args = _read_folder(rest) if prefix == _LOCAL else _read_hub(rest)
    if not is_model(architecture):
        raise UsageError(f"{name} has the architecture {architecture!r}, unknown to this timm")
    label = Path(rest).name if prefix == _LOCAL else name
    if model_args.get("in_chans") == 3:  # written by timm; scalekd always uses RGB
        del model_args["in_chans"]
    try:
        check_model_kwargs(model_args)
    except ValueError as error:
        raise DataError(f"{name}: its config.json cannot be used: {error}") from error
    folder = Path(rest) if prefix == _LOCAL else None
    return ModelSource(name, label, architecture, dict(cfg), dict(model_args), folder)


def _exported_folder(path: str) -> Path:
    """Return the absolute path of a folder with a ``config.json``."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"{_LOCAL}:{path}: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{_LOCAL}:{path}: {folder} has no config.json, so it is not a folder that timm's "
            "save_for_hf or 'scalekd export --format timm' wrote"
        )
    return folder


def _read_folder(path: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    from timm.models._hub import load_model_config_from_path

    try:
        if (size := (Path(path) / "config.json").stat().st_size) > _MAX_CONFIG_BYTES:
            raise ValueError(f"{size:,} bytes")
        cfg, architecture, model_args = load_model_config_from_path(path)
        return dict(cfg), str(architecture), dict(model_args)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{Path(path) / 'config.json'} is not a timm model configuration: {repr(error)[:200]}"
        ) from error


def _read_hub(model_id: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    from timm.models import load_model_config_from_hf

    try:
        with cached_only_when_unreachable():
            cfg, architecture, model_args = load_model_config_from_hf(model_id)
        return dict(cfg), str(architecture), dict(model_args)
    except Exception as error:
        raise EnvironmentFault(
            f"the configuration of {_HUB}:{model_id} is neither in the local cache nor reachable "
            f"over the network ({type(error).__name__}); pass a downloaded copy as {_LOCAL}:PATH"
        ) from error


def unreachable_weights(name: str, error: Exception) -> EnvironmentFault:
    """Return the error for weights that could not be downloaded, by any library."""
    return EnvironmentFault(
        f"the weights of {name} are neither in the local cache nor reachable over the network "
        f"({type(error).__name__}); pass weights on disk with --checkpoint FILE, or "
        "--no-pretrained for random ones"
    )


def _unknown_model(name: str, aliases: Mapping[str, str]) -> str:
    from timm import list_models

    architectures = list_models()
    near = nearest_names(name, [*aliases, *architectures, *list_models(pretrained=True)])
    hint = (
        f"; did you mean {', '.join(near)}?" if near else "; 'scalekd models' lists what there is"
    )
    return f"timm has no model {name!r}{hint}"
