"""The choice of the targets that a student learns from: of the cache, or of its extensions."""

from collections.abc import Mapping, Sequence
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
    """A cache with the extensions in use, and the targets that are taken from each.

    Attributes:
        caches: The cache, named ``base``, and the extensions in use, by name.
        features: Name of the cache whose final-stage features and tail are used.
        logits: Names of the caches whose logits are used; several are averaged.
    """

    caches: Mapping[str, CacheReader]
    features: str
    logits: tuple[str, ...]

    @classmethod
    def open(
        cls, cache: Location, *, targets: str | None = None, logits_from: Sequence[str] = ()
    ) -> "ChosenTargets":
        """Open a cache and the named extensions.

        Args:
            cache: Location of the cache.
            targets: Extension with the features and tail, and the logits if it has any; the cache
                itself if ``None``.
            logits_from: Extensions with the logits; ``base`` is the cache itself.

        Raises:
            UsageError: The extension does not exist, or no pass of the cache is at the location.
            DataError, CacheError: As for :func:`~scalekd.cache.open_cache`.
        """
        base, features = open_cache(cache), targets or BASE
        if not base.passes:
            raise UsageError(
                f"{base.location}: contains no pass of its cache (only {base.part}); fetch"
                " one with `scalekd cache pull`"
            )
        named = sorted({features, *logits_from} - {BASE})
        caches = {BASE: base, **{name: open_extension(base, name) for name in named}}
        own = features if caches[features].identity.logits is not None else BASE
        return cls(caches, features, tuple(logits_from) or (own,))

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
    ) -> JoinedTargets:
        """Return a module that decodes a loader's batches.

        Args:
            features: Decode features.
            logits: Decode logits.
            classes: Classes of the decoded logits of each cache; see `TargetDecoder`.
            compute_dtype: Type of the products that decode features.

        Raises:
            UsageError: One of the caches does not contain the requested targets.
        """
        owners = {self.features} if features else set()
        owners |= set(self.logits) if logits else set()
        return JoinedTargets(
            [
                TargetDecoder(
                    self.caches[owner].codecs,
                    features=features and owner == self.features,
                    logits=logits and owner in self.logits,
                    prefix="" if owner == BASE else f"{owner}{SEPARATOR}",
                    compute_dtype=compute_dtype,
                    classes=(classes or {}).get(owner),
                )
                for owner in sorted(owners)
            ]
        )
