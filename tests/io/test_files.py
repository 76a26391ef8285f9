"""Atomic writes: the old content or the new one, never half of one, and nothing left behind."""

import os
import stat

import pytest
from safetensors import SafetensorError

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.files import atomic_directory, atomic_file, read_json


class Boom(Exception):
    pass


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(Boom), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise Boom
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_failed_directory_keeps_the_old_one(tmp_path):
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(Boom), atomic_directory(path, overwrite=True) as temporary:
        (temporary / "new").write_text("half")
        raise Boom
    assert os.listdir(path) == ["old"]
    with atomic_directory(path, overwrite=True) as temporary:
        (temporary / "new").write_text("whole")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["d"]


def test_occupied_or_impossible_places_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "d"):
        pass
    with pytest.raises(InputError, match="is a directory"), atomic_file(tmp_path / "d"):
        pass
    with pytest.raises(InputError, match="does not exist"), atomic_file(tmp_path / "none" / "f"):
        pass
    assert (tmp_path / "d" / "mine").read_text() == "keep"


def test_a_full_disk_as_safetensors_reports_it_is_one_line(tmp_path):
    with pytest.raises(RunError, match="was not written"), atomic_file(tmp_path / "f"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_noticed(tmp_path):
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "f"), open("/dev/full", "w") as full:
        full.write("x" * 10_000)
        full.flush()
    assert os.listdir(tmp_path) == []


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "f") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with path.open() as reader:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"  # the name moved to another file; nothing was overwritten in place
    assert path.read_text() == "new"
