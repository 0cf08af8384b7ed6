"""What the Hub says of a repository, and its errors in words that help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import HfApi, ModelInfo, RepoFile
from huggingface_hub import errors as hub
from huggingface_hub.utils.tqdm import tqdm

from mlaconvert.errors import InputError, MLAConvertError, OutputError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"


@dataclass(frozen=True, kw_only=True)
class RemoteFiles:
    """A repository as it was seen at commit `sha`."""

    private: bool
    sha: str | None
    files: Mapping[str, RepoFile]

    @property
    def is_empty(self) -> bool:
        """Nothing but what the Hub itself puts into a new repository, such as after an interrupted first push."""
        return set(self.files) <= {".gitattributes"}


def look(api: HfApi, repo: str) -> RemoteFiles | None:
    """The repository as it is now, None when there is none."""
    try:
        info: ModelInfo = api.model_info(repo)
    except hub.RepositoryNotFoundError:
        return None
    entries = api.list_repo_tree(repo, recursive=True, revision=info.sha) if info.sha else []
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return RemoteFiles(private=bool(info.private), sha=info.sha, files=files)


def check_visibility(repo: str, remote: RemoteFiles, public: bool) -> None:
    """A push never changes who can see a repository, and never publishes by accident."""
    if public and remote.private:
        raise OutputError(f"{repo} is private: leave --public out, or make it public in its settings on the Hub first")
    if not public and not remote.private:
        raise OutputError(f"{repo} is public: everybody would see the files; pass --public if that is meant")


@contextmanager
def bars_closed() -> Iterator[None]:
    """End the client's progress bars, which it leaves open in the middle of a line when a transfer fails."""
    try:
        yield
    finally:
        for bar in tuple(getattr(tqdm, "_instances", ())):
            if isinstance(bar, tqdm):  # the client's class: a caller's own bars stay
                bar.close()


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except hub.RepositoryNotFoundError:
        raise InputError(f"{repo} is not on the Hub, or your login may not see it; {LOGIN}") from None
    except Exception as error:  # each HTTP library has its own class for a lost connection
        # An upload's error comes wrapped in one that only names the file.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        status = cause.response.status_code if isinstance(cause, hub.HfHubHTTPError) else 0
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")[:200]
        if status == 401:
            raise InputError(f"the Hub rejected the login; {LOGIN}") from None
        if status == 403:
            raise InputError(f"your login may not do this to {repo}; {LOGIN}") from None
        if status in (409, 412):
            raise OutputError(
                f"{repo} was changed by somebody else just now, so nothing was published; look at it and push again"
            ) from None
        if status == 400 or isinstance(cause, ValueError):
            raise InputError(
                f"{repo}: the Hub refused the files or the card ({reason}); nothing was published"
            ) from None
        what = f"the Hub answered with status {status}" if status else "the connection to the Hub failed"
        detail = "" if status else f" ({type(cause).__name__}: {reason})"
        raise MLAConvertError(
            f"{repo}: {what}{detail}; nothing is half published. Push again later: what arrived is not sent twice"
        ) from None
