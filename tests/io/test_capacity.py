import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.io import capacity, samples
from hsivi_cli.io.capacity import check_disk, check_memory, free_memory, human
from hsivi_cli.io.samples import check_capacity, open_destination


def test_sizes_read_well():
    sizes = (0, 1023, 1024, 3 * 2**29, 2**70)
    assert [human(size) for size in sizes] == ["0 bytes", "1023 bytes", "1 KiB", "1.5 GiB", "1024 EiB"]


def test_what_fits_passes_and_what_does_not_is_one_line(tmp_path):
    assert free_memory() > 2**26
    check_memory("-n 1", 2**20)
    check_disk("-n 1", 2**10, tmp_path)
    with pytest.raises(InputError, match=r"^-n 9 takes 1 EiB of memory, and .* are free: ask for fewer$"):
        check_memory("-n 9", 2**60)
    with pytest.raises(InputError, match=r"^-n 9 takes 1 EiB in .*, and .* are free: ask for fewer$"):
        check_disk("-n 9", 2**60, tmp_path)


@pytest.mark.parametrize(("out", "copies"), [("a.npy", 1), ("a.npz", 1), ("folder", 1), ("-", 2), ("a.png", 4)])
def test_every_destination_counts_what_it_needs(tmp_path, monkeypatch, out, copies):
    destination = open_destination(out if out == "-" else str(tmp_path / out), 1)
    pixels = 10_000 * 8 * 8
    monkeypatch.setattr(capacity, "free_memory", lambda: copies * pixels - 1)
    with pytest.raises(InputError, match="of memory"):
        check_capacity(destination, 10_000, (1, 8, 8))
    monkeypatch.setattr(capacity, "free_memory", lambda: 20 * pixels)
    check_capacity(destination, 10_000, (1, 8, 8))
    # a file takes a block at least, so a folder of small images takes more than their pixels
    stored = 10_000 * samples.block_size(tmp_path) if out == "folder" else pixels
    monkeypatch.setattr(capacity, "free_disk", lambda folder: stored - 1)
    if out == "-":
        check_capacity(destination, 10_000, (1, 8, 8))
    else:
        with pytest.raises(InputError, match="-n 10000 takes"):
            check_capacity(destination, 10_000, (1, 8, 8))
