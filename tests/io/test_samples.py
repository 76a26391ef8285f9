import errno
import io

import numpy as np
import pytest

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io import samples
from hsivi_cli.io.samples import image_grid, open_destination, write_samples


def images(n=5, channels=1):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels), np.uint8)


def test_arrays_round_trip(tmp_path):
    write_samples(open_destination(str(tmp_path / "a.npy"), 1), [images()[:2], images()[2:]])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), images())
    write_samples(open_destination(str(tmp_path / "a.npz"), 1), [images()])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"], images())
    np.testing.assert_array_equal(np.load(io.BytesIO(write_samples(open_destination("-", 1), [images()]))), images())


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_holds_one_numbered_png_an_image(tmp_path, channels):
    from PIL import Image

    write_samples(open_destination(f"{tmp_path}/many.v1/", channels), [images(5, channels)])
    files = sorted((tmp_path / "many.v1").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    np.testing.assert_array_equal(np.asarray(Image.open(files[3])).reshape(8, 8, channels), images(5, channels)[3])


def test_grid_is_near_square_and_large_enough():
    picture = image_grid(images(64))
    assert picture.shape[0] == picture.shape[1] >= 500
    assert image_grid(images(5)).shape[1] > image_grid(images(5)).shape[0]


def test_existing_output_is_kept_unless_forced(tmp_path):
    for out in (tmp_path / "a.png", tmp_path / "folder"):
        write_samples(open_destination(str(out), 1), [images()])
        with pytest.raises(InputError, match="--force"):
            open_destination(str(out), 1)
        write_samples(open_destination(str(out), 1, force=True), [images(2)])
    assert len(list((tmp_path / "folder").iterdir())) == 2
    (tmp_path / "folder" / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="spares"):
        open_destination(str(tmp_path / "folder"), 1, force=True)


def test_refuses_what_cannot_be_written_before_drawing(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"\.jpg: use \.png, \.npy, \.npz"):
        open_destination(str(tmp_path / "a.jpg"), 1)
    with pytest.raises(InputError, match="does not exist"):
        open_destination(str(tmp_path / "none" / "a.png"), 1)
    with pytest.raises(InputError, match="2 channels"):
        open_destination(str(tmp_path / "a.png"), 2)
    with pytest.raises(InputError, match="cannot be written"):
        open_destination("/proc/a.png", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="working directory"):
        open_destination(".", 1)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples, "png_bytes", full)
    for out in ("a.png", "folder"):
        with pytest.raises(RunError, match="disk is full"):
            write_samples(open_destination(str(tmp_path / out), 1), [images()])
    assert list(tmp_path.iterdir()) == []
