"""Dataset repositories of the Hugging Face Hub, through huggingface_hub.

Every write to a repository is a git commit. Commits are made one after another, and the Hub limits
their rate, so files are written together (:meth:`HubStorage.commit_all`), at most 50 per commit;
the Hub recommends fewer than 100 (https://huggingface.co/docs/hub/storage-limits). A commit names
its parent, so that an exclusive write never replaces a file, even with several writers.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.storage.base import NotStored, Storage, StoredFile, StoredFileError, check_relative

_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<inner>.+))?")
_FILES_PER_COMMIT = 50
_PIECE_BYTES = 8 << 20
_ATTEMPTS = 20  # to commit, while other processes commit to the same repository


class HubStorage(Storage):
    """Files of a dataset repository, or below a folder of it.

    Endpoint and token are those of huggingface_hub (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth
    login``). The first commit creates a missing repository as a private one.

    Args:
        url: A URL ``hf://datasets/owner/name``, ``hf://datasets/owner/name@revision/folder``.

    Raises:
        UsageError: The URL has another form.
    """

    commits_together = True
    is_repository = True

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url.rstrip("/"))
        if match is None:
            raise UsageError(f"{url}: not of the form hf://datasets/owner/name[@revision][/folder]")
        self.location = url.rstrip("/")
        self.repo, self.revision = match["repo"], match["revision"] or "main"
        self._inner = f"{check_relative(url, match['inner'])}/" if match["inner"] else ""

    def below(self, folder: str) -> "HubStorage":
        return HubStorage(self.locate(check_relative(self.location, folder)))

    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        del sha256
        with self._response(relative) as response:
            size = int(response.headers.get("Content-Length", -1))
            if size > max_bytes:
                raise StoredFileError.too_large(self.locate(relative), size, max_bytes)
            data = bytearray()
            for piece in response.iter_bytes(_PIECE_BYTES):
                data += piece
                if len(data) > max_bytes:
                    raise StoredFileError.too_large(self.locate(relative), len(data), max_bytes)
        if size not in (-1, len(data)):
            raise StoredFileError(
                self.locate(relative), f"gave {len(data):,} bytes of the {size:,} it announced"
            )
        return bytes(data)

    def read_range(
        self, relative: str, start: int, length: int, *, version: str | None = None
    ) -> bytes:
        del version
        if not length:
            return b""
        with self._response(relative, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            data = b"".join(response.iter_bytes(_PIECE_BYTES))
        if len(data) != length:
            raise StoredFileError(
                self.locate(relative), f"gave {len(data):,} bytes instead of {length:,}"
            )
        return data

    def stream(self, relative: str) -> Iterator[bytes]:
        with self._response(relative) as response:
            yield from response.iter_bytes(_PIECE_BYTES)

    def describe(self, relative: str) -> StoredFile | None:
        path = self._path(relative)
        with self._explained("look at", relative):
            try:
                entries = _api().get_paths_info(
                    self.repo, [path], revision=self.revision, repo_type="dataset"
                )
            except (_errors().RepositoryNotFoundError, _errors().RevisionNotFoundError):
                return None
        for entry in entries:
            if entry.path == path and hasattr(entry, "size"):
                return StoredFile(relative, entry.size, 0.0, entry.blob_id)
        return None

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        yield from self._files(self._tree(prefix, recursive=True))

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        files = self._files(self._tree(prefix, recursive=False))
        return sorted(files, key=lambda file: file.path)

    def _files(self, entries: Iterator[Any]) -> Iterator[StoredFile]:
        for entry in entries:
            if hasattr(entry, "size"):
                path = entry.path.removeprefix(self._inner)
                yield StoredFile(path, entry.size, 0.0, entry.blob_id)

    def folders(self, prefix: str = "") -> Sequence[str]:
        entries = self._tree(prefix, recursive=False)
        return sorted(e.path.rpartition("/")[2] for e in entries if not hasattr(e, "size"))

    def commit(self, relative: str, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
        return bool(self.commit_all({relative: bytes(data)}, exclusive=exclusive))

    def commit_all(self, files: Mapping[str, bytes], *, exclusive: bool = False) -> set[str]:
        items, made = [*files.items()], set()
        for start in range(0, len(items), _FILES_PER_COMMIT):
            made |= self._commit_some(dict(items[start : start + _FILES_PER_COMMIT]), exclusive)
        return made

    def delete(self, relative: str) -> None:
        with self._explained("delete", relative):
            try:
                _api().delete_file(
                    self._path(relative),
                    self.repo,
                    repo_type="dataset",
                    revision=self.revision,
                    commit_message=f"Remove {relative}",
                )
            except _errors().EntryNotFoundError:
                return

    def _commit_some(self, files: dict[str, bytes], exclusive: bool) -> set[str]:
        """Make one commit, with ``exclusive`` only of new files; return the paths of its files."""
        errors, api = _errors(), _api()
        first = next(iter(files))
        with self._explained("write", first):
            for _ in range(_ATTEMPTS):
                try:
                    head = api.repo_info(self.repo, repo_type="dataset", revision=self.revision).sha
                except errors.RepositoryNotFoundError:
                    api.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True)
                    continue
                new = self._missing(files, head) if exclusive else files
                if not new:
                    return set()
                try:
                    api.create_commit(
                        self.repo,
                        [
                            _hub().CommitOperationAdd(self._path(path), data)
                            for path, data in new.items()
                        ],
                        commit_message=f"{len(new)} files, the last {[*new][-1]}",
                        repo_type="dataset",
                        revision=self.revision,
                        parent_commit=head,
                    )
                except errors.HfHubHTTPError as error:
                    if error.response.status_code in (409, 412):
                        continue  # another process has committed since
                    raise
                return set(new)
        raise EnvironmentFault(
            f"cannot write {self.locate(first)}: other processes keep committing to this"
            " repository; run the same command again later, what was committed is kept"
        )

    def _missing(self, files: dict[str, bytes], head: str) -> dict[str, bytes]:
        """Return the files that do not exist in a commit."""
        paths = {self._path(path): path for path in files}
        entries = _api().get_paths_info(self.repo, [*paths], revision=head, repo_type="dataset")
        existing = {paths[entry.path] for entry in entries if entry.path in paths}
        return {path: data for path, data in files.items() if path not in existing}

    def _tree(self, prefix: str, *, recursive: bool) -> Iterator[Any]:
        """Yield the files and folders below a folder; none if it does not exist."""
        errors, below = _errors(), self._path(prefix) if prefix else self._inner.rstrip("/")
        with self._explained("list", prefix):
            try:
                yield from _api().list_repo_tree(
                    self.repo,
                    below or None,
                    recursive=recursive,
                    revision=self.revision,
                    repo_type="dataset",
                )
            except (
                errors.EntryNotFoundError,
                errors.RepositoryNotFoundError,
                errors.RevisionNotFoundError,
            ):
                return

    def _path(self, relative: str) -> str:
        return self._inner + check_relative(self.location, relative)

    @contextmanager
    def _response(self, relative: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        """Send a GET for a file and yield the response before its body; wait while throttled."""
        api, hub = _api(), _hub()
        url = (
            f"{api.endpoint}/datasets/{self.repo}/resolve/{quote(self.revision, safe='')}/"
            f"{quote(self._path(relative))}"
        )
        own = {**hub.utils.build_hf_headers(token=api.token), **(headers or {})}
        with (
            self._explained("read", relative),
            hub.utils.http_stream_backoff(
                "GET", url, headers={**own, "Accept-Encoding": "identity"}, follow_redirects=True
            ) as response,
        ):
            if response.status_code == 416:
                raise StoredFileError(self.locate(relative), "ends before the bytes needed")
            hub.utils.hf_raise_for_status(response)
            yield response

    @contextmanager
    def _explained(self, doing: str, relative: str) -> Iterator[None]:
        """Convert errors of the Hub to errors with advice."""
        errors, where = _errors(), self.locate(relative) if relative else self.location
        try:
            yield
        except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
            raise NotStored(where, "is missing") from None
        except errors.RepositoryNotFoundError:
            raise NotStored(
                where,
                "is missing (no such dataset repository, or HF_TOKEN has no access to it)",
            ) from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            advice = (
                "set HF_TOKEN to a token with this permission"
                if status in (401, 403)
                else "run the same command again later; what was committed is kept"
            )
            raise EnvironmentFault(
                f"cannot {doing} {where}: the Hub answers {status}; {advice}"
            ) from None
        except _network_errors() as error:
            raise EnvironmentFault(
                f"cannot {doing} {where}: {type(error).__name__}. Check the network, then run the"
                " same command again; what was committed is kept"
            ) from None


@functools.cache
def _hub() -> Any:
    """Import huggingface_hub when it is first used, because the import takes time."""
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


def _errors() -> Any:
    return _hub().errors


@functools.cache
def _api() -> Any:
    """Return the client, made from the environment at the first call."""
    return _hub().HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@functools.cache
def _network_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the HTTP library that huggingface_hub uses."""
    from huggingface_hub.utils._http import _DEFAULT_RETRY_ON_EXCEPTIONS

    return (OSError, *_DEFAULT_RETRY_ON_EXCEPTIONS)
