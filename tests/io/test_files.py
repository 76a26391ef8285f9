"""Atomic writes: the old content or the new one, never half of one, and nothing left behind."""

import os
import stat
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io import files
from hsivi_cli.io.files import atomic_directory, atomic_file, check_sums, read_json, write_sums


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


HOSTILE = (
    b'{"a": ' + b"[" * 100_000,
    b'{"a": ' * 500 + b"1" + b"}" * 500,
    b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"a": ' + b"9" * 5000 + b"}",
)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", *HOSTILE], ids=range(3 + len(HOSTILE)))
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_json_may_be_as_deep_as_is_promised(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}")
    assert read_json(tmp_path / "x.json")["a"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with path.open() as reader:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"  # the name moved to another file; nothing was overwritten in place
    assert path.read_text() == "new"


def test_a_directory_that_is_replaced_always_has_its_name(tmp_path):
    """A reader in another process opens it all the while, and finds the old one whole or the new one whole."""
    path = tmp_path / "d"
    script = (
        "import sys, pathlib, time; path = pathlib.Path(sys.argv[1]); print('ready', flush=True); n = 0\n"
        "while not (path.parent / 'stop').exists(): n += 1; path.stat(); (path / 'f').stat()\n"
        "print(n)"
    )

    def write(text):
        with atomic_directory(path, overwrite=True) as temporary:
            (temporary / "f").write_text(text)

    write("0")
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        for i in range(200):
            write(str(i))
        (tmp_path / "stop").touch()
        looks = int(reader.stdout.readline() or 0)
    assert reader.returncode == 0  # it never looked in vain
    assert looks > 100
    assert (path / "f").read_text() == "199"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["d", "stop"]


def test_where_names_cannot_be_swapped_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_swap", lambda one, other: False)
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "d", overwrite=True) as temporary:
            (temporary / "f").write_text(text)
    assert (tmp_path / "d" / "f").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_sums_name_what_changed_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b", "free"):
        (tmp_path / name).write_text(name)
    check_sums(tmp_path)  # nothing to check yet
    write_sums(tmp_path, leave_out=("free",))
    (tmp_path / "free").write_text("changed")
    (tmp_path / "more").write_text("new")
    check_sums(tmp_path)
    (tmp_path / "deep" / "b").write_text("c")
    with pytest.raises(InputError, match=r"deep/b is damaged"):
        check_sums(tmp_path)
    (tmp_path / "deep" / "b").unlink()
    with pytest.raises(InputError, match=r"deep/b is missing"):
        check_sums(tmp_path)
    for line in (b"junk", b"\xff" * 70, b"0" * 64 + b"  ../../etc/passwd", b"0" * 64 + b"  /dev/zero"):
        (tmp_path / "SHA256SUMS").write_bytes(line + b"\n")
        with pytest.raises(InputError, match="SHA256SUMS"):
            check_sums(tmp_path)
