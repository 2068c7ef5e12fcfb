"""``scalekd cache-teacher``."""

from pathlib import Path
from typing import Any

import click

from scalekd.cli._options import checked
from scalekd.cli._output import echo, print_result
from scalekd.cli._paths import check_data_dir
from scalekd.cli._record import GroupedCommand, given, json_option, record_options
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
def cache_teacher(*, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run a teacher once over drawn views, and store its features and logits.

    The same command continues an interrupted cache.
    """
    values = given(options)
    check_data_dir(
        values.get("data_dir"), values.get("split", "train"), values.get("labels", "auto")
    )

    from scalekd.models.classes import read_class_names
    from scalekd.pipelines._budget import dry_run_cache
    from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
    from scalekd.teachers import TeacherConfig, resolve_model_name

    of_teacher = {name: values.pop(name) for name in TeacherOptions.model_fields if name in values}
    classes = of_teacher.pop("teacher_classes", None)
    names = None if classes is None else read_class_names(Path(classes))
    teacher = checked(TeacherConfig, class_names=names, **of_teacher)
    config = checked(CacheTeacherConfig, teacher=teacher, **values)
    if expansion := resolve_model_name(config.teacher.model)[1]:
        echo(expansion, err=True)
    print_result(dry_run_cache(config) if dry_run else cache_teacher(config), as_json=as_json)
