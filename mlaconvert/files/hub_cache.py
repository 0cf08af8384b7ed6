"""Files of a Hub repository, downloaded into the Hub client's own cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mlaconvert.errors import CheckpointError
from mlaconvert.files.headers import read_index
from mlaconvert.files.inputs import reason_of
from mlaconvert.files.names import CONFIG_NAME, CONVERSION_NAME, HEALING_NAME, is_hidden, is_index
from mlaconvert.files.select import block_files, local_path, select


def checked_subfolder(subfolder: str) -> str:
    """`subfolder` in plain form. Raises CheckpointError for one that leads outside."""
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"subfolder {subfolder!r} leads outside the source; give a folder inside it")
    return str(inside)


def split_hub_id(source: str) -> tuple[str, str]:
    """("user/repo", "path/inside or nothing")."""
    user, name, *inside = source.rstrip("/").split("/")
    return f"{user}/{name}", "/".join(inside)


def list_repo(repo: str, revision: str | None) -> list[str]:
    """File names of a Hub repo; those in the local cache when the Hub is out of reach."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with _hub_errors(repo, revision):
        try:
            siblings = HfApi().model_info(repo, revision=revision).siblings or []
            return [file.rfilename for file in siblings]
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:  # no network: each HTTP library has its own class
            # The pattern asks for no file: this only finds the cached snapshot, complete or not.
            try:
                found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["//"])
            except Exception:
                raise error from None
            return [p.relative_to(found).as_posix() for p in Path(found).rglob("*") if p.is_file()]


def download(source: str, revision: str | None, subfolder: str | None) -> tuple[Path, str]:
    """Fetch what `source` names, with the config and records beside it: path of weight file or index, the commit."""
    repo, inside = split_hub_id(source)
    if subfolder:
        inside = f"{inside}/{checked_subfolder(subfolder)}".lstrip("/")
    names = list_repo(repo, revision)
    if inside in names:
        chosen = inside
    else:
        prefix = f"{inside}/" if inside else ""
        below = [n[len(prefix) :] for n in names if n.startswith(prefix) and n[len(prefix) :].count("/") < 3]
        if not below:
            raise CheckpointError(f"{repo} on the Hub has no file or folder {inside!r}; check the path and --revision")
        chosen = prefix + select(below, f"{repo}/{inside}".rstrip("/"))
    folder = chosen.rpartition("/")[0]
    beside = (f"{folder}/{name}".lstrip("/") for name in (CONFIG_NAME, CONVERSION_NAME, HEALING_NAME))
    snapshot = _fetch(repo, revision, [chosen, *(name for name in beside if name in names)])
    if is_index(chosen):
        shards = [f"{folder}/{shard}".lstrip("/") for shard in read_index(snapshot / chosen)]
        _fetch(repo, revision, [chosen, *shards])
    elif blocks := block_files(chosen, names):
        _fetch(repo, revision, [chosen, *blocks])
    return snapshot / chosen, snapshot.name


def _fetch(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download files of one repo; the folder in the Hub's cache that they lie in, which is named by their commit."""
    from huggingface_hub import HfApi

    snapshots = set()
    with _hub_errors(repo, revision):
        for name in names:
            snapshots.add(Path(HfApi().hf_hub_download(repo, name, revision=revision)).parents[name.count("/")])
    if len(snapshots) > 1:
        raise CheckpointError(f"{repo} changed on the Hub during the download; run the command again")
    return snapshots.pop()


def list_files(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, ...]:
    """Names of all files of a local folder or a Hub repo, sorted, with "/" between folders. Raises CheckpointError."""
    path = local_path(source, revision)
    if path is not None:
        names = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return tuple(sorted(name for name in names if not is_hidden(name)))
    repo, inside = split_hub_id(str(source))
    prefix = f"{inside}/" if inside else ""
    return tuple(sorted(n[len(prefix) :] for n in list_repo(repo, revision) if n.startswith(prefix)))


def fetch_files(source: str | os.PathLike[str], names: Sequence[str], revision: str | None = None) -> Path:
    """The local folder that holds the files `names` of a folder or Hub repo; what is missing is downloaded.

    Raises CheckpointError.
    """
    path = local_path(source, revision)
    if path is None:
        repo, inside = split_hub_id(str(source))
        prefix = f"{inside}/" if inside else ""
        path = _fetch(repo, revision, [prefix + name for name in names]) / inside
    return path


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        ) from None
    except hub.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: no such path here and no such model on the Hub; check the name, or log in with `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise CheckpointError(f"{repo} on the Hub has no revision {revision!r}; check --revision") from None
    except hub.HFValidationError:
        raise CheckpointError(f"{repo!r} is neither a path here nor a Hub id (user/repo)") from None
    except hub.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{repo} on the Hub lacks a file that it lists ({reason_of(error)})") from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise CheckpointError(f"{repo}: the Hub answered with status {status}; {hint}") from None
    except Exception as error:  # no network, offline mode, disk full: the classes depend on the HTTP library
        raise CheckpointError(
            f"{repo}: no such path here, and it cannot be fetched from the Hub ({type(error).__name__}: "
            f"{reason_of(error)}); check the network, or download it and give its folder"
        ) from None
