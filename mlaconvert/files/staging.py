"""The hidden folder in which an output is made: one naming rule, one lock and one way to put it in place.

Beside an output NAME lie `.NAME.partial` while a command writes it, with a note of which command that is, and
`.NAME.replaced`, for a moment, while it takes the place of an older one. What a killed run left there only goes to the
same command.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlaconvert.errors import InputError, OutputError, is_plain
from mlaconvert.files.inputs import read_json, refuse_links
from mlaconvert.files.whole import PARTIAL, sync_file, sync_folder, write_whole

_LOCK, _OWNER, _TRASH = "lock", "owner.json", "trash"
_TRIES = 100  # to lock a folder that other runs remove meanwhile
_LONGEST_NAME = 255 - len("..replaced")  # bytes of an output's name


class Staging:
    """The hidden folder of the output `path`, for one `command`.

    What will be put in place is made in `content`, the folder `inside` it; `folder` may hold notes of the command's
    own. A lock, which the system lets go of when its process dies, tells a run that works there from one that was
    killed. Raises OutputError for a path that no output can have.
    """

    def __init__(
        self, path: str | os.PathLike[str], command: str, *, overwrite: bool = False, inside: str = "model"
    ) -> None:
        self.path, self.command, self.overwrite = Path(path), command, overwrite
        self.target = Path(path).expanduser().resolve()
        name = self.target.name
        if not name or len(os.fsencode(name)) > _LONGEST_NAME:
            raise OutputError(f"{path}: an output cannot have this name; choose another, shorter one")
        self.folder = self.target.with_name(f".{name}.partial")
        self.content = self.folder / inside
        self._aside = self.target.with_name(f".{name}.replaced")
        self._lock: int | None = None
        self._is_open = False

    # --- may it be written? --------------------------------------------------------------------------------------

    def check(self, needed: int, *, kind: str, replaceable: Callable[[Path], bool]) -> None:
        """Raise OutputError when `path` may not be written, or `needed` bytes have no room; changes nothing.

        Overwriting deletes: only what is `replaceable`, folders of this `kind`, is ever replaced.
        """
        self.check_parent()
        if not os.access(self.target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path}: the folder {self.target.parent} is not writable")
        if self.target.exists():
            if not self.overwrite:
                raise OutputError(f"{self.path} exists; choose another path, or pass --overwrite to replace it")
            if not replaceable(self.target):
                raise OutputError(f"{self.path} is not a {kind} folder, so it is not replaced; choose another path")
        elif self._aside.exists() and not self.overwrite:
            raise OutputError(
                f"{self._aside} is the {kind} that an interrupted run was replacing: go on with --overwrite, "
                "or rename it back"
            )
        if self.folder.exists():
            with disk_errors(self.path), suppress(FileNotFoundError):  # its run may end meanwhile
                self._check_folder()
        free = shutil.disk_usage(self.target.parent).free
        missing = needed - _allocated(self.content)
        if missing > free:
            raise OutputError(
                f"{self.path}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on its disk; "
                "make room or choose another disk"
            )

    def check_parent(self) -> None:
        """Raise OutputError when there is no folder to put the output into."""
        if not self.target.parent.is_dir():
            raise OutputError(f"{self.path}: its parent folder {self.target.parent} does not exist; create it first")

    def left(self) -> set[str]:
        """Names of what runs of the command left in the folder, but for what this class keeps there."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return {name for name in names if not name.endswith(PARTIAL)} - {_LOCK, _OWNER, _TRASH}

    def owner(self) -> str | None:
        """The command that the folder belongs to; None when nothing in it can be gone on from.

        Raises OutputError for a folder that no command made.
        """
        left, locked = self.left(), (self.folder / _LOCK).is_file()
        if (self.folder / _OWNER).exists():
            with suppress(InputError):
                command = read_json(self.folder / _OWNER).get("command")
                if isinstance(command, str) and is_plain(command) and command:
                    return command
        # Earlier versions left no note.
        elif locked and "run.json" in left:
            return "convert"
        elif left & {"progress.json", "latents.safetensors"}:
            return "generate"
        elif not left or (locked and left == {"model"}):
            return None
        raise OutputError(f"{self.folder} is in the way: delete it, or choose another path than {self.path}")

    def _check_folder(self) -> None:
        """Raise OutputError unless the folder is this command's or nobody's, and no other run works there."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise OutputError(f"{self.folder} is in the way: delete it, or choose another path than {self.path}")
        for folder in (self.folder, self.content, *self.content.glob("*/")):
            refuse_links(folder)
        owner = self.owner()
        if not self._is_open and (self.folder / _LOCK).is_file():
            self._acquire(shared=True)  # several processes may look at once
            self.close()
        if owner not in (None, self.command):
            raise OutputError(
                f"{self.folder} is what an interrupted mlaconvert {owner} left: go on with that command, delete it, or "
                f"choose another path than {self.path}"
            )

    # --- the work ------------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Take the folder, with what a killed run of this command left; whether there was one.

        Raises OutputError when another run or another command has it, or OSError.
        """
        for _ in range(_TRIES):
            self.folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # the run before removes it meanwhile
                self._check_folder()
                self._is_open = self._acquire()
            if self._is_open:
                break
        else:
            raise OutputError(f"{self.folder}: it cannot be locked on this disk; choose another path than {self.path}")
        try:
            self._check_folder()  # nobody else changes it from here on
            interrupted = self.owner() is not None
        except BaseException:
            self.close()
            raise
        try:
            if not (self.folder / _OWNER).exists():
                write_whole(self.folder / _OWNER, (json.dumps({"command": self.command}) + "\n").encode())
            if self._aside.exists():  # a run was killed while it replaced the old output, or just after
                if self.target.exists():
                    self._discard(self._aside)
                else:
                    self._aside.rename(self.target)
        except BaseException:
            self.close() if interrupted else self.remove()
            raise
        return interrupted

    @contextmanager
    def held(self) -> Iterator[bool]:
        """The folder open for a block; what is not published by its end is thrown away. Yields what `open` returns."""
        with disk_errors(self.path):
            interrupted = self.open()
        try:
            yield interrupted
        finally:
            self.remove()

    def clear(self) -> None:
        """Throw away what the folder holds, the content first. Raises OSError."""
        if self.content.exists():
            self._discard(self.content)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_LOCK, _OWNER):
                path.unlink()

    def publish(self, name: str | None = None) -> None:
        """Put the content, or only its file `name`, in the place of `path` and remove the hidden folder.

        Whenever the process or the machine stops, the old output or the new one is there, or can be taken up again.
        Raises OSError; all is then as it was.
        """
        made = self.content if name is None else self.content / name
        _sync(made)
        if self.target.exists() and not self.overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))
        if name is not None:
            made.replace(self.target)
        elif self.target.exists():
            self._swap(made)
        else:
            made.rename(self.target)
        with suppress(OSError):  # it is in place; some network disks cannot sync a folder
            sync_folder(self.target.parent)
        with suppress(OSError):
            if self._aside.exists():
                self._discard(self._aside)
        self.remove()

    def remove(self) -> None:
        """Throw the folder away, if it is open, and let go of it; the lock goes last, so that nobody comes between."""
        if not self._is_open:  # published, or another's by now
            return
        with suppress(OSError):
            self.clear()
            (self.folder / _OWNER).unlink(missing_ok=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the folder and leave it as it is."""
        self._is_open = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _swap(self, made: Path) -> None:
        self.target.rename(self._aside)
        try:
            made.rename(self.target)
        except BaseException:
            self._aside.rename(self.target)
            raise

    def _discard(self, folder: Path) -> None:
        """Delete a folder that nobody ever sees half deleted."""
        trash = self.folder / _TRASH
        if trash.exists():
            shutil.rmtree(trash)
        with suppress(OSError):
            folder = folder.rename(trash)
        shutil.rmtree(folder)

    def _acquire(self, *, shared: bool = False) -> bool:
        """Take the lock; False when the run before removed it meanwhile. Raises OutputError when a run has it."""
        path = self.folder / _LOCK
        if sys.platform == "win32":
            path.touch()
            return True
        import fcntl

        try:
            handle = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT), 0o666)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"{self.folder} is there: another run is writing {self.path}; wait for it, or choose another path"
                f"{self._whose()}"
            ) from None
        except OSError:
            pass  # a network disk without locks
        try:
            same = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            os.close(handle)
            return False
        self._lock = handle
        return True

    def _whose(self) -> str:
        """Whose run it is, in brackets."""
        try:
            owner = self.owner()
        except (OSError, OutputError):
            return ""
        return f" (it is mlaconvert {owner})" if owner else ""


@contextmanager
def claim(path: str | os.PathLike[str], command: str) -> Iterator[bool]:
    """Keep every other run from an output that `command` writes file by file, each whole; nothing is put in place.

    Yields whether a run of this command was killed here. A folder of which only the inside may be written, such as a
    mounted disk, holds its own hidden folder. Raises OutputError when another run or command has the output.
    """
    staging = Staging(path, command)
    staging.check_parent()
    parent = staging.target.parent
    if not os.access(parent, os.W_OK | os.X_OK) and staging.target.is_dir():
        staging.folder = staging.target / staging.folder.name
    with staging.held() as interrupted:
        yield interrupted


def visible(folder: Path) -> list[Path]:
    """What a folder holds, but for the hidden folder that a `claim` may have put there."""
    return [path for path in folder.iterdir() if path.name != f".{folder.resolve().name}.partial"]


@contextmanager
def disk_errors(path: Path, fate: str = "nothing was left there") -> Iterator[None]:
    """Turn an OSError into an OutputError about `path` that says what became of the work."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: writing failed ({error.strerror or error}); {fate}") from None


def _sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk. Raises OSError."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        sync_folder(path)
    else:
        sync_file(path)


def _allocated(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk already; holes in them take none."""
    files = folder.rglob("*.safetensors") if folder.is_dir() else ()
    return sum(512 * getattr(file.stat(), "st_blocks", 0) for file in files)
