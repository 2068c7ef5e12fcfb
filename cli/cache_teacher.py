"""``scalekd cache-teacher``."""

from pathlib import Path
from typing import Any

import click

from scalekd.cli._cache_teacher_lines import result_lines
from scalekd.cli._options import checked, json_option
from scalekd.cli._output import echo, emit
from scalekd.cli._paths import check_data_dir
from scalekd.cli._record import GroupedCommand, given, record_options
from scalekd.pipelines._cache_options import CacheOptions, TeacherOptions


@click.command("cache-teacher", cls=GroupedCommand)
@record_options(TeacherOptions, required=True)
@record_options(CacheOptions, required=True, flag_values={"torchcompile": "inductor"})
@click.option(
    "--dry-run",
    is_flag=True,
    help="Estimate time and size of the cache from one small batch, without writing anything.",
)
@json_option
def command(*, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run a teacher once over drawn views, and store its features and logits.

    The same command continues an interrupted cache.
    """
    values = given(options)
    check_data_dir(values.get("data_dir"))

    from scalekd.models.classes import read_class_names
    from scalekd.pipelines._budget import estimate_budget
    from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
    from scalekd.pipelines.estimate import estimate_cache
    from scalekd.teachers import TeacherConfig, resolve_model_name

    values_of_teacher = {
        name: values.pop(name) for name in TeacherOptions.model_fields if name in values
    }
    classes = values_of_teacher.pop("teacher_classes", None)
    names = None if classes is None else read_class_names(Path(classes))
    teacher = checked(TeacherConfig, class_names=names, **values_of_teacher)
    config = checked(CacheTeacherConfig, teacher=teacher, **values)
    _, expansion = resolve_model_name(config.teacher.model)
    if expansion:
        echo(expansion, err=True)
    if dry_run and config.budget is not None:
        choice, estimate = estimate_budget(config)
        shown = {**estimate.model_dump(mode="json"), "budget": choice.model_dump(mode="json")}
        emit(shown, [*choice.lines(), *estimate.lines()], as_json=as_json)
        return
    if dry_run:
        estimate = estimate_cache(config)
        emit(estimate.model_dump(mode="json"), estimate.lines(), as_json=as_json)
        return
    result = cache_teacher(config)
    if not result.is_main_process:
        return
    emit(result.model_dump(mode="json"), result_lines(result), as_json=as_json)
