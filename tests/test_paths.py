"""A file is written whole or not at all."""

import os

import pytest

from clawdemy_infer.paths import alike, cache_dir, read_kept, write_atomically


@pytest.mark.parametrize("data, written", [("né\n", "né\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_a_file_is_replaced_whole(tmp_path, data, written):
    path = tmp_path / "scoreboard.json"
    path.write_text("old")
    write_atomically(path, data)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_is_made_if_need_be(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file", "new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "scoreboard.json"
    path.write_text("old")

    def fails(*_):
        raise error

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(error):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_swept_by_the_next_write_and_nothing_else(tmp_path):
    child = os.fork() or os._exit(0)
    os.waitpid(child, 0)                                        # its number is nobody's now
    dead, odd = (tmp_path / f".board[1].json.{end}.partial" for end in (child, "x"))
    running, other = (tmp_path / f".{name}.partial" for name in (
        f"board[1].json.{os.getppid()}", f"another.{child}"))
    for path in (dead, odd, running, other):
        path.write_text("half")
    folder = tmp_path / f".board[1].json.5.{child}.partial"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_atomically(tmp_path / "board[1].json", "new")
    assert {*tmp_path.iterdir()} == {tmp_path / "board[1].json", running, other}


@pytest.mark.parametrize("value, shape, same", [
    (1, 0, True), (-1, 0, False), (True, 0, False), (1e31, 0, False), ("1", 0, False),
    (None, (0, type(None)), True), ("cpu", "cpu", True), ("cuda", "cpu", False),
    ([], [int], True), ([], [int, ...], False), ([1, "x"], [int], False), ({}, [int], False),
    ({"a": 1}, {"a": int}, True), ({}, {"a": int}, False), ({}, {"a?": int}, True),
    ({"a": "x"}, {"a?": int}, False), ({"a": 1, "b": 2}, {"a": int}, True),
    ({"a": 1, "b": 2}, {"a": int, "": str}, False), ({"": 5}, {"": str}, False), ([], {}, False),
])
def test_json_is_alike_to_a_shape_or_not(value, shape, same):
    assert alike(value, shape) is same


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", b"[" * 10**5, b"5", b"NaN", b'{"a": 1e999}', b'{"a": -Infinity}', b'\x00',
    '{"a": 1}'.encode("utf-16")[:5]])
def test_a_damaged_file_of_ours_counts_as_absent_and_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "kept.json"
    assert read_kept(path, dict) is None                        # without a word
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="kept.json is damaged and counts as absent") as said:
        assert read_kept(path, dict) is None
    assert len(said) == 1 and "\n" not in str(said[0].message)
    write_atomically(path, '{"a": 1}')
    assert read_kept(path, dict) == {"a": 1}


def test_without_a_home_the_way_on_is_named(monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(OSError, match="home directory.*CLAWDEMY_CACHE names a folder"):
        cache_dir()
