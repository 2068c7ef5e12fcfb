"""Extend a cache by passes, or by targets under a name, without changing existing files.

    scalekd cache extend ./swin_l-cache --data-dir /imagenet --passes 8
    scalekd cache extend ./swin_l-cache --data-dir /imagenet --name beit --model beit_l

Passes are added to the cache itself. Targets of other stages, or of another teacher, make an
extension: a cache of its own in ``extensions/NAME/`` over the same views. The pixel hashes of each
shard are compared with those of the cache before the shard is committed.
"""

from dataclasses import replace

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.cache import Cache
from scalekd.cache.documents.manifest import Identity, Request
from scalekd.cache.forms import form_named
from scalekd.cache.reading.extensions import extension_path
from scalekd.codecs import check_logit_codec, parse_codec
from scalekd.distributed import process_faults
from scalekd.errors import CacheMismatch, UsageError
from scalekd.loading import worker_faults
from scalekd.models.classes import read_class_names
from scalekd.options import DEFAULT_FEATURE_CODEC
from scalekd.pipelines._classes import choose_logits
from scalekd.pipelines._extended import ExtendedCache
from scalekd.pipelines._job import Job, views_of
from scalekd.pipelines._preflight import check_output, check_shards
from scalekd.pipelines._processes import Processes
from scalekd.pipelines._source_options import ExtendConfig
from scalekd.pipelines._sources import load_cached_teacher, open_source, select_images
from scalekd.pipelines.cache_teacher import CacheOrder, CacheTeacherResult, write_cache
from scalekd.signals import terminable
from scalekd.teachers import Teacher, TeacherConfig, TeacherSpec, load_teacher

_ONLY_NAMED = ("stages", "logits", "codec", "teacher_classes", "class_map", "licence", "note")


@terminable()
@worker_faults()
@process_faults()
def extend_cache(config: ExtendConfig) -> CacheTeacherResult:
    """Add passes or an extension to a cache, or continue an interrupted command.

    Raises:
        UsageError: Nothing to add is given, or an option that applies only to extensions.
        CacheMismatch: Images, views or teacher are not those of the cache.
        ScaleKDError: See :func:`~scalekd.pipelines.cache_teacher.cache_teacher`.
    """
    processes = Processes()
    base = processes.together(lambda: _open(config))
    order = processes.together(lambda: _order(config, base))
    job = processes.together(lambda: _job(config, base).to(processes.device))
    return write_cache(job, order, processes)


def _open(config: ExtendConfig) -> CacheReader:
    base = open_cache(config.cache)
    if base.storage.root is None:
        raise UsageError(
            f"{config.cache}: only a folder can be extended; fetch the cache with `scalekd cache"
            " pull`, extend it, and send what is new with `scalekd cache push`"
        )
    return base


def _order(config: ExtendConfig, base: CacheReader) -> CacheOrder:
    """Check the options, and return how much to write."""
    check_shards(config.shards, base.identity.num_shards)
    if config.name is None:
        given = [name for name in _ONLY_NAMED if getattr(config, name) is not None]
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')}: a cache keeps the targets it was begun with; give"
                " --name to add others beside them"
            )
        if config.passes is None:
            raise UsageError("nothing to add: give --passes, or --name with --model or --stages")
        if config.passes < base.num_passes:
            raise UsageError(
                f"--passes {config.passes}: {config.cache} has {base.num_passes} already"
            )
        return CacheOrder(config.passes, config.shards)
    passes = config.passes or base.num_passes
    if passes > base.num_passes:
        raise UsageError(
            f"--passes {passes}: {config.cache} has {base.num_passes}, and an extension has views"
            f" of the cache only; first `scalekd cache extend {config.cache} --passes {passes}`"
        )
    return CacheOrder(passes, config.shards, config.licence, config.note, ExtendedCache(base))


def _job(config: ExtendConfig, base: CacheReader) -> Job:
    """Make the job that adds passes to the cache, or that begins or continues an extension."""
    output, form = base.storage, base.layout.form
    if config.name is not None:  # the cache around an extension has the images
        output, form = output.below(extension_path(config.name)), form_named(form.name, "none")
    plan = check_output(output, form, overwrite=False)
    if plan is None:
        _check_new_targets(config)
    else:
        _refuse_changes(config, plan.identity)
    cache = base.cache if plan is None else Cache(output, plan, form=form)
    opened = open_source(config)
    drawn = views_of(cache, select_images(config, opened, cache.identity.data, base.samples.keys))
    drawn = replace(drawn, embed=form.embed)
    if plan is not None:
        job = Job.of(cache, config, drawn=drawn)
    else:
        teacher = _teacher(config, cache.identity)
        logits, note = choose_logits(config.logits or (None if config.model else "none"), teacher)
        # Features are all that a teacher without a classifier gives.
        stages = (4,) if config.stages is None and logits == "none" else config.stages or ()
        if not stages and logits == "none":
            raise UsageError(
                f"--name {config.name}: --stages none and --logits none keep nothing; give one of"
                " them"
            )
        request = Request(
            stages=list(stages),
            logits=logits,
            codec=str(parse_codec(config.codec or DEFAULT_FEATURE_CODEC)),
        )
        job = Job.of(cache, config, drawn=drawn, teacher=teacher)
        job = replace(job, output=output, form=form, request=request, notes=(note,) if note else ())
    job = replace(job, class_names=read_class_names(config.teacher_classes))
    return job.matched(opened, config.class_map or "auto", plan)


def _check_new_targets(config: ExtendConfig) -> None:
    if config.model is None and config.stages is None and config.logits is None:
        raise UsageError(
            f"--name {config.name}: nothing to keep under this name; give --model, --stages or"
            " --logits"
        )
    parse_codec(config.codec or DEFAULT_FEATURE_CODEC)
    if config.logits is not None and config.logits != "none":
        check_logit_codec(config.logits)


def _refuse_changes(config: ExtendConfig, committed: Identity) -> None:
    """Raise ``CacheMismatch`` if the options give other targets than the extension has."""
    asked = {
        "stages": None if config.stages is None else sorted(config.stages),
        "logits": config.logits,
        "codec": None if config.codec is None else str(parse_codec(config.codec)),
    }
    for option, wanted in asked.items():
        kept = committed.request[option]
        if wanted is not None and wanted != (sorted(kept) if option == "stages" else kept):
            raise CacheMismatch(
                f"--{option}: {config.name} of {config.cache} was begun with {kept}, not"
                f" {wanted}; give another --name"
            )


def _teacher(config: ExtendConfig, base: Identity) -> Teacher:
    """Load the teacher of a new extension: the one that ``--model`` names, or the cache's."""
    if config.model is None:
        return load_cached_teacher(config, TeacherSpec.model_validate(base.teacher))
    return load_teacher(
        TeacherConfig(
            model=config.model,
            checkpoint=config.checkpoint,
            pretrained=config.pretrained,
            model_kwargs=config.model_kwargs,
            img_size=base.views.view_size,
            class_names=read_class_names(config.teacher_classes),
        )
    )
