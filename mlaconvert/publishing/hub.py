"""Publish a converted model on the Hugging Face Hub: one commit, which holds everything or does not happen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from mlaconvert.errors import InputError, MLAConvertError, OutputError
from mlaconvert.files.inputs import is_file
from mlaconvert.files.names import README_NAME
from mlaconvert.listener import Listener
from mlaconvert.publishing.api import LOGIN, RemoteFiles, bars_closed, check_visibility, hub_errors, look
from mlaconvert.publishing.folder import ModelFolder, gather_facts, read_folder
from mlaconvert.publishing.plan import PushPlan, PushReport, compare_files
from mlaconvert.reports.card import is_generated, write_card

# The client's own rule, which it only applies on the way to the Hub.
_REPO_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(?=.{1,96}$)\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])", re.ASCII)
_SMALL = 1 << 20  # bytes of a file that is handed to the client whole


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What is stated of a model by hand; None is read from the Hub or from the conversion's record."""

    license: str | None = None
    """The Hub's identifier of a licence, such as "apache-2.0"; None is the base model's."""

    base_model: str | None = None
    """The base model on the Hub ("user/name"); None is what the model was converted from."""


@dataclass(frozen=True, kw_only=True)
class PushListener(Listener):
    """Who is told what a push does."""

    on_plan: Callable[[PushPlan], None] | None = None
    """Sees every file and what becomes of it, once all checks have passed and before anything is sent."""


_NOTHING_STATED = Stated()


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    update: bool = False,
    dry_run: bool = False,
    stated: Stated = _NOTHING_STATED,
    api: HfApi | None = None,
    listener: Listener | None = None,
) -> PushReport:
    """Publish the converted model in `folder` as `repo` ("user/name") on the Hub, in one commit.

    push("wan-mla", "alice/wan-mla", stated=Stated(license="apache-2.0"), dry_run=True)

    A repository that is not there is created, private unless `public`. One that holds files is changed only with
    `update`, and only if nobody commits to it meanwhile; what is the same already is not sent, and when everything is,
    nothing happens. Weights and records that the folder has no longer are deleted in the same commit, other files
    stay. An interrupted push changes nothing that can be seen, and when it is run again, files that had arrived whole
    are not sent again.

    The card is generated (`mlaconvert.reports.card`); a README.md edited by hand is kept, the folder's before the
    Hub's. What `stated` leaves out is the base model's own, and the conversion's source.

    A `dry_run` changes nothing anywhere; without a login it does not ask the Hub. `api` is a client with its own
    endpoint or token. Raises CheckpointError or UnsupportedModelError for a folder that is no converted model,
    InputError for a link among what would be sent (nothing outside the folder is) and for a missing or refused login,
    OutputError for a repository that must not be changed, and MLAConvertError when the Hub fails.
    """
    api, told = api or HfApi(), listener or Listener()
    license, base_model = stated.license, stated.base_model
    for name in (repo, base_model) if base_model is not None else (repo,):
        if not _REPO_ID.fullmatch(name):
            raise InputError(f"{name!r} is no name of a model on the Hub; give user/name, such as alice/wan-mla")
    local = read_folder(Path(folder))
    token = api.token if isinstance(api.token, str) else get_token()
    if token is None and not dry_run:
        raise InputError(f"nobody is logged in to the Hub; {LOGIN}")
    remote = None
    if token is not None:
        with hub_errors(repo):
            api.whoami(token)
            remote = look(api, repo)
        if remote is not None:
            check_visibility(repo, remote, public)
    notes: list[str] = []
    facts = gather_facts(api, repo, local, license, base_model, notes, online=token is not None)
    card, card_state = _choose_card(api, repo, local, remote, write_card(facts), notes)
    plan = PushPlan(
        repo=repo,
        private=not public,
        exists=None if token is None else remote is not None,
        parent=remote.sha if remote is not None else None,
        files=tuple(compare_files(local, remote, card, card_state, told.progress)),
        left_out=local.left_out,
        card=card.decode("utf-8", "replace"),
        notes=tuple(notes),
    )
    if isinstance(told, PushListener) and told.on_plan is not None:
        told.on_plan(plan)
    if dry_run or not plan.changes:
        return PushReport(plan=plan, commit_url=None)
    if remote is not None and not remote.is_empty and not update:
        raise OutputError(f"{repo} exists on the Hub and differs from {folder}; pass --update to change it")
    return PushReport(plan=plan, commit_url=_commit(api, plan, local, card, remote))


def _choose_card(
    api: HfApi, repo: str, local: ModelFolder, remote: RemoteFiles | None, generated: str, notes: list[str]
) -> tuple[bytes, Literal["ours", "kept"]]:
    """README.md as it shall be: the folder's if edited by hand, else the Hub's if edited there, else the generated."""
    if README_NAME in local.names:
        with local.open(README_NAME) as stream:
            mine = stream.read()
        if not is_generated(mine.decode("utf-8", "replace")):
            notes.append(f"the folder's {README_NAME} is yours and goes as it is; no card was generated")
            return mine, "ours"
    if remote is not None and README_NAME in remote.files:
        with hub_errors(repo):
            there = Path(api.hf_hub_download(repo, README_NAME, revision=remote.sha)).read_bytes()
        if not is_generated(there.decode("utf-8", "replace")):
            notes.append(f"{README_NAME} was edited on the Hub and stays; no card was generated")
            return there, "kept"
    return generated.encode(), "ours"


def _commit(api: HfApi, plan: PushPlan, local: ModelFolder, card: bytes, remote: RemoteFiles | None) -> str:
    """Create the repository if need be, send the files, and make them visible with one commit; its URL."""
    parent = plan.parent
    if remote is None:
        with hub_errors(plan.repo):
            api.create_repo(plan.repo, private=plan.private)
            fresh = look(api, plan.repo)
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
        with hub_errors(plan.repo), bars_closed():
            info = api.create_commit(
                plan.repo, operations, commit_message="Upload a model converted by mlaconvert", parent_commit=parent
            )
    with hub_errors(plan.repo):
        listed = {entry.path for entry in api.list_repo_tree(plan.repo, recursive=True, revision=info.oid)}
    missing = [file.path for file in plan.changes if file.state != "deleted" and file.path not in listed]
    if missing:
        raise MLAConvertError(
            f"{plan.repo}: the Hub left out {missing[0]}; remove the .gitignore of the repository and push again"
        )
    return str(info.commit_url)


def _content(local: ModelFolder, name: str, opened: ExitStack) -> bytes | str:
    """A file for the client: its bytes, or of a large one a path, good while `opened` is.

    The path is that of the open file where a system has such paths, so that nothing else can take its place.
    """
    stream = opened.enter_context(local.open(name))
    if os.fstat(stream.fileno()).st_size <= _SMALL:
        with stream:
            return stream.read()
    path = f"/proc/self/fd/{stream.fileno()}"
    return path if is_file(Path(path)) else str(local.path / name)
