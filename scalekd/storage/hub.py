"""Dataset repositories of the Hugging Face Hub, through huggingface_hub.

A repository is a git history: every write is a commit, commits are made one after another, and
many small ones are refused. So files are best written together (:meth:`HubStorage.commit_all`), in
commits of at most 50: the Hub recommends fewer than 100 files a commit
(https://huggingface.co/docs/hub/storage-limits). A commit names the one it follows, so that what
must not be replaced is not, however many write.
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
_ATTEMPTS = 20  # at a commit that others keep getting in front of


class HubStorage(Storage):
    """Files of a dataset repository, or below a folder of it.

    Endpoint and token are those of huggingface_hub (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth
    login``). A repository that does not exist is made by the first commit, private.

    Args:
        url: ``hf://datasets/owner/name``, ``hf://datasets/owner/name@revision/folder``.

    Raises:
        UsageError: The URL is another, or huggingface_hub is not installed.
    """

    commits_together = True

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url.rstrip("/"))
        if found is None:
            raise UsageError(f"{url}: not of the form hf://datasets/owner/name[@revision][/folder]")
        self.place = url.rstrip("/")
        self.repo, self.revision = found["repo"], found["revision"] or "main"
        self._inner = f"{check_relative(url, found['inner'])}/" if found["inner"] else ""
        _hub()

    def below(self, folder: str) -> "HubStorage":
        return HubStorage(self.locate(check_relative(self.place, folder)))

    def read(self, relative: str, *, max_bytes: int, sha256: str | None = None) -> bytes:
        del sha256
        with self._asked(relative) as response:
            size = int(response.headers.get("Content-Length", -1))
            if size > max_bytes:
                raise StoredFileError(
                    self.locate(relative), f"has {size:,} bytes, more than {max_bytes:,} allowed"
                )
            data = bytearray()
            for piece in response.iter_bytes(_PIECE_BYTES):
                data += piece
                if len(data) > max_bytes:
                    raise StoredFileError(
                        self.locate(relative), f"has more than the {max_bytes:,} bytes allowed"
                    )
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
        with self._asked(relative, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            data = b"".join(response.iter_bytes(_PIECE_BYTES))
        if len(data) != length:
            raise StoredFileError(
                self.locate(relative), f"gave {len(data):,} bytes where {length:,} were asked for"
            )
        return data

    def stream(self, relative: str) -> Iterator[bytes]:
        with self._asked(relative) as response:
            yield from response.iter_bytes(_PIECE_BYTES)

    def describe(self, relative: str) -> StoredFile | None:
        path = self._path(relative)
        with self._explained("look at", relative):
            try:
                found = _api().get_paths_info(
                    self.repo, [path], revision=self.revision, repo_type="dataset"
                )
            except _errors().RepositoryNotFoundError:
                return None
            except _errors().RevisionNotFoundError:
                return None
        for entry in found:
            if entry.path == path and hasattr(entry, "size"):
                return StoredFile(relative, entry.size, 0.0, entry.blob_id)
        return None

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        yield from self._files(self._tree(prefix, recursive=True))

    def files(self, prefix: str = "") -> Sequence[StoredFile]:
        found = self._files(self._tree(prefix, recursive=False))
        return sorted(found, key=lambda file: file.path)

    def _files(self, entries: Iterator[Any]) -> Iterator[StoredFile]:
        for entry in entries:
            if hasattr(entry, "size"):
                path = entry.path.removeprefix(self._inner)
                yield StoredFile(path, entry.size, 0.0, entry.blob_id)

    def folders(self, prefix: str = "") -> Sequence[str]:
        found = self._tree(prefix, recursive=False)
        return sorted(e.path.rpartition("/")[2] for e in found if not hasattr(e, "size"))

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
        """One commit; with ``exclusive`` it holds only what its parent does not have."""
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
                        continue  # another commit came in between
                    raise
                return set(new)
        raise EnvironmentFault(
            f"cannot write {self.locate(first)}: others commit to this repository all the time;"
            " run the same command again later, what was committed is kept"
        )

    def _missing(self, files: dict[str, bytes], head: str) -> dict[str, bytes]:
        paths = {self._path(path): path for path in files}
        found = _api().get_paths_info(self.repo, [*paths], revision=head, repo_type="dataset")
        standing = {paths[entry.path] for entry in found if entry.path in paths}
        return {path: data for path, data in files.items() if path not in standing}

    def _tree(self, prefix: str, *, recursive: bool) -> Iterator[Any]:
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
        return self._inner + check_relative(self.place, relative)

    @contextmanager
    def _asked(self, relative: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        """The answer to a GET of a file, its body not read yet; throttling is waited out."""
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
        """Turn what the Hub answers into one line that says what to do."""
        errors, where = _errors(), self.locate(relative) if relative else self.place
        try:
            yield
        except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
            raise NotStored(where, "is missing") from None
        except errors.RepositoryNotFoundError:
            raise NotStored(
                where,
                "is missing (no such dataset repository, or HF_TOKEN does not open it)",
            ) from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            advice = (
                "set HF_TOKEN to a token that may do this"
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
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UsageError(
            "hf:// needs the package huggingface_hub: pip install 'scalekd[remote]'"
        ) from None
    return huggingface_hub


def _errors() -> Any:
    return _hub().errors


@functools.cache
def _api() -> Any:
    """The client, of the environment as it is when first asked for."""
    return _hub().HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@functools.cache
def _network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of huggingface_hub raises, whichever it uses."""
    from huggingface_hub.utils._http import _DEFAULT_RETRY_ON_EXCEPTIONS

    return (OSError, *_DEFAULT_RETRY_ON_EXCEPTIONS)
