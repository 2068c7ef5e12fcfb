"""Targets that a student learns from, chosen from a cache and its extensions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from scalekd.cache.layout import SEPARATOR
from scalekd.cache.reading.extensions import BASE, JoinedReader, open_extension
from scalekd.cache.reading.reader import CacheReader, open_cache
from scalekd.distillation.decoding import JoinedTargets, TargetDecoder
from scalekd.errors import UsageError
from scalekd.storage import Location


@dataclass(frozen=True)
class ChosenTargets:
    """A cache, the extensions in use, and the targets to read from each.

    Attributes:
        caches: The cache, named ``base``, and the extensions in use, by name.
        features: Names of the caches whose final-stage features and tails are used, the first
            teacher's first.
        logits: Names of the caches whose logits are used; several are averaged.
    """

    caches: Mapping[str, CacheReader]
    features: tuple[str, ...]
    logits: tuple[str, ...]

    @classmethod
    def open(
        cls, cache: Location, *, targets: str | None = None, logits_from: Sequence[str] = ()
    ) -> "ChosenTargets":
        """Open a cache and the named extensions.

        Args:
            cache: Location of the cache.
            targets: Extension with the features and tail, and the logits if it has any; ``base``,
                the default, is the cache itself. Several names separated by commas, such as
                ``base,NAME``, are several teachers.
            logits_from: Extensions with the logits; ``base`` is the cache itself.

        Raises:
            UsageError: An extension does not exist or is named twice, or the location contains no
                pass of the cache.
            DataError, CacheError: As for :func:`~scalekd.cache.open_cache`.
        """
        base = open_cache(cache)
        features = tuple(name.strip() for name in (targets or BASE).split(","))
        if len(set(features)) < len(features) or "" in features:
            raise UsageError(f"--targets {targets}: expected names, each once, as in base,NAME")
        if not base.passes:
            raise UsageError(
                f"{base.location}: contains no pass of the cache (only {base.part}); fetch one with"
                " `scalekd cache pull`"
            )
        named = sorted({*features, *logits_from} - {BASE})
        caches = {BASE: base, **{name: open_extension(base, name) for name in named}}
        with_logits = (name for name in features if caches[name].identity.logits is not None)
        return cls(caches, features, tuple(logits_from) or (next(with_logits, BASE),))

    @property
    def base(self) -> CacheReader:
        """The cache itself, from which samples and views are read."""
        return self.caches[BASE]

    @property
    def reader(self) -> CacheReader | JoinedReader:
        """Reader of the cache and of the extensions in use."""
        extensions = {name: reader for name, reader in self.caches.items() if name != BASE}
        return JoinedReader(self.base, extensions) if extensions else self.base

    def decoder(
        self,
        *,
        features: bool,
        logits: bool,
        classes: Mapping[str, Sequence[int] | None] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        class_token: Collection[str] = (),
    ) -> JoinedTargets:
        """Return a module that decodes the targets of a loader's batches.

        Args:
            features: Decode features.
            logits: Decode logits.
            classes: Classes of the decoded logits of each cache; see ``TargetDecoder``.
            compute_dtype: Type of the products that decode features.
            class_token: Caches that return the class token beside their features.

        Raises:
            UsageError: One of the caches does not contain the requested targets.
        """
        owners = set(self.features) if features else set()
        owners |= set(self.logits) if logits else set()
        return JoinedTargets(
            {
                owner: TargetDecoder(
                    self.caches[owner].codecs,
                    features=features and owner in self.features,
                    logits=logits and owner in self.logits,
                    prefix="" if owner == BASE else f"{owner}{SEPARATOR}",
                    compute_dtype=compute_dtype,
                    classes=(classes or {}).get(owner),
                    class_token=owner in class_token,
                    where=str(self.caches[owner].location),
                )
                for owner in sorted(owners)
            },
            features=self.features if features else (),
        )
