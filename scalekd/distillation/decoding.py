"""Modules that decode a batch of a cache's target arrays to targets, on the training device."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from scalekd.distillation.targets import (
    FullLogits,
    LogitTargets,
    MeanLogits,
    Targets,
    TopKLogits,
    select_classes,
)
from scalekd.errors import UsageError
from scalekd.shapes import FeatureShape

NO_LOGITS = (
    "this cache contains no logits, which the KD loss needs; write one by cache-teacher"
    " --logits full with a teacher that has a classifier, or train with"
    " --distillation kd=false, or without labels and logits by --objective features"
)


class FeatureSource(Protocol):
    """A feature codec, as far as its decoding goes; see :class:`scalekd.codecs.FeatureCodec`."""

    shape: FeatureShape

    def decoder(self, *, compute_dtype: torch.dtype) -> nn.Module:
        """Return a module that decodes planes by name to ``(view, token, channel)``."""


class LogitSource(Protocol):
    """A logit codec, as far as its decoding goes; see :class:`scalekd.codecs.LogitCodec`."""

    num_classes: int

    def decoder(self) -> nn.Module:
        """Return a module that decodes planes by name to the arguments of logit targets."""


class TargetCodecs(Protocol):
    """The codecs of one cache, such as :class:`scalekd.cache.CacheCodecs`."""

    @property
    def stages(self) -> Mapping[int, FeatureSource]:
        """Feature codec of each stage."""

    @property
    def logits(self) -> LogitSource | None:
        """Logit codec; ``None`` for a cache without logits."""


class TargetDecoder(nn.Module):
    """Decodes the target arrays of a batch to :class:`~scalekd.distillation.Targets`.

    Args:
        codecs: Codecs of the cache.
        features: Decode the final stage's features; the batch must contain their planes.
        logits: Decode logits.
        prefix: Start of the arrays' names in a batch; ``NAME:`` for those of an extension.
        compute_dtype: Type of the products that decode features, float32 or bfloat16.
        classes: The teacher's class of each class of the decoded logits; all of the teacher's
            in its own order when ``None``.
        class_token: Return the class token, which must be the first prefix token.
        where: Location of the cache, for messages.

    Raises:
        UsageError: The cache does not contain the requested targets.
    """

    classes: Tensor | None

    def __init__(
        self,
        codecs: TargetCodecs,
        *,
        features: bool,
        logits: bool,
        prefix: str = "",
        compute_dtype: torch.dtype = torch.float32,
        classes: Sequence[int] | None = None,
        class_token: bool = False,
        where: str = "this cache",
    ) -> None:
        super().__init__()
        self._class_token = class_token
        selected = None if classes is None else torch.tensor(list(classes))
        self.register_buffer("classes", selected, persistent=False)
        self._prefix = prefix
        if features and 4 not in codecs.stages:
            instead = ", or train with --objective kd" if codecs.logits is not None else ""
            raise UsageError(
                f"{where} holds no final-stage features, which the objective compares; write"
                " them by cache-teacher or cache extend --name with --stages final or 3,4"
                f"{instead}"
            )
        if logits and codecs.logits is None:
            raise UsageError(NO_LOGITS)
        self._first = codecs.stages[4].shape.num_prefix_tokens if features else 0
        self.features = codecs.stages[4].decoder(compute_dtype=compute_dtype) if features else None
        self.logits = codecs.logits.decoder() if logits and codecs.logits else None
        self._num_classes = codecs.logits.num_classes if codecs.logits else 0

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of arrays that a batch must contain."""
        parts = {"stage4": self.features, "logits": self.logits}
        return tuple(self._prefix + group for group, part in parts.items() if part is not None)

    def forward(self, batch: Mapping[str, Tensor]) -> Targets:
        """Decode a batch of planes named ``stage4.<plane>`` and ``logits.<plane>``.

        Args:
            batch: Tensors with the view axis first, on the device.

        Returns:
            Patch tokens of the final stage (prefix tokens are left out), logits, and, if
            requested, the class token.
        """
        logits = self._logit_targets(batch)
        if self.features is None:
            return Targets(logits=logits)
        tokens = self.features(_group(batch, f"{self._prefix}stage4"))
        class_token = tokens[:, 0] if self._class_token else None
        return Targets(tokens[:, self._first :], logits, class_token)

    def _logit_targets(self, batch: Mapping[str, Tensor]) -> LogitTargets | None:
        if self.logits is None:
            return None
        decoded = self.logits(_group(batch, f"{self._prefix}logits"))
        logits: FullLogits | TopKLogits
        if "logits" in decoded:
            logits = FullLogits(decoded["logits"])
        else:
            logits = TopKLogits(**decoded, num_classes=self._num_classes)
        return logits if self.classes is None else select_classes(logits, self.classes)


class JoinedTargets(nn.Module):
    """Targets of several teachers together: of a cache and its extensions, or of live teachers.

    Args:
        sources: Target source of each teacher, by name, such as a `TargetDecoder`.
        features: Names of the teachers whose features are used; the objective's first one first.
        logits: Names of the teachers whose logits, if they have any, are averaged
            (:class:`~scalekd.distillation.MeanLogits`); all if not given.
    """

    def __init__(
        self,
        sources: Mapping[str, nn.Module],
        *,
        features: Sequence[str] = (),
        logits: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.sources = nn.ModuleList(sources.values())  # a name may contain a dot
        self._names, self._features = tuple(sources), tuple(features)
        self._logits = self._names if logits is None else tuple(logits)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of arrays that a batch must contain."""
        return tuple(group for source in self.sources for group in source.groups)  # type: ignore[union-attr]

    def forward(self, batch: Mapping[str, Tensor]) -> Targets:
        """Compute the targets of a batch; see :meth:`TargetDecoder.forward`."""
        parts = {n: source(batch) for n, source in zip(self._names, self.sources, strict=True)}
        each = [parts[n].logits for n in self._logits if parts[n].logits is not None]
        logits = MeanLogits(tuple(each)) if len(each) > 1 else next(iter(each), None)
        if not self._features:
            return Targets(logits=logits)
        first, *others = self._features
        return Targets(
            parts[first].features, logits, parts[first].class_token, {n: parts[n] for n in others}
        )


def _group(batch: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    start = f"{group}."
    return {name[len(start) :]: batch[name] for name in batch if name.startswith(start)}
