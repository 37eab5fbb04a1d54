# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A copy in a directory that follows its source: at one point, with all its disks, whatever happens.

    DIR/vda.qcow2, ...
    DIR/.vnb-apply.state    JSON: the point, and what the images were like when they were brought there
    DIR/.vnb-apply.spool    a segment that is being applied
    DIR/.vnb-apply.lock     locked by who works on it

The first segment, a full, makes new images, as without --update. Each one after it goes to a spool file first, every
frame of it checked. Only when its end is verified and it is synced does it get its name. From then on it will be
applied: to write the same bytes to the same places twice is the same as once, so after a crash it is applied again,
from its start. The state says the old point until all of it is durable. So:

    before the spool has its name     all disks are at the old point, nothing of the segment stays
    until the state is replaced       the disks are between the points: the next run, or --resume, goes on
    after that                        all disks are at the new point, the spool is not needed
"""

from __future__ import annotations

import json
import os
import stat

from vnb.base import log
from vnb.base.durable import sync_directory
from vnb.base.errors import Error, os_error
from vnb.format import codec, rules, stream, values, writing
from vnb.restore.imagedir import ImageDirectory, lock_file
from vnb.restore.restore import Restore, undisturbed
from vnb.restore.targets import NewImage, StandbyImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vnb.format.stream import Segment
    from vnb.format.types import Head
    from vnb.restore.targets import Recipe
    from vnb.restore.writer import Buffers


STATE = ".vnb-apply.state"
SPOOL = ".vnb-apply.spool"
LOCK = ".vnb-apply.lock"
VERSION = 1
HISTORY = 10000  # points that are remembered, so that their segments are known again


class Standby:
    """
    The copy in a directory.

    recipe: of images that are made. chosen: see vnb.restore.restore.Restore.
    words: the options that say what the copy is; each run has to give the same.
    buffers (Buffers): the Reader's.
    """

    def __init__(
        self, path: str, recipe: Recipe, chosen: dict[str, Callable[[str], Any] | None], words: list[str],
        buffers: Buffers,
    ) -> None:
        self.path = path
        self._restore = (recipe, chosen, buffers)
        self._chosen = chosen
        self._words = words
        self._buffers = buffers
        self._reached = False
        self._skipped: str | None = None  # a point that was passed over and is not known
        self._directory: Any = None
        self._lock: int | None = None
        self._state: Any = None

    def __enter__(self) -> Standby:
        try:
            self._directory = ImageDirectory(self.path)
            self._lock = lock_file(self._directory.final(LOCK), os.O_CREAT)
            if self._lock is None:
                raise Error(self.path, "another vnb-apply works on this copy")
            self._state = self._load()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise os_error(self.path, error) from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        except BaseException:
            self._close()  # a signal; there is no second one
            raise

    def _close(self) -> None:
        if self._lock is not None:
            if not os.path.lexists(self._directory.final(STATE)):
                os.unlink(self._directory.final(LOCK))
            lock, self._lock = self._lock, None
            os.close(lock)
        if self._directory is not None:
            self._directory.close()

    def resume(self) -> None:
        """Finish what another run could not. Raises Error."""
        path = self._directory.final(SPOOL)
        if not os.path.lexists(path):
            return
        fd = _open(path)
        try:
            head = next(iter(stream.Reader(fd, path))).head
        finally:
            os.close(fd)
        if head["point"] != self._state["point"]:
            log.note(f'{self.path}: going on with {head["point"]}, whose update was interrupted')
            self._apply_spool()
        self._remove_spool()

    def take(self, segment: Segment) -> None:
        """Apply a segment that leads on from the point reached; pass over one that leads there. Raises Error."""
        if self._state["point"] is None:
            self._make(segment)
        elif self._is_passed_over(segment.head):
            for frame in segment:
                self._give(frame)
        else:
            self._check_unchanged()
            with Replay(self.path, *self._restore, self._state) as replay:
                taking = replay.check(segment)
            self._fill_spool(segment)
            self._commit_spool(taking)
            self._apply_spool()
            self._remove_spool()
        self._reached = self._reached or self._state["point"] == segment.head["point"]

    def check_reached(self) -> None:
        """All segments are there. Raises Error if they lead to another point than the copy's."""
        if not self._reached and self._skipped is not None:
            raise Error("stdin", f'ends at {self._skipped}, {self.path} holds {self._state["point"]}')

    def _is_passed_over(self, head: Head) -> bool:
        """Whether a segment leads to a point that the copy has reached; False if it leads on. Raises Error."""
        state, point = self._state, head["point"]
        if head["uuid"] != state["uuid"]:
            raise Error(
                "stdin", f'{point} is of another domain ({head["domain"]}, {head["uuid"]}) '
                f'than {self.path} ({state["domain"]}, {state["uuid"]})',
            )
        if point in state["history"]:
            self._reached = True
            return True
        if head["parent"] == state["point"]:
            return False
        if not self._reached and head["created"] <= state["created"]:
            # Older, and none of those that were applied here. What follows may lead to where we are all the same.
            self._skipped = point
            return True
        does = f'follows {head["parent"]}' if head["parent"] else "is a full backup of its own"
        raise Error("stdin", f'{point} {does}, {self.path} holds {state["point"]}')

    def _make(self, segment: Segment) -> None:
        """Make the copy from a full."""
        with Restore(self.path, *self._restore) as restore:
            for file_name in self._state["taking"]:
                # They were named, and then we were killed before the state could say of what point they are.
                _unlink(self._directory.final(file_name))
            restore.apply(segment)
            restore.finish()
            with undisturbed(last=False):
                self._save({**self._state, "taking": restore.file_names()})
                try:
                    restore.publish()
                except Error:
                    _unlink(self._directory.final(STATE))
                    raise
                self._save_reached(segment, restore)

    def _fill_spool(self, segment: Segment) -> None:
        """Write a segment to the spool, every byte checked, and make it durable."""
        path = self._directory.final(SPOOL)
        names = [disk["name"] for disk in segment.disks]
        try:
            fd = os.open(self._directory.partial(SPOOL), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise os_error(path, error) from None
        try:
            spool = writing.Writer(fd, path)
            for raws in (segment.front, segment.raws()):
                for raw in raws:
                    if type(raw.frame) is values.Data:
                        codec.plain(raw.frame, names[raw.frame.disk])
                    spool.write(raw.header, raw.payload)
                    if raw.payload is not None:
                        self._buffers.give(raw.payload)
            spool.flush()
            os.fsync(fd)
        except OSError as error:
            raise os_error(path, error) from None
        finally:
            os.close(fd)

    def _commit_spool(self, taking: list[str]) -> None:
        """From here on the segment will be applied. taking: names of files that nobody had before."""
        with undisturbed(last=False):
            self._save({**self._state, "taking": taking})
            self._directory.replace([SPOOL])

    def _apply_spool(self) -> None:
        path = self._directory.final(SPOOL)
        fd = _open(path)
        try:
            # It has one segment, which may be said to have another one after it.
            segment = next(iter(stream.Reader(fd, path, stage="data", consumer=True, pool=self._buffers)))
            with Replay(self.path, *self._restore, self._state) as replay:
                replay.apply(segment)
                replay.finish()
                with undisturbed(last=False):
                    replay.publish()
                    self._save_reached(segment, replay)
        finally:
            os.close(fd)

    def _remove_spool(self) -> None:
        _unlink(self._directory.final(SPOOL))
        try:
            sync_directory(self.path)
        except OSError as error:
            raise os_error(self.path, error) from None

    def _check_unchanged(self) -> None:
        """Raise Error if an image is not as it was left: an increment to something else makes nothing of sense."""
        for disk in self._state["disks"].values():
            for file_name, stamp in disk["files"].items():
                path = self._directory.final(file_name)
                if _stamp(path) != stamp:
                    raise Error(path, f'was changed since it was brought to {self._state["point"]}')

    def _save_reached(self, segment: Segment, restore: Restore) -> None:
        """Make durable that the copy is at a segment's point."""
        head: Any = segment.head
        disks = {}
        for disk in segment.disks:
            names: Any = ()
            if disk["name"] in restore.disks:
                before = self._state["disks"].get(disk["name"], {"files": ()})
                names = restore.disks[disk["name"]].place.file_names or before["files"]
            files = {name: _stamp(self._directory.final(name)) for name in names}
            disks[disk["name"]] = {"size": disk["size"], "files": files}
        # Of disks that are not part of this point. One that comes back, in full, takes its place again.
        left = {**self._state.get("left", {}), **self._state["disks"]}
        self._save({
            **{key: head[key] for key in ("uuid", "domain", "point", "created")},
            "history": [*self._state["history"], head["point"]][-HISTORY:],
            "disks": disks,
            "left": {name: disk for name, disk in left.items() if name not in disks},
            "taking": [],
        })

    def _save(self, state: dict[str, Any]) -> None:
        path, partial = self._directory.final(STATE), self._directory.partial(STATE)
        state = {**state, "version": VERSION, "options": self._words}
        try:
            fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                file.flush()
                os.fsync(fd)
            self._directory.replace([STATE])
        except OSError as error:
            raise os_error(path, error) from None
        self._state = state

    def _load(self) -> dict[str, Any]:
        path = self._directory.final(STATE)
        if not os.path.lexists(path):
            return {"point": None, "history": [], "disks": {}, "taking": []}
        try:
            with open(_open(path), encoding="utf-8") as file:
                state = json.load(file)
        except (ValueError, RecursionError) as error:
            raise Error(path, f"not the state of a copy ({error})") from None
        if not isinstance(state, dict) or state.get("version") != VERSION or not _is_sound(state):
            raise Error(path, "not the state of a copy that this vnb knows")
        if state["options"] != self._words:
            said = " ".join(state["options"])
            raise Error(self.path, f"was made with other options, and needs the same again: {said}")
        return state

    def _give(self, frame: object) -> None:
        payload = getattr(frame, "payload", None)
        if payload is not None:
            self._buffers.give(payload)


class Replay(Restore):
    """A restore that goes on from the state of a copy."""

    def __init__(
        self, path: str, recipe: Recipe, chosen: dict[str, Callable[[str], Any] | None], buffers: Buffers, state: Any,
    ) -> None:
        super().__init__(path, recipe, chosen, buffers)
        self._state = state
        self._path = path
        head: Any = {key: state[key] for key in ("uuid", "domain", "point")}
        disks: Any = {name: {"name": name, "size": disk["size"]} for name, disk in state["disks"].items()}
        self.follow.head, self.follow.disks = head, disks

    def check(self, segment: Segment) -> list[str]:
        """Raise Error if a segment cannot be applied; the names of the files that it will add."""
        before = self.follow.disks
        self.follow.accept(segment.head, segment.disks)
        disks = {disk["name"]: disk for disk in segment.disks if not self.chosen or disk["name"] in self.chosen}
        for name in self.chosen:
            if name not in disks:
                raise Error("--disk", f'no disk {name} at restore point {segment.head["point"]}')
        taking = []
        for name, disk in disks.items():
            place = self._place(name)
            if self.chosen.get(name) is not None:
                if disk["size"] > before[name]["size"]:
                    place.grow(disk["size"])
                place.open(disk["size"]).close()
            elif name not in before:
                taking += place.file_names
        for name in before:
            if name not in disks and (not self.chosen or name in self.chosen):
                files = ", ".join(self._state["disks"][name]["files"])
                log.note(f'{name}: not part of restore point {segment.head["point"]}: {files} stays as it is')
        return taking

    def publish(self) -> None:
        """Give the new images their names; the old ones are of no use any more."""
        if self._directory is not None:
            for disk in self.disks.values():
                if disk.place.file_names:
                    disk.place.refuse_in_use()  # a domain may have been started on it meanwhile
            self._directory.replace(self.file_names())

    def make_place(self, directory: ImageDirectory, name: str) -> Any:
        """A place for a disk in the directory of the copy."""
        files = self._state["disks"].get(name, {}).get("files")
        if files:
            return StandbyImage(directory, name, self._recipe, list(files))
        taken = f"{name}.{self._recipe.format}" in self._state["taking"]
        left = self._state.get("left", {}).get(name, {}).get("files", {})
        unchanged = left and all(_stamp(directory.final(file)) in (stamp, None) for file, stamp in left.items())
        return NewImage(directory, name, self._recipe, replaces=taken or bool(unchanged))


def _is_sound(state: dict[str, Any]) -> bool:
    """Whether a state is such as _save() writes it, with names of files that are in the directory."""
    disks, left = state.get("disks"), state.get("left", {})
    if "point" not in state or not isinstance(disks, dict) or not isinstance(left, dict):
        return False
    if not all(map(rules.is_safe_name, [*disks, *left])):
        return False
    texts = []
    if state.get("point") is not None:
        texts = [state.get(key) for key in ("point", "uuid", "domain", "created")]
    lists = [state.get(key) for key in ("options", "history", "taking")]
    if not all(isinstance(list_, list) for list_ in lists):
        return False
    names = [*state["taking"]]
    for disk in [*disks.values(), *left.values()]:
        if not isinstance(disk, dict) or type(disk.get("size")) is not int or not isinstance(disk.get("files"), dict):
            return False
        names += disk["files"]
    return all(isinstance(text, str) for text in [*texts, *state["options"], *state["history"], *names]) and not any(
        "/" in name or "\0" in name or name[:1] in ("", ".") for name in names
    )


def _stamp(path: str) -> list[int] | None:
    """What of a file changes when it is written to, or None."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise os_error(path, error) from None
    return [found.st_mtime_ns, found.st_size, stat.S_IFMT(found.st_mode)]


def _open(path: str) -> int:
    try:
        # Not to wait for whoever may open the other end of a FIFO.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise os_error(path, error) from None


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise os_error(path, error) from None
