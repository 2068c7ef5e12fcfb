"""Object stores and web servers, through obstore (the Rust crate ``object_store``).

obstore repeats requests after throttling (429, 503), server errors, timeouts and dropped
connections, with exponential backoff up to a limit, and resumes in the middle of a body. Other
errors (missing or expired credentials, no permission, no such bucket) are raised at once.

The runtime of obstore does not survive a fork: a forked process would wait permanently for threads
that it does not have. A store is opened when it is first used, and raises an error in a forked
process; loaders do not fork their workers if a store is remote.
"""

import functools
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.storage.base import (
    NotStored,
    Storage,
    StoredFile,
    StoredFileError,
    check_relative,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_SCHEMES = ("s3", "gs", "az", "http", "https", "memory")
_RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}
_CLIENT = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),  # without receiving any byte
    "timeout": timedelta(minutes=30),  # for a whole request; a file has at most 4 GiB
}
_PIECE_BYTES = 8 << 20
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if needed, AWS_SESSION_TOKEN (for a"
    " public bucket AWS_SKIP_SIGNATURE=true)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_REFUSED = re.compile(
    r"ExpiredToken|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|TokenRefreshRequired"
    r"|AuthenticationFailed|RequestTimeTooSkewed|AccessDenied|credential|status code: 40[13]"
    r"|169\.254\.169\.254|must be specified",
    re.IGNORECASE,
)
_STATUS = re.compile(r"status code: (\d{3}[^:<\n]*)")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_used_by: int | None = None  # process that started the runtime of obstore


