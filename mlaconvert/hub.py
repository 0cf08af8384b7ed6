"""Publish a converted model on the Hugging Face Hub: one commit, which holds everything or does not happen."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoFile,
    get_token,
)
from huggingface_hub import errors as hub
from huggingface_hub.utils.tqdm import tqdm

from mlaconvert.card import CardFacts, CardModel, base_model_of, is_generated, write_card
from mlaconvert.checkpoint import CONFIG_NAME, CONVERSION_NAME, HEALING_NAME, INDEX_SUFFIX
from mlaconvert.convert import README_NAME, open_models
from mlaconvert.errors import CheckpointError, InputError, MLAConvertError, OutputError
from mlaconvert.evaluate import EVALUATION_NAME
from mlaconvert.families import Checkpoint
from mlaconvert.inputs import is_file, open_inside, read_json

_RECORDS = (CONFIG_NAME, CONVERSION_NAME, HEALING_NAME, EVALUATION_NAME)
_TEXTS = (README_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_SHOWN = (".html", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")  # reports and pictures
_WEIGHTS = re.compile(r"diffusion_pytorch_model[^/]*\.safetensors(\.index\.json)?")
# The client's own rule, which it only applies on the way to the Hub.
_REPO_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(?=.{1,96}$)\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])", re.ASCII)
_SMALL = 1 << 20  # bytes of a file that is handed to the client whole
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"

# progress(stage, done, total) in bytes; stage is "hash".
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """One file of a push. "same" and "kept" stay as they are on the Hub, "kept" being a card edited there."""

    path: str
    size: int  # bytes
    state: Literal["new", "changed", "same", "kept", "deleted"]


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What a push would do to `repo`, decided from the folder and the Hub's state at commit `parent`.

    `exists` is whether the repository is there, None when nobody is logged in to see. `left_out` are files of the
    folder that do not belong to a model. `card` is the README.md as it will be on the Hub, generated or not. `notes`
    are short remarks for the user.
    """

    repo: str
    private: bool
    exists: bool | None
    parent: str | None
    files: tuple[FileChange, ...]
    left_out: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def changes(self) -> tuple[FileChange, ...]:
        """The files that a commit would add, replace or delete."""
        return tuple(file for file in self.files if file.state not in ("same", "kept"))

    @property
    def upload_bytes(self) -> int:
        """Size of the files that a commit would send."""
        return sum(file.size for file in self.changes if file.state != "deleted")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "repo": self.repo,
            "private": self.private,
            "exists": self.exists,
            "files": [{"path": file.path, "bytes": file.size, "state": file.state} for file in self.files],
            "upload_bytes": self.upload_bytes,
            "left_out": list(self.left_out),
            "card": self.card,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """A plan and the URL of the commit that carried it out, None for a dry run or when nothing had changed."""

    plan: PushPlan
    commit_url: str | None


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """A repository as it was seen at commit `sha`."""

    private: bool
    sha: str | None
    files: Mapping[str, RepoFile]

    @property
    def is_empty(self) -> bool:
        """Nothing but what the Hub itself puts into a new repository, such as after an interrupted first push."""
        return set(self.files) <= {".gitattributes"}


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A model folder that opened: the paths in it of the files to send, those of others, and what its card says."""

    path: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    models: tuple[CardModel, ...]

    def open(self, name: str) -> BinaryIO:
        """Open one of its files, which may have become a link since the folder was read."""
        return open_inside(self.path, name)

    def size(self, name: str) -> int:
        """Bytes of one of its files."""
        with self.open(name) as stream:
            return os.fstat(stream.fileno()).st_size


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    update: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    api: HfApi | None = None,
    on_plan: Callable[[PushPlan], None] | None = None,
    progress: Progress | None = None,
) -> PushReport:
    """Publish the converted model in `folder` as `repo` ("user/name") on the Hub, in one commit.

    A repository that is not there is created, private unless `public`. One that holds files is changed only with
    `update`, and only if nobody commits to it meanwhile; what is the same already is not sent, and when everything is,
    nothing happens. Weights and records that the folder has no longer are deleted in the same commit, other files
    stay. An interrupted push changes nothing that can be seen, and when it is run again, files that had arrived whole
    are not sent again.

    The card is generated (`mlaconvert.card`); a README.md edited by hand is kept, the folder's before the Hub's.
    `license` (the Hub's identifier) and `base_model` default to the base model's own and to the conversion's source.

    A `dry_run` changes nothing anywhere; without a login it does not ask the Hub. `api` is a client with its own
    endpoint or token. Raises CheckpointError or UnsupportedModelError for a folder that is no converted model,
    InputError for a link among what would be sent (nothing outside the folder is) and for a missing or refused login,
    OutputError for a repository that must not be changed, and MLAConvertError when the Hub fails.
    """
    api = api or HfApi()
    for name in (repo, base_model) if base_model is not None else (repo,):
        if not _REPO_ID.fullmatch(name):
            raise InputError(f"{name!r} is no name of a model on the Hub; give user/name, such as alice/wan-mla")
    local = _read_folder(Path(folder))
    token = api.token if isinstance(api.token, str) else get_token()
    if token is None and not dry_run:
        raise InputError(f"nobody is logged in to the Hub; {_LOGIN}")
    remote = None
    if token is not None:
        with _hub_errors(repo):
            api.whoami(token)
            remote = _look(api, repo)
        if remote is not None:
            _check_visibility(repo, remote, public)
    notes: list[str] = []
    facts = _gather_facts(api, repo, local, license, base_model, notes, online=token is not None)
    card, card_state = _choose_card(api, repo, local, remote, write_card(facts), notes)
    plan = PushPlan(
        repo=repo,
        private=not public,
        exists=None if token is None else remote is not None,
        parent=remote.sha if remote is not None else None,
        files=tuple(_compare(local, remote, card, card_state, progress)),
        left_out=local.left_out,
        card=card.decode("utf-8", "replace"),
        notes=tuple(notes),
    )
    if on_plan is not None:
        on_plan(plan)
    if dry_run or not plan.changes:
        return PushReport(plan=plan, commit_url=None)
    if remote is not None and not remote.is_empty and not update:
        raise OutputError(f"{repo} exists on the Hub and differs from {folder}; pass --update to change it")
    return PushReport(plan=plan, commit_url=_commit(api, plan, local, card, remote))


# --- the folder --------------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> _Folder:
    """Open the models of a folder as strictly as any other command, and sort its files. Links are refused."""
    path = path.expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a model folder that convert or heal wrote")
    found: set[Path] = set()
    with open_models(path) as checkpoints:
        homes = {subfolder: checkpoint.store.files[0].parent for subfolder, checkpoint in checkpoints.items()}
        for subfolder, checkpoint in checkpoints.items():
            if checkpoint.config.mla is None:
                raise CheckpointError(f"{path / subfolder}: it is a dense model; convert it first")
            sharded = checkpoint.store.path.is_dir()  # else the one weight file
            indexes = homes[subfolder].glob(f"*{INDEX_SUFFIX}") if sharded else ()
            found |= {*checkpoint.store.files, *indexes}
        for file in {file for home in (path, *homes.values()) for file in home.iterdir() if is_file(file)}:
            belongs = file.name in (*_RECORDS, *_TEXTS) or file.suffix.lower() in _SHOWN
            if belongs and not file.name.startswith("."):
                found.add(file)
        names = sorted(file.relative_to(path).as_posix() for file in found)
        for name in names:
            open_inside(path, name).close()
        models = [_card_model(subfolder, each, homes[subfolder]) for subfolder, each in checkpoints.items()]
    every = (file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file())
    left_out = tuple(name for name in every if name not in names)
    return _Folder(path=path, names=tuple(names), left_out=left_out, models=tuple(models))


def _card_model(subfolder: str, checkpoint: Checkpoint, home: Path) -> CardModel:
    return CardModel(
        subfolder=subfolder,
        config=checkpoint.config,
        description=checkpoint.describe(),
        conversion=_record(home / CONVERSION_NAME),
        healing=_record(home / HEALING_NAME),
        evaluation=_record(home / EVALUATION_NAME),
    )


def _record(path: Path) -> dict[str, Any]:
    return read_json(path) if is_file(path) else {}  # the card takes records as far as they go


def _gather_facts(
    api: HfApi,
    repo: str,
    local: _Folder,
    license: str | None,
    base_model: str | None,
    notes: list[str],
    *,
    online: bool,
) -> CardFacts:
    base = base_model or base_model_of(local.models[0].conversion)
    licensed: Mapping[str, str] = {"license": license} if license else {}
    if base is None:
        notes.append("the card names no base model: the source was not read from the Hub; give --base-model USER/REPO")
    elif not licensed and online:
        licensed = _license_of(api, base)
    if base is not None and not licensed and not online:
        notes.append(f"nobody is logged in, so the licence of {base} was not looked up")
    elif not licensed:
        notes.append("the card names no licence: none could be inherited from a base model; give --license ID")
    if any(model.evaluation and not model.figures for model in local.models):
        notes.append(f"{EVALUATION_NAME} holds not exactly one model's results, so the card shows none of them")
    return CardFacts(repo=repo, models=local.models, base_model=base, license=licensed)


def _license_of(api: HfApi, base: str) -> dict[str, str]:
    """The licence fields of a model's card on the Hub, {} when it has none or cannot be seen."""
    with _hub_errors(base):
        try:
            card = api.model_info(base).card_data
        except hub.RepositoryNotFoundError:
            return {}
    names = ("license", "license_name", "license_link")
    found = {name: card.get(name) for name in names} if card is not None else {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if found.get("license") else {}


# --- the Hub's side ----------------------------------------------------------------------------------------------


def _look(api: HfApi, repo: str) -> _Remote | None:
    """The repository as it is now, None when there is none."""
    try:
        info: ModelInfo = api.model_info(repo)
    except hub.RepositoryNotFoundError:
        return None
    entries = api.list_repo_tree(repo, recursive=True, revision=info.sha) if info.sha else []
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return _Remote(private=bool(info.private), sha=info.sha, files=files)


def _check_visibility(repo: str, remote: _Remote, public: bool) -> None:
    """A push never changes who can see a repository, and never publishes by accident."""
    if public and remote.private:
        raise OutputError(f"{repo} is private: leave --public out, or make it public in its settings on the Hub first")
    if not public and not remote.private:
        raise OutputError(f"{repo} is public: everybody would see the files; pass --public if that is meant")


def _choose_card(
    api: HfApi, repo: str, local: _Folder, remote: _Remote | None, generated: str, notes: list[str]
) -> tuple[bytes, Literal["ours", "kept"]]:
    """README.md as it shall be: the folder's if edited by hand, else the Hub's if edited there, else the generated."""
    if README_NAME in local.names:
        with local.open(README_NAME) as stream:
            mine = stream.read()
        if not is_generated(mine.decode("utf-8", "replace")):
            notes.append(f"the folder's {README_NAME} is yours and goes as it is; no card was generated")
            return mine, "ours"
    if remote is not None and README_NAME in remote.files:
        with _hub_errors(repo):
            there = Path(api.hf_hub_download(repo, README_NAME, revision=remote.sha)).read_bytes()
        if not is_generated(there.decode("utf-8", "replace")):
            notes.append(f"{README_NAME} was edited on the Hub and stays; no card was generated")
            return there, "kept"
    return generated.encode(), "ours"


def _compare(
    local: _Folder, remote: _Remote | None, card: bytes, card_state: str, progress: Progress | None
) -> Iterator[FileChange]:
    """What becomes of every file, by the hashes that the Hub lists; only files of equal size are hashed."""
    there = remote.files if remote is not None else {}
    sizes = {name: local.size(name) for name in local.names} | {README_NAME: len(card)}
    alike = {path for path, size in sizes.items() if path in there and there[path].size == size}
    total, hashed = sum(sizes[path] for path in alike), 0

    def count(piece: int) -> None:
        nonlocal hashed
        hashed += piece
        if progress is not None:
            progress("hash", hashed, total)

    for path, size in sorted(sizes.items()):
        state: Literal["new", "changed", "same", "kept"] = "changed" if path in there else "new"
        if path == README_NAME and card_state == "kept":
            state = "kept"
        elif path in alike:
            with io.BytesIO(card) if path == README_NAME else local.open(path) as stream:
                state = "same" if _same(stream, size, there[path], count) else state
        yield FileChange(path=path, size=size, state=state)
    for path in sorted(there.keys() - sizes.keys()):
        if _is_stale(path, there):
            yield FileChange(path=path, size=there[path].size, state="deleted")


def _is_stale(path: str, there: Mapping[str, RepoFile]) -> bool:
    """Whether a file that the folder has no longer may not stay beside the new ones.

    A stale index or shard would be read in place of the new weights, stale figures would speak of other weights. Only
    in folders that an earlier push wrote; a VAE beside the model, for one, is left alone.
    """
    folder, _, name = path.rpartition("/")
    ours = f"{folder}/{CONVERSION_NAME}".lstrip("/") in there
    return ours and (name in _RECORDS or _WEIGHTS.fullmatch(name) is not None)


def _same(stream: BinaryIO, size: int, old: RepoFile, count: Callable[[int], None]) -> bool:
    """Whether `stream` has the Hub's file: large files are known by their SHA-256, others by git's hash."""
    digest = hashlib.sha256() if old.lfs is not None else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while piece := stream.read(1 << 22):
        digest.update(piece)
        count(len(piece))
    return digest.hexdigest() == (old.lfs.sha256 if old.lfs is not None else old.blob_id)


def _commit(api: HfApi, plan: PushPlan, local: _Folder, card: bytes, remote: _Remote | None) -> str:
    """Create the repository if need be, send the files, and make them visible with one commit; its URL."""
    parent = plan.parent
    if remote is None:
        with _hub_errors(plan.repo):
            api.create_repo(plan.repo, private=plan.private)
            fresh = _look(api, plan.repo)
        if fresh is None or not fresh.is_empty:
            raise OutputError(f"{plan.repo} was changed by somebody else just now; look at it and run the push again")
        parent = fresh.sha
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    with ExitStack() as opened:
        for file in plan.changes:
            if file.state == "deleted":
                operations.append(CommitOperationDelete(path_in_repo=file.path))
            else:
                data = card if file.path == README_NAME else _content(local, file.path, opened)
                operations.append(CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=data))
        with _hub_errors(plan.repo), _bars_closed():
            info = api.create_commit(
                plan.repo, operations, commit_message="Upload a model converted by mlaconvert", parent_commit=parent
            )
    with _hub_errors(plan.repo):
        listed = {entry.path for entry in api.list_repo_tree(plan.repo, recursive=True, revision=info.oid)}
    missing = [file.path for file in plan.changes if file.state != "deleted" and file.path not in listed]
    if missing:
        raise MLAConvertError(
            f"{plan.repo}: the Hub left out {missing[0]}; remove the .gitignore of the repository and push again"
        )
    return str(info.commit_url)


def _content(local: _Folder, name: str, opened: ExitStack) -> bytes | str:
    """A file for the client: its bytes, or of a large one a path, good while `opened` is.

    The path is that of the open file where a system has such paths, so that nothing else can take its place.
    """
    stream = opened.enter_context(local.open(name))
    if os.fstat(stream.fileno()).st_size <= _SMALL:
        with stream:
            return stream.read()
    path = f"/proc/self/fd/{stream.fileno()}"
    return path if is_file(Path(path)) else str(local.path / name)


@contextmanager
def _bars_closed() -> Iterator[None]:
    """End the client's progress bars, which it leaves open in the middle of a line when a transfer fails."""
    try:
        yield
    finally:
        for bar in tuple(getattr(tqdm, "_instances", ())):
            if isinstance(bar, tqdm):  # the client's class: a caller's own bars stay
                bar.close()


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except hub.RepositoryNotFoundError:
        raise InputError(f"{repo} is not on the Hub, or your login may not see it; {_LOGIN}") from None
    except Exception as error:  # each HTTP library has its own class for a lost connection
        # An upload's error comes wrapped in one that only names the file.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        status = cause.response.status_code if isinstance(cause, hub.HfHubHTTPError) else 0
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")[:200]
        if status == 401:
            raise InputError(f"the Hub rejected the login; {_LOGIN}") from None
        if status == 403:
            raise InputError(f"your login may not do this to {repo}; {_LOGIN}") from None
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
