"""``scalekd train-student``."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from scalekd.cli._image_options import image_options
from scalekd.cli._options import KeyValue, json_option
from scalekd.cli._output import echo, emit

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Numbers(click.ParamType[Any]):
    """Numbers between commas or spaces."""

    name = "X,Y"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.9,0.999", param, ctx)


def _option(*names: str, kind: Any = None, **settings: Any) -> _Decorator:
    """An option whose absence is seen: a recipe's value, or the default, then holds."""
    return click.option(*names, type=kind, default=settings.pop("default", None), **settings)


def _switch(name: str, text: str) -> _Decorator:
    return click.option(f"--{name}/--no-{name}", default=None, help=text)


_SECTIONS: tuple[_Decorator, ...] = (
    # What is trained, from what.
    _option("--recipe", help="A published recipe by name, or a YAML file; flags override it."),
    _option("--cache", help="Folder or URL that cache-teacher wrote."),
    _option("--model", help="Student: timm name, alias, hf-hub:… or local-dir:…."),
    _option("--data-dir", help="Folder, URL or pattern of the images."),
    _option("--split", help="Training split.  [default: train]"),
    image_options(with_defaults=False),
    _option("--val-split", help="Validation split, or none.  [default: val]"),
    _option(
        "--val-cache", help="Cache of the validation split, for the agreement with its teacher."
    ),
    _option("--local-cache", help="Folder for copies of remote shards and blocks."),
    _option("--local-cache-size", help="What it may take, such as 500GB.  [default: 100GB]"),
    _option("--img-size", kind=int, help="Student's image size.  [default: the teacher's]"),
    _option("--num-classes", kind=int, help="Classes, when neither teacher nor data tell."),
    _option(
        "--class-map",
        help="The teacher's class of each label: auto, as the cache says or by name; none, by "
        "number; or a file, one number or name a line.  [default: auto]",
    ),
    _option(
        "--model-kwargs", kind=KeyValue(), multiple=True, help="Argument of the model; repeat."
    ),
    _option(
        "--mean",
        kind=_Numbers(),
        help="Mean of RGB in 0..1 that normalises the student's pixels.  [default: timm's]",
    ),
    _option(
        "--std",
        kind=_Numbers(),
        help="Standard deviation of RGB in 0..1, with --mean.  [default: timm's]",
    ),
    _option(
        "--crop-pct",
        kind=click.FloatRange(0, 1, min_open=True),
        help="Share of the shorter side that the evaluation crop keeps; stays with the run.  "
        "[default: timm's]",
    ),
    _option(
        "--interpolation",
        kind=click.Choice(["bicubic", "bilinear", "bilinear-opencv"]),
        help="Resize filter of evaluation; stays with the run. bilinear-opencv is cv2.resize, "
        "without antialiasing.  [default: timm's]",
    ),
    _switch("pretrained", "Start from the student's published weights."),
    _option(
        "--initial-checkpoint",
        "--checkpoint",
        help="Start from weights on disk, or another run's.",
    ),
    _option("--freeze", multiple=True, help="Parameters or parts to leave as they are; repeat."),
    _option("--drop-path", kind=float, help="Stochastic depth rate."),
    _switch("grad-checkpointing", "Recompute the student in the backward pass, to save memory."),
    _switch("tail-checkpointing", "Likewise the teacher's tail."),
    # What it learns from.
    _option(
        "--objective",
        kind=click.Choice(["scalekd", "scalekd-light", "kd", "none"]),
        help="scalekd: as published; scalekd-light: smaller projectors, one for both views; "
        "kd: logits only; none: no teacher.  [default: scalekd]",
    ),
    _option(
        "--distillation",
        kind=KeyValue(dotted=True),
        multiple=True,
        help="Knob of the objective, such as kd=false, tpp=false, kd_alpha=0.5, temperature=2, "
        "stage3.softmax_scale=1; repeat.",
    ),
    _option("--targets", help="Extension of the cache to take features, tail and logits from."),
    _option(
        "--logits-from",
        multiple=True,
        help="Extension to take logits from, or base; repeat for the mean of several teachers.",
    ),
    _switch("online", "Run the teacher live instead of reading its features."),
    _option("--teacher", help="The live teacher's name, when the cache's does not resolve here."),
    _option("--teacher-checkpoint", help="The live teacher's weights on disk."),
    _option("--smoothing", kind=float, help="Label smoothing.  [default: 0]"),
    _switch("bce-loss", "Sigmoid cross entropy, summed over classes."),
    _option("--allow-pixel-drift", kind=float, help="Accepted mean difference of replayed pixels."),
    # How it is optimised.
    _option("--epochs", kind=int, help="[default: 100]"),
    _option("-b", "--batch-size", kind=int, help="Views a batch on each process.  [default: 128]"),
    _option("--grad-accum-steps", kind=int, help="Batches an update.  [default: 1]"),
    _option("--opt", help="Any optimiser of timm.  [default: adamw]"),
    _option("--lr", kind=float, help="Learning rate.  [default: 0.001]"),
    _option("--weight-decay", kind=float, help="[default: 0.05]"),
    _option(
        "--wd-exclude",
        kind=click.Choice(["timm", "none"]),
        help="timm: no decay of vectors, biases and position embeddings; none: decay all.",
    ),
    _option("--momentum", kind=float, help="[default: 0.9]"),
    _option("--opt-eps", kind=float, help="Epsilon of the optimiser."),
    _option("--opt-betas", kind=_Numbers(), help="Betas of the optimiser."),
    _option("--opt-args", kind=KeyValue(), multiple=True, help="Argument of it; repeat."),
    _option("--layer-decay", kind=float, help="Learning-rate factor from layer to layer."),
    _option("--clip-grad", kind=float, help="Limit of the gradient."),
    _option("--clip-mode", kind=click.Choice(["norm", "value", "agc"]), help="[default: norm]"),
    # How the learning rate moves.
    _option("--sched", help="Any schedule of timm but plateau.  [default: cosine]"),
    _switch("sched-on-updates", "Move the rate after every update, not every epoch."),
    _option("--warmup-epochs", kind=float, help="[default: 0]"),
    _option("--warmup-lr", kind=float, help="Rate the warm-up starts from.  [default: 1e-5]"),
    _switch("warmup-prefix", "Train the warm-up epochs before --epochs, not within."),
    _option("--cooldown-epochs", kind=float, help="Epochs at --min-lr at the end.  [default: 0]"),
    _option("--min-lr", kind=float, help="[default: 0]"),
    _option("--decay-epochs", kind=float, help="Interval of the step schedule, length of decay."),
    _option("--decay-milestones", kind=_Numbers(), help="Of multistep.  [default: 30,60,90]"),
    _option("--decay-rate", kind=float, help="[default: 0.1]"),
    _option("--lr-cycle-mul", kind=float, help="[default: 1]"),
    _option("--lr-cycle-decay", kind=float, help="[default: 0.5]"),
    _option("--lr-cycle-limit", kind=int, help="[default: 1]"),
    _option("--lr-k-decay", kind=float, help="[default: 1]"),
    _option("--lr-noise", kind=_Numbers(), help="Parts of the run with a noisy rate."),
    _option("--lr-noise-pct", kind=float, help="[default: 0.67]"),
    _option("--lr-noise-std", kind=float, help="[default: 1]"),
    # How it is computed.
    _option(
        "--amp",
        kind=click.Choice(["auto", "bf16", "fp16", "no"]),
        help="auto: bf16 where the device has it.  [default: auto]",
    ),
    _switch(
        "sync-bn",
        "Compute the student's batch norms over the views of all processes, which must be GPUs.",
    ),
    _switch("channels-last", "Channels-last memory for the student.  [default: for CNNs on CUDA]"),
    click.option(
        "--torchcompile", is_flag=False, flag_value="inductor", default=None, help="Backend."
    ),
    _switch("model-ema", "Average the weights, and evaluate the average beside the student."),
    _option("--model-ema-decay", kind=float, help="[default: 0.9998]"),
    _switch("model-ema-warmup", "Average faster at the start."),
    _option("--seed", kind=int, help="Of weights, order and dropout.  [default: 0]"),
    _option(
        "-j",
        "--workers",
        kind=int,
        help="Processes that decode images.  [default: 4, or the cores if they are fewer]",
    ),
    # What is kept and shown.
    _option("--output", help="Folder of the run."),
    _option("--resume", help="auto: go on where --output stands; or a checkpoint's folder."),
    _switch("overwrite", "Remove the run in --output and begin it anew."),
    _option(
        "--eval-interval", kind=int, help="Epochs from evaluation to evaluation.  [default: 1]"
    ),
    _option("--checkpoint-hist", kind=int, help="Epochs' checkpoints to keep.  [default: 3]"),
    _option("--recovery-interval", kind=int, help="Updates from checkpoint to checkpoint."),
    _option("--log-interval", kind=int, help="Updates from log line to log line.  [default: 50]"),
    _option("--log-with", multiple=True, help="tensorboard, wandb, mlflow, trackio, …; repeat."),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in reversed(_SECTIONS):
        function = decorate(function)
    return function


@click.command("train-student")
@_with_options
@json_option
def command(*, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Train a student from a teacher's cache.

    Stops cleanly on Ctrl-C and SIGTERM; the same command with --resume auto goes on.
    """
    from scalekd.pipelines.configure import departures_from_recipe, train_config
    from scalekd.pipelines.train_student import train_student

    flags = {name: value for name, value in options.items() if value is not None and value != ()}
    for name in ("model_kwargs", "opt_args"):
        if name in flags:
            flags[name] = dict(flags[name])
    if flags.get("val_split") == "none":
        flags["val_split"] = None
    config = train_config(recipe, flags)
    is_main = int(os.environ.get("RANK", "0")) == 0
    if recipe is not None and is_main:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        for departure in departures_from_recipe(recipe, config, world_size=world_size):
            echo(f"note: {departure}", err=True)
    result = train_student(config)
    if not is_main:
        return
    metrics = result.metrics
    scores = [
        f"{label} {metrics[name]:.2f} %"
        for name, label in (("eval_top1", "top-1"), ("ema_eval_top1", "top-1 of the average"))
        if name in metrics
    ]
    lines = [
        f"{result.output}: {result.epochs} epochs, {result.samples_viewed:,} views, "
        f"loss {metrics['train_loss']:.4g}" + "".join(f", {score}" for score in scores),
        f"best: epoch {result.best_epoch + 1}, in {result.output}/model_best",
    ]
    emit(asdict(result), lines, as_json=as_json)