class ObjectStorage(Storage):
    """Objects below a prefix of a bucket, or files below a path of a web server.

    Endpoint and credentials come from the usual environment variables (``AWS_ENDPOINT_URL``,
    ``AWS_ACCESS_KEY_ID``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_KEY``, …).

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``,
            ``https://host/path``, or ``memory://`` for tests.

    Raises:
        UsageError: The URL is of another kind or contains a password, or obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.scheme = parts.scheme
        self.read_only = self.scheme in ("http", "https")
        if self.scheme not in _SCHEMES:
            raise UsageError(
                f"{url}: {self.scheme}:// is not one of s3://, gs://, az://, hf://, https:// and"
                " http://"
            )
        if parts.username or parts.password:
            raise UsageError(
                f"{self.scheme}://…@{parts.hostname}: a URL with a user or password ends up in"
                " logs; give credentials in the environment"
            )
        if parts.query or parts.fragment:
            raise UsageError(
                f"{self.scheme}://{parts.netloc}{parts.path}: the part after '?' or '#' cannot"
                " belong to a location; signed links are not supported"
            )
        if not parts.netloc and self.scheme != "memory":
            raise UsageError(f"{url}: the bucket or host is missing")
        self.location = url.rstrip("/")
        self._opened: tuple[int, ObjectStore] | None = None
        _obstore()

    def __getstate__(self) -> dict[str, Any]:
        if self.scheme == "memory":
            raise UsageError(f"{self.location}: can be used in one process only")
        return {**self.__dict__, "_opened": None}

    def below(self, folder: str) -> "ObjectStorage":
        return ObjectStorage(f"{self.location}/{self._path(folder)}")

    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        del sha256
        path = self._path(relative)
        with self._explained("read", relative):
            response = _obstore().get(self._store, path)
            size = response.meta["size"]
            if size > max_bytes:
                raise StoredFileError.too_large(self.locate(path), size, max_bytes)
            data = bytes(response.bytes())
        if len(data) != size:
            raise StoredFileError(
                self.locate(path), f"gave {len(data):,} bytes of the {size:,} it announced"
            )
        return data

    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        del version
        path = self._path(relative)
        if not length:
            return b""
        with self._explained("read", relative):
            data = bytes(_obstore().get_range(self._store, path, start=start, length=length))
        if len(data) != length:
            raise StoredFileError.too_short(self.locate(path), start + len(data), start, length)
        return data

    def stream(self, relative: str) -> Iterator[bytes]:
        path, num_bytes = self._path(relative), 0
        with self._explained("read", relative):
            response = _obstore().get(self._store, path)
            for piece in response.stream(min_chunk_size=_PIECE_BYTES):
                num_bytes += len(piece)
                yield bytes(piece)
        if num_bytes != response.meta["size"]:
            raise StoredFileError(
                self.locate(path),
                f"gave {num_bytes:,} bytes of the {response.meta['size']:,} it announced",
            )

    def describe(self, relative: str) -> StoredFile | None:
        try:
            with self._explained("look at", relative):
                return _described(_obstore().head(self._store, self._path(relative)))
        except NotStored:
            return None

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        self._check_can_list()
        below = self._path(prefix) if prefix else None
        with self._explained("list", prefix):
            for batch in _obstore().list(self._store, below, chunk_size=1000):
                for entry in batch:
                    yield _described(entry)

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        files = map(_described, self._below(prefix)["objects"])
        return sorted(files, key=lambda file: file.path)

    def folders(self, prefix: str = "") -> Sequence[str]:
        prefixes = self._below(prefix)["common_prefixes"]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in prefixes)

    def _below(self, prefix: str) -> Any:
        """List the objects and common prefixes directly below a folder."""
        self._check_can_list()
        below = self._path(prefix) if prefix else None
        with self._explained("list", prefix):
            return _obstore().list_with_delimiter(self._store, below)

    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        self._check_can_write()
        path, obstore = self._path(relative), _obstore()
        try:
            with self._explained("write", relative):
                # One request: the parts of an interrupted upload would stay and be billed.
                obstore.put(
                    self._store,
                    path,
                    data,
                    mode="create" if exclusive else "overwrite",
                    use_multipart=False,
                )
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def delete(self, relative: str) -> None:
        self._check_can_write()
        try:
            with self._explained("delete", relative):
                _obstore().delete(self._store, self._path(relative))
        except NotStored:
            return

    @property
    def _store(self) -> "ObjectStore":
        """The opened store of this process."""
        global _used_by
        process = os.getpid()
        if _used_by not in (None, process):
            raise UsageError(
                f"{self.location}: remote stores were used before this process was forked, and"
                " their client does not survive a fork; start processes with multiprocessing's"
                " 'forkserver' or 'spawn'"
            )
        _used_by = process
        if self._opened is None or self._opened[0] != process:
            self._opened = process, _open(self.scheme, self.location)
        return self._opened[1]

    def _path(self, relative: str) -> str:
        return check_relative(self.location, relative)

    def _check_can_list(self) -> None:
        if self.read_only:
            raise UsageError(f"{self.location}: a web server cannot list its files")

    def _check_can_write(self) -> None:
        if self.read_only:
            raise UsageError(f"{self.location}: a web server is read-only")

    @contextmanager
    def _explained(self, doing: str, relative: str) -> Iterator[None]:
        """Convert errors of a store to errors with advice."""
        errors = _obstore().exceptions
        where = self.locate(relative) if relative else self.location
        try:
            yield
        except errors.AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise DataError(f"{where}: there is no such bucket") from None
            raise NotStored(where, "is missing") from None
        except (errors.BaseError, OSError, ValueError) as error:
            text = str(error)
            refused = isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError)
            if refused or _REFUSED.search(text):
                raise EnvironmentFault(
                    f"cannot {doing} {where}: the store refuses the credentials, or they do"
                    f" not permit this ({_answer(text)}); renew or set "
                    + _CREDENTIALS.get(self.scheme, "them")
                ) from None
            if "NoSuchBucket" in text:
                raise DataError(f"{where}: there is no such bucket") from None
            if "Range Not Satisfiable" in text or "Invalid range" in text:
                raise StoredFileError(where, "ends before the bytes that are needed") from None
            raise EnvironmentFault(
                f"cannot {doing} {where}: {_answer(text)}. Check address and network, then run the"
                " same command again; what was committed is kept"
            ) from None


def _described(entry: Any) -> StoredFile:
    size, modified = int(entry["size"]), entry["last_modified"].timestamp()
    tag = entry.get("e_tag") or f"{modified}"
    return StoredFile(entry["path"], size, modified, f"{size}-{tag}")


def _answer(text: str) -> str:
    """Shorten an error of a store to a few words from its XML or obstore's debug output."""
    status, code = _STATUS.search(text), _CODE.search(text)
    parts = [match[1].strip() for match in (status, code) if match]
    # A query may contain a signature.
    return ", ".join(parts) or re.sub(r"\?\S+", "?…", text.split("\n")[0])[:300]


def _open(scheme: str, url: str) -> "ObjectStore":
    from obstore import store

    options: Any = {"client_options": dict(_CLIENT), "retry_config": _RETRIES}
    options["client_options"]["allow_http"] = _allows_plain_http(url)
    if scheme == "memory":
        return store.MemoryStore()
    if scheme in ("http", "https"):
        return store.HTTPStore(url, **options)
    if scheme == "az":
        parts = urllib.parse.urlsplit(url)
        return store.AzureStore(parts.netloc, prefix=parts.path.strip("/") or None, **options)
    return store.from_url(url, **options)


def _allows_plain_http(url: str) -> bool:
    """Return whether the URL or an endpoint in the environment is one without TLS."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoints = [url, *(os.environ.get(name, "") for name in names)]
    return any(endpoint.startswith("http://") for endpoint in endpoints)


@functools.cache
def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError:
        raise UsageError(
            "remote stores need the package obstore: pip install 'scalekd[remote]'"
        ) from None
    return obstore
