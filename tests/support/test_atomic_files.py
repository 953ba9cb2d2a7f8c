"""Files appear whole or not at all, and what killed processes leave is removed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from batude_fx.support.atomic_files import (
    atomic_file,
    atomic_files,
    check_writable,
    read_newest,
    visible_entries,
    write_text,
)
from tests.endurance.killed_process import run_forked


def test_threads_may_save_into_one_folder(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(50):
            with atomic_file(tmp_path / "file") as place:
                place.write_text(text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "file").read_text() in "abcd"
    assert len(list(tmp_path.iterdir())) == 1


def _write_pair(folder: Path, text: str) -> None:
    with atomic_files(folder, ("a", "b")) as new:
        for name in ("a", "b"):
            write_text(new / name, text)


def _read_pair(folder: Path) -> tuple[str, ...]:
    return tuple((folder / name).read_text() for name in ("a", "b"))


def test_files_that_are_replaced_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    _write_pair(tmp_path, "old")
    readings: list[tuple[str, str]] = []

    def read(folder: Path) -> tuple[str, ...]:
        first = (folder / "a").read_text()
        if not readings:
            _write_pair(tmp_path, "new")
        readings.append((first, (folder / "b").read_text()))
        return readings[-1]

    assert read_newest(tmp_path, read) == ("new", "new")
    assert readings == [("old", "new"), ("new", "new")]


def test_files_that_are_moved_to_their_places_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    _write_pair(tmp_path, "old")
    with patch("batude_fx.support.atomic_files._move_pending"):  # as by a process that is killed before it
        _write_pair(tmp_path, "pending")

    def read(folder: Path) -> tuple[str, ...]:
        if folder.name == ".pending":
            _write_pair(tmp_path, "new")
        return _read_pair(folder)

    assert read_newest(tmp_path, read) == ("new", "new")


def test_what_is_written_after_a_kill_is_not_lost_when_the_files_move_on(tmp_path: Path) -> None:
    """As by `sweep`, into a folder in which `save` was killed."""
    _write_pair(tmp_path, "old")
    with patch("batude_fx.support.atomic_files._move_pending"):
        _write_pair(tmp_path, "pending")
    write_text(tmp_path / "a", "later")
    write_text(tmp_path / "c", "more")
    assert read_newest(tmp_path, _read_pair) == ("later", "pending")
    with pytest.raises(ZeroDivisionError), atomic_files(tmp_path, ("a", "b")):
        raise ZeroDivisionError
    assert _read_pair(tmp_path) == ("later", "pending")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_an_error_of_reading_is_raised_where_the_files_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_newest(tmp_path, lambda folder: (folder / "missing").read_text())


def test_files_are_of_one_writing_while_others_write(tmp_path: Path) -> None:
    _write_pair(tmp_path, "0")

    def write() -> None:
        for number in range(25):
            _write_pair(tmp_path, f"{number}")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            a, b = read_newest(tmp_path, _read_pair)
            assert a == b
    writing.result()


def _leftover(folder: Path, write: Callable[[], object]) -> Path:
    """Return the temporary file of a process that was killed while it wrote into an empty folder."""
    events = run_forked(write, folder).events
    for path in folder.iterdir():
        path.unlink()
    for number in range(events, 0, -1):
        assert run_forked(write, folder, number).killed
        if left := [path for path in folder.iterdir() if path.name.endswith(".tmp")]:
            return left[0]
        for path in folder.iterdir():
            path.unlink()
    raise AssertionError("no process left a file")


def test_what_a_killed_process_with_the_same_number_has_left_is_removed(tmp_path: Path) -> None:
    """In a container that is started again, a process gets the number that the killed one had."""
    left = _leftover(tmp_path, lambda: write_text(tmp_path / "file", "text"))
    process = left.name.split("@")[0].rpartition(".")[2]
    left.rename(tmp_path / left.name.replace(f".{process}@", f".{os.getpid()}@"))
    with atomic_file(tmp_path / "file") as outer:
        outer.write_text("outer")
        write_text(tmp_path / "file", "inner")
        assert outer.exists()  # though this process has the number of its name, too
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_process_that_is_killed_while_it_tries_to_write_does_not_fill_the_folder(tmp_path: Path) -> None:
    left = _leftover(tmp_path, lambda: check_writable(tmp_path))
    assert visible_entries(tmp_path) == []
    check_writable(tmp_path)
    assert not left.exists()
