"""CURVE keys in files, and the folder of those who may come in.

A pair is two files, in the certificate format of ZeroMQ's own tools: `NAME.key` holds the public key, and `NAME.key_secret`, which only
its owner may read, holds both. Whoever's `NAME.key` lies in an engine's folder of client keys is the user NAME there.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from penstock.actors.errors import Refusal, bad

PUBLIC, SECRET = ".key", ".key_secret"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
_FIELD = re.compile(rf'^\s*(public|secret)-key\s*=\s*"({_Z85})"\s*$', re.MULTILINE)


def is_key(text: str) -> bool:
    return bool(re.fullmatch(_Z85, text))


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
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text, mode in zip(reversed(files), reversed(texts), (0o600, 0o644), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w") as file:
                file.write(text)
    except OSError as error:
        raise _unfit("folder", error.filename or folder, f"cannot make keys: {error.strerror}") from error
    return files


def read_public(path: Path) -> str:
    """The public key of a file of either kind. Raises `Refusal`."""
    return _read("key", path)["public"]


def read_pair(path: Path) -> Pair:
    """The pair of a secret file, which nobody but its owner may be able to read. Raises `Refusal`."""
    keys = _read("key", path)
    if "secret" not in keys:
        raise _unfit("key", path, f"has no secret key: the file is the one named *{SECRET}")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise _unfit("key", path, "can be read by others: chmod 600")
    if zmq.curve_public(keys["secret"].encode()).decode() != keys["public"]:
        raise _unfit("key", path, "holds two keys that are not a pair")
    return Pair(keys["public"], keys["secret"])


class KeyFolder:
    """Public key → user, as the folder says now: `look` reads it again if anything in it has changed. A file that cannot be read lets
    nobody in, and neither does a folder that is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.users: dict[str, str] = {}
        self.unreadable: list[str] = []  # why, for the log
        self._seen: object = None
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _unfit("client_keys", path, f"cannot be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode) or stat.S_IMODE(mode) & 0o022:
            raise _unfit("client_keys", path, "must be a folder that only its owner may write to")
        self.look()

    def look(self) -> bool:
        """Whether who may come in has changed."""
        seen = self._facts()
        if seen == self._seen:
            return False
        self._seen, before = seen, self.users
        self.users, self.unreadable = {}, []
        for name, *_ in seen:
            try:
                # Of two users with one key, the first is the one.
                self.users.setdefault(read_public(self.path / name), name.removesuffix(PUBLIC))
            except Refusal as refusal:
                self.unreadable.append(refusal.fault.message)
        return self.users != before

    def _facts(self) -> list[tuple[str, int, int, int]]:
        facts = []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(PUBLIC) and _NAME.fullmatch(entry.name.removesuffix(PUBLIC)):
                        info = entry.stat()
                        facts.append((entry.name, info.st_ino, info.st_mtime_ns, info.st_size))
        except OSError:
            return []  # being changed, or gone: nobody comes in until it can be read
        return sorted(facts)


def _read(name: str, path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            keys = dict(_FIELD.findall(file.read(4096)))
    except OSError as error:
        raise _unfit(name, path, f"cannot be read: {error.strerror}") from error
    if "public" not in keys:
        raise _unfit(name, path, "is no file of keys: `penstock keys new` makes them")
    return keys


def _unfit(name: str, path: object, why: str) -> Refusal:
    return Refusal("invalid_request", f"{path} {why}", field=name, value=str(path)[:120])
