"""Where built libraries are kept: what is not this user's own, or not whole, is never loaded."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.modeling import native_cache
from fathom.modeling.native_cache import LibraryCache

NAME = "kernels-float-0123456789abcdef.so"
CONTENT = bytes(range(256)) * 40
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "fathom-lm"


def stored(folder: Path) -> Path:
    with LibraryCache(folder) as cache:
        cache.store(NAME, CONTENT)
    return folder / NAME


def found(folder: Path) -> bytes | None:
    with LibraryCache(folder) as cache:
        path = cache.find(NAME)
        return None if path is None else Path(path).read_bytes()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_stored_is_found_and_is_nobody_elses(folder, umask):
    before = os.umask(umask)
    try:
        stored(folder)
    finally:
        os.umask(before)
    assert found(folder) == CONTENT
    assert {path.name for path in folder.iterdir()} == {NAME, f"{NAME}.sha256"}
    for path in (folder.parent, folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_two_libraries_have_two_paths(folder):
    """The loader takes what has one path for one library."""
    with LibraryCache(folder) as cache:
        for name in ("kernels-a.so", "kernels-b.so"):
            cache.store(name, name.encode())
        paths = [cache.find(name) for name in ("kernels-a.so", "kernels-b.so")]
    assert [Path(path).read_bytes() for path in paths] == [b"kernels-a.so", b"kernels-b.so"]


def cut(length: int) -> Callable[[Path], None]:
    return lambda library: library.write_bytes(CONTENT[:length])


def flip(library: Path) -> None:
    library.write_bytes(CONTENT[:5000] + bytes(2000) + CONTENT[7000:])


def lengthen(library: Path) -> None:
    library.write_bytes(CONTENT + b"x")


def drop_the_checksum(library: Path) -> None:
    library.with_name(f"{NAME}.sha256").unlink()


def empty_the_checksum(library: Path) -> None:
    library.with_name(f"{NAME}.sha256").write_bytes(b"")


def put_another_checksum(library: Path) -> None:
    library.with_name(f"{NAME}.sha256").write_bytes(b"\xff\xfe" * 2000)


def move_and_link(library: Path) -> None:
    library.symlink_to(library.rename(library.with_name("elsewhere")))


def link_twice(library: Path) -> None:
    os.link(library, library.with_name("elsewhere"))


def let_a_group_write(library: Path) -> None:
    library.chmod(0o620)


def let_all_write_the_checksum(library: Path) -> None:
    library.with_name(f"{NAME}.sha256").chmod(0o602)


def link_the_checksum(library: Path) -> None:
    checksum = library.with_name(f"{NAME}.sha256")
    checksum.symlink_to(checksum.rename(library.with_name("elsewhere")))


def make_a_pipe(library: Path) -> None:
    library.unlink()
    os.mkfifo(library, 0o600)


def give_away(library: Path) -> None:
    os.chown(library, 65534, 65534)


DAMAGES = [cut(0), cut(1), cut(64), cut(1000), cut(len(CONTENT) - 1), flip, lengthen]
DAMAGES += [drop_the_checksum, empty_the_checksum, put_another_checksum]
DAMAGES += [move_and_link, link_twice, let_a_group_write, let_all_write_the_checksum, link_the_checksum, make_a_pipe]


@pytest.mark.parametrize("damage", [*DAMAGES, pytest.param(give_away, marks=as_root)])
def test_what_is_damaged_or_not_ours_is_removed_and_can_be_stored_again(folder, damage):
    damage(stored(folder))
    assert found(folder) is None
    assert not (folder / NAME).exists()
    assert not (folder / NAME).is_symlink()
    stored(folder)
    assert found(folder) == CONTENT


def link_folder(folder: Path) -> None:
    (folder.parent / "real").mkdir(parents=True)
    folder.symlink_to(folder.parent / "real")


def open_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def share_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def file_for_a_folder(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def strangers_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 65534, 65534)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (link_folder, "symbolic link"),
        (open_folder, "chmod go-w"),
        (share_folder, "chmod go-w"),
        (file_for_a_folder, "exists"),
        pytest.param(strangers_folder, "another user", marks=as_root),
    ],
)
def test_a_folder_that_others_can_write_to_is_refused(folder, make, says):
    make(folder)
    with pytest.raises(OSError, match=says):
        LibraryCache(folder)


def test_a_folder_of_ours_in_a_sticky_one_is_good(tmp_path):
    tmp_path.chmod(0o1777)
    stored(tmp_path / "fathom-lm")
    assert found(tmp_path / "fathom-lm") == CONTENT


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(folder, function, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native_cache.os, function, fail)
    with LibraryCache(folder) as cache, pytest.raises(OSError, match="No space left"):
        cache.store(NAME, CONTENT)
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed(folder):
    stored(folder)
    for name, age in ((f".{NAME}.old", 2 * native_cache.STALE_SECONDS), (f".{NAME}.new", 0)):
        (folder / name).write_text("")
        os.utime(folder / name, (0, (folder / name).stat().st_mtime - age))
    stored(folder)
    assert {path.name for path in folder.iterdir()} == {NAME, f"{NAME}.sha256", f".{NAME}.new"}


def test_the_folder_is_the_environments_if_that_is_a_whole_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native_cache.cache_folder() == tmp_path / "fathom-lm"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative", "./x"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert native_cache.cache_folder() == tmp_path / "home" / ".cache" / "fathom-lm"
