"""CURVE keys in files, and the folder of those who may come in.

A pair is two files, in the certificate format of ZeroMQ's own tools: `NAME.key` holds the public key, and `NAME.key_secret`, which only
its owner may read, holds both. Whoever's `NAME.key` lies in an engine's folder of client keys is the user NAME there.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from penstock.actors.errors import LONGEST_SHOWN, Refusal, bad

PUBLIC, SECRET = ".key", ".key_secret"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
_FIELD = re.compile(rf'^\s*(public|secret)-key\s*=\s*"({_Z85})"\s*$', re.MULTILINE)
# These say something about one file of the folder. All other errors, such as having no descriptors left, say nothing about who may come in.
_OF_ONE_FILE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG}
UNSETTLED_S = 0.05  # files changed so lately may have been changed again within a tick of the clock that their times are told by

Facts = tuple[str, int, int, int, int, int]  # of a file: its name, and what changes when another one takes its place, or it is written to


def is_key(text: str) -> bool:
    if not re.fullmatch(_Z85, text):
        return False
    try:
        return len(z85.decode(text)) == 32
    except struct.error:  # five characters can spell more than four bytes hold
        return False


@dataclass(frozen=True, slots=True)
class Pair:
    """Z85 text, 40 characters each."""

    public: str
    secret: str


def new_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair, and the folder if it is not there. Returns the files, public and secret. Never writes over one that is there: it may
    be somebody's only copy. Raises `Refusal`."""
    if not _NAME.fullmatch(name):
        raise bad("name", name, "1 to 64 letters, digits, dots, dashes and underscores, the first a letter or a digit")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    files = folder / (name + PUBLIC), folder / (name + SECRET)
    texts = f'curve\n    public-key = "{public}"\n', f'curve\n    public-key = "{public}"\n    secret-key = "{secret}"\n'
    made: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text, mode in zip(reversed(files), reversed(texts), (0o600, 0o644), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w") as file:
                made.append(path)
                file.write(text)
    except OSError as error:
        for path in made:  # half a pair is of no use, and would stand in the way of the next one
            path.unlink(missing_ok=True)
        raise _unfit("folder", error.filename or folder, f"cannot make keys: {error.strerror}") from error
    return files


def read_public(path: Path) -> str:
    """The public key of a file of either kind. Raises `Refusal`."""
    return _open("key", path)[0]["public"]


def read_pair(path: Path) -> Pair:
    """The pair of a secret file, which nobody but its owner may be able to read. Raises `Refusal`."""
    keys, mode = _open("key", path)
    if "secret" not in keys:
        raise _unfit("key", path, f"has no secret key: the file is the one named *{SECRET}")
    if mode & 0o077:
        raise _unfit("key", path, "can be read by others: chmod 600")
    if zmq.curve_public(keys["secret"].encode()).decode() != keys["public"]:
        raise _unfit("key", path, "holds two keys that are not a pair")
    return Pair(keys["public"], keys["secret"])


class KeyFolder:
    """Public key → user, as the folder says now. A file that cannot be read lets nobody in and keeps nobody out, and a folder that is gone
    lets nobody in. Two files with one key let neither user in: copying another's key must not give his name away, nor take it from him
    unnoticed. If the folder cannot be read for a reason that is not its own, who could come in still can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.users: dict[str, str] = {}
        self.unreadable: list[str] = []  # what is wrong with single files, for the log
        self.error: str | None = None  # why it could not be read when it was last looked at
        self._seen: list[Facts] | None = None  # none: they are to be read in any case
        self._stamp: tuple[int, ...] = ()  # of the folder itself, before it was last looked at
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _unfit("client_keys", path, f"cannot be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode) or stat.S_IMODE(mode) & 0o022:
            raise _unfit("client_keys", path, "must be a folder that only its owner may write to")
        self.look()
        if self.error is not None:
            raise Refusal("invalid_request", self.error, field="client_keys", value=str(path)[:LONGEST_SHOWN])

    def glance(self) -> None:
        """Look only if files came, went or were replaced, or were just written to. It is one `stat` where nothing did, however many files
        there are: whoever asks for it as often as strangers knock can afford it."""
        if (self._seen is None and self.error is None) or self._stamped() != self._stamp:
            self.look()

    def look(self) -> bool:
        """Read again what has changed. Returns whether who may come in has."""
        self._stamp = self._stamped()
        try:
            facts = self._facts()
            if facts == self._seen:
                self.error = None
                return False
            users, unreadable = self._read(facts)
        except (FileNotFoundError, NotADirectoryError):
            facts, users, unreadable = [], {}, []
            self.error = f"{self.path} is not there"
        except OSError as error:
            self.error = f"{self.path} cannot be read: {error.strerror}"
            return False
        else:
            self.error = None
        newest = max(self._stamp[-1:] + tuple(fact[3] for fact in facts), default=0)
        self._seen = None if abs(time.time_ns() - newest) < UNSETTLED_S * 1e9 else facts
        self.unreadable = unreadable
        if users == self.users:
            return False
        self.users = users
        return True

    def _stamped(self) -> tuple[int, ...]:
        try:
            info = self.path.stat()
        except OSError:
            return ()
        return info.st_ino, info.st_mtime_ns, info.st_ctime_ns

    def _facts(self) -> list[Facts]:
        """Raises `OSError` if they are not those of the whole folder."""
        facts = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(PUBLIC) and _NAME.fullmatch(entry.name.removesuffix(PUBLIC)):
                    try:
                        info = entry.stat()
                    except OSError as error:
                        if error.errno not in _OF_ONE_FILE:
                            raise
                        facts.append((entry.name, 0, 0, 0, 0, 0))  # a link to nowhere, or it is gone by now
                    else:
                        facts.append((entry.name, info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_mode))
        return sorted(facts)

    def _read(self, facts: list[Facts]) -> tuple[dict[str, str], list[str]]:
        """Users by key, and what is wrong with files. Raises `OSError` for what is not one file's fault."""
        holders: dict[str, list[str]] = {}
        wrong = []
        for name, *_ in facts:
            try:
                holders.setdefault(_keys("client_keys", self.path / name)[0]["public"], []).append(name)
            except Refusal as refusal:
                wrong.append(refusal.fault.message)
            except OSError as error:
                if error.errno not in _OF_ONE_FILE:
                    raise
                wrong.append(f"{self.path / name} cannot be read: {error.strerror}")
        wrong += [f"{self.path}: {', '.join(names)} hold one key: none of them may come in" for names in holders.values() if len(names) > 1]
        return {key: names[0].removesuffix(PUBLIC) for key, names in holders.items() if len(names) == 1}, wrong


def _open(field: str, path: Path) -> tuple[dict[str, str], int]:
    try:
        return _keys(field, path)
    except OSError as error:
        raise _unfit(field, path, f"cannot be read: {error.strerror}") from error


def _keys(field: str, path: Path) -> tuple[dict[str, str], int]:
    """The keys in a file, and its permissions. Raises `Refusal` if there are none, and `OSError`."""
    # Opening a pipe would wait for its other end, and the gateway for that.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise _unfit(field, path, "is no regular file")
        keys = dict(_FIELD.findall(os.read(file, 4096).decode(errors="replace")))
    finally:
        os.close(file)
    if "public" not in keys or not all(map(is_key, keys.values())):
        raise _unfit(field, path, "is no file of keys: `penstock keys new` makes them")
    return keys, stat.S_IMODE(mode)


def _unfit(field: str, path: object, why: str) -> Refusal:
    return Refusal("invalid_request", f"{path} {why}", field=field, value=str(path)[:LONGEST_SHOWN])
