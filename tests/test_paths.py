"""A file is written whole or not at all."""

import os

import pytest

from clawdemy_infer.paths import write_atomically


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
