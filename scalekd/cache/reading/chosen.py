"""Whose targets a student learns from: the cache's own, an extension's, or several teachers'."""

from collections.abc import Collection, Mapping, Sequence
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
        features: Whose final-stage features and tails count; the first teacher's first.
        logits: Whose logits count; several are averaged.
    """

    caches: Mapping[str, CacheReader]
    features: tuple[str, ...]
    logits: tuple[str, ...]

    @classmethod
    def open(
        cls, cache: Location, *, targets: str | None = None, logits_from: Sequence[str] = ()
    ) -> "ChosenTargets":
        """Open a cache, and the extensions named.

        Args:
            cache: The cache.
            targets: Extension that gives features and tail, and logits if it has any; the cache
                itself when ``None``. Several names, with commas between them and ``base`` for the
                cache itself, are several teachers.
            logits_from: Extensions that give logits, or ``base`` for the cache itself.

        Raises:
            UsageError: There is no such extension, a name is given twice, or no pass of the cache
                is here.
            DataError, CacheError: As for :func:`~scalekd.cache.open_cache`.
        """
        base = open_cache(cache)
        features = tuple(name.strip() for name in (targets or BASE).split(","))
        if len(set(features)) < len(features) or "" in features:
            raise UsageError(f"--targets {targets}: expected names, each once, as in base,NAME")
        if not base.passes:
            raise UsageError(
                f"{base.location}: no pass of the cache is here (the part is {base.part}); fetch"
                " one with `scalekd cache pull`"
            )
        named = sorted({*features, *logits_from} - {BASE})
        caches = {BASE: base, **{name: open_extension(base, name) for name in named}}
        with_logits = [n for n in features if caches[n].identity.logits is not None]
        own = with_logits[0] if with_logits else BASE
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
        class_token: Collection[str] = (),
    ) -> JoinedTargets:
        """Decode a loader's batches.

        Args:
            features: Decode features.
            logits: Decode logits.
            classes: For each cache that gives logits, see `TargetDecoder`.
            compute_dtype: Type of the products that decode features.
            class_token: Caches that return the class token beside their features.

        Raises:
            UsageError: One of the caches does not hold what is asked of it.
        """
        owners = set(self.features) if features else set()
        owners |= set(self.logits) if logits else set()
        return JoinedTargets(
            {
                owner: TargetDecoder(
                    self.caches[owner].codecs,
                    features=features and owner in self.features,
                    logits=logits and owner in self.logits,
                    owner="" if owner == BASE else owner,
                    compute_dtype=compute_dtype,
                    classes=(classes or {}).get(owner),
                    class_token=owner in class_token,
                )
                for owner in sorted(owners)
            },
            features=self.features if features else (),
        )
