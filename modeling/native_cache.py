"""Where built libraries are kept: a folder that nobody but this user can write to, and files that are whole.

A library is code, and whoever can put one there runs code in the programs of whoever loads it. So the folder and every
file must be this user's own, not writable by others, and no links. Beside a library stands its SHA-256 checksum; a file
that does not have it is removed. What is written stands under another name until all of it is on the disk.
"""

import hashlib
import os
import secrets
import stat
import time
from pathlib import Path

# Files of a process that was killed while it wrote them.
STALE_SECONDS = 3600
LARGEST_LIBRARY = 1 << 28  # bytes, a hundred times what one has


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fathom-lm`, or `~/.cache/fathom-lm`.

    Raises:
        RuntimeError: there is no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # The XDG specification: a relative path is to be ignored.
    return (given if given.is_absolute() else Path.home() / ".cache") / "fathom-lm"


class LibraryCache:
    """The folder, open: what is checked is what is read, whatever is renamed meanwhile.

    Raises:
        OSError: it cannot be made, or is not this user's alone; the message says which, and what to do.
    """

    def __init__(self, folder: Path):
        if not hasattr(os, "geteuid"):
            raise OSError("files have no owners on this system, so that no library can be kept")
        self.folder = folder
        for each in (*reversed(folder.parents), folder):
            if not each.is_dir():
                os.makedirs(each, mode=0o700, exist_ok=True)
        try:
            self.descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except NotADirectoryError as error:
            raise OSError(
                f"{folder} is a symbolic link; make it a folder, or name another by XDG_CACHE_HOME"
            ) from error
        try:
            _check_owner(os.fstat(self.descriptor), f"{folder}")
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "LibraryCache":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def find(self, name: str) -> str | None:
        """What to load a library from; None where there is none, or a damaged one, which is removed.

        Where the system has /proc the path is that of an open file, the one that was checked. It stays open: the loader
        takes two libraries of one path for the same.
        """
        try:
            library = self._open(name)
        except FileNotFoundError:
            return None
        except OSError:  # a link, or another user's
            self.remove(name)
            return None
        try:
            with os.fdopen(os.dup(library), "rb") as file:
                content = file.read(LARGEST_LIBRARY)
            if self._checksum(name) == hashlib.sha256(content).hexdigest():
                path = f"/proc/self/fd/{library}"
                return path if os.path.exists(path) else str(self.folder / name)
        except OSError:
            pass
        os.close(library)
        self.remove(name)
        return None

    def store(self, name: str, content: bytes) -> None:
        """Writes a library and its checksum.

        Raises:
            OSError: the disk is full, or may not be written to.
        """
        self._remove_stale()
        self._write(name, content)
        self._write(f"{name}.sha256", f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())

    def remove(self, name: str) -> None:
        """Removes a library and its checksum, as far as that is possible."""
        for each in (name, f"{name}.sha256"):
            try:
                os.unlink(each, dir_fd=self.descriptor)
            except OSError:
                continue

    def _open(self, name: str) -> int:
        # A pipe of that name would be waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, dir_fd=self.descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise OSError(f"{self.folder / name} is no file of its own")
            _check_owner(status, f"{self.folder / name}")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _checksum(self, name: str) -> str:
        with os.fdopen(self._open(f"{name}.sha256"), "rb") as file:
            return file.read(1024).decode("ascii", errors="replace").partition(" ")[0]

    def _write(self, name: str, content: bytes) -> None:
        partial = f".{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, mode=0o600, dir_fd=self.descriptor), "wb") as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            except BaseException:
                os.unlink(partial, dir_fd=self.descriptor)
                raise
        os.fsync(self.descriptor)

    def _remove_stale(self) -> None:
        for name in os.listdir(self.descriptor):
            if name.startswith(".kernels-"):
                try:
                    if time.time() - os.stat(name, dir_fd=self.descriptor).st_mtime > STALE_SECONDS:
                        os.unlink(name, dir_fd=self.descriptor)
                except OSError:
                    continue


def _check_owner(status: os.stat_result, name: str) -> None:
    if status.st_uid != os.geteuid():
        raise OSError(f"{name} belongs to another user (number {status.st_uid}); name a folder by XDG_CACHE_HOME")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{name} can be written to by other users; chmod go-w {name}")
