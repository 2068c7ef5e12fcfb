"""Whose targets a student learns from: the cache's own, an extension's, or several teachers'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scalekd.cache.reading.extensions import BASE, JoinedReader, open_extension
from scalekd.cache.reading.reader import CacheReader, open_cache
from scalekd.cache.targets import JoinedTargets, TargetDecoder
from scalekd.errors import UsageError
from scalekd.storage import Location


@dataclass(frozen=True)
class ChosenTargets:
    """A cache, those of its extensions that are used, and who gives what.

    Attributes:
        caches: The cache, as ``base``, and the extensions that are used, by name.
        features: Whose final-stage features and tail count.
        logits: Whose logits count; several are averaged.
    """

    caches: Mapping[str, CacheReader]
    features: str
    logits: tuple[str, ...]

    @classmethod
    def open(
        cls, cache: Location, *, targets: str | None = None, logits_from: Sequence[str] = ()
    ) -> "ChosenTargets":
        """Open a cache, and the extensions named.

        Args:
            cache: The cache.
            targets: Extension that gives features and tail, and logits if it has any; the cache
                itself when ``None``.
            logits_from: Extensions that give logits, or ``base`` for the cache itself.

        Raises:
            UsageError: There is no such extension, or no pass of the cache is here.
            DataError, CacheError: As for :func:`~scalekd.cache.open_cache`.
        """
        base, features = open_cache(cache), targets or BASE
        if not base.passes:
            raise UsageError(
                f"{base.location}: no pass of the cache is here (the part is {base.part}); fetch"
                " one with `scalekd cache pull`"
            )
        named = sorted({features, *logits_from} - {BASE})
        caches = {BASE: base, **{name: open_extension(base, name) for name in named}}
        own = features if caches[features].identity.logits is not None else BASE
        return cls(caches, features, tuple(logits_from) or (own,))

    @property
    def base(self) -> CacheReader:
        """The cache itself, which samples and views are read from."""
        return self.caches[BASE]

    @property
    def reader(self) -> CacheReader | JoinedReader:
        """What a loader reads."""
        extensions = {name: found for name, found in self.caches.items() if name != BASE}
        return JoinedReader(self.base, extensions) if extensions else self.base

    def decoder(
        self,
        *,
        features: bool,
        logits: bool,
        classes: Mapping[str, Sequence[int] | None] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        class_token: bool = False,
    ) -> JoinedTargets:
        """Decode a loader's batches.

        Args:
            features: Decode features.
            logits: Decode logits.
            classes: For each cache that gives logits, see `TargetDecoder`.
            compute_dtype: Type of the products that decode features.
            class_token: Return the class token beside the features.

        Raises:
            UsageError: One of the caches does not hold what is asked of it.
        """
        owners = {self.features} if features else set()
        owners |= set(self.logits) if logits else set()
        return JoinedTargets(
            [
                TargetDecoder(
                    self.caches[owner].codecs,
                    features=features and owner == self.features,
                    logits=logits and owner in self.logits,
                    owner="" if owner == BASE else owner,
                    compute_dtype=compute_dtype,
                    classes=(classes or {}).get(owner),
                    class_token=class_token,
                )
                for owner in sorted(owners)
            ]
        )
