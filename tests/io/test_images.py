"""Image readers: every accepted layout, and one clear line for everything else."""

import gzip
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from hsivi_cli.errors import InputError
from hsivi_cli.io.images import image_set, read_idx, read_image_stream, read_images


class Bomb:
    """Unpickling an instance leaves a mark."""

    exploded = False

    def __reduce__(self):
        return (_explode, ())


def _explode() -> None:
    Bomb.exploded = True


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_layouts_agree(grey, colour):
    assert image_set(grey, "a").sha256 == image_set(grey[..., None], "a").sha256
    assert image_set(grey, "a").sha256 == image_set(grey[:, None], "a").sha256
    assert image_set(colour, "a").sha256 == image_set(colour.transpose(0, 3, 1, 2), "a").sha256
    assert image_set(colour, "a").shape == (5, 7, 3)


def test_hash_covers_the_shape():
    flat = np.zeros((2, 4, 9), np.uint8)
    assert image_set(flat, "a").sha256 != image_set(flat.reshape(2, 6, 6), "a").sha256


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_and_npz_round_trip(tmp_path, colour, order):
    array = np.asarray(colour, order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", images=array, labels=np.arange(6))
    np.savez(tmp_path / "c.npz", whatever=array)
    for name in ("a.npy", "a.npz", "b.npz", "c.npz"):
        np.testing.assert_array_equal(read_images(str(tmp_path / name)).images, colour)
    assert len(read_images(str(tmp_path / "a.npy"), limit=4)) == 4


def test_idx_round_trip(tmp_path, grey):
    (tmp_path / "raw-idx3-ubyte").write_bytes(idx(grey))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(grey)))
    for name in ("raw-idx3-ubyte", "zipped.gz"):
        found = read_images(str(tmp_path / name)).images
        np.testing.assert_array_equal(found[..., 0], grey)
        assert found.flags.writeable


def test_folder_is_sorted_and_lossless(tmp_path, colour):
    for i in (3, 0, 5, 1, 4, 2):
        Image.fromarray(colour[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(read_images(str(tmp_path)).images, colour)
    assert len(read_images(str(tmp_path), limit=2)) == 2


def test_subsets_are_spread_over_the_whole(tmp_path):
    """Folders and arrays are often sorted by class, so the first ones would be of one class."""
    many = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    found = image_set(many, "a", 50)
    assert (len(found), found.subset_of) == (50, 200)
    order = found.images[:, 0, 0, 0].astype(int)
    assert (np.diff(order) > 0).all()
    assert 60 < order.mean() < 140
    np.testing.assert_array_equal(image_set(many, "a", 50).images, found.images)
    assert image_set(many, "a", 200).subset_of is image_set(many, "a").subset_of is None
    stream = read_image_stream(io.BytesIO(npy(many[:120]) + npy(many[120:])), 50)
    assert (stream.sha256, stream.subset_of) == (found.sha256, 200)
    for i, image in enumerate(many):
        Image.fromarray(image).save(tmp_path / f"{i:03d}.png")
    folder = read_images(str(tmp_path), 50)
    assert (folder.sha256, folder.subset_of) == (found.sha256, 200)


def test_named_digits():
    digits = read_images("digits")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert (digits.images.min(), digits.images.max()) == (0, 255)


def test_stream_round_trip(colour):
    stream = io.BytesIO(npy(colour[:4]) + npy(colour[4:]))
    found = read_image_stream(stream)
    np.testing.assert_array_equal(found.images, colour)
    assert found.sha256 == image_set(colour, "another name").sha256


def test_stream_of_short_reads(grey):
    class Dribble(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    np.testing.assert_array_equal(read_image_stream(Dribble(npy(grey))).images[..., 0], grey)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "empty"),
        (b"hello, world", "no .npy"),
        (npy(np.zeros((2, 4, 4), np.uint8))[:-1], "cut off"),
        (npy(np.zeros((2, 4, 4), np.uint8))[:40], "header"),
        (npy(np.zeros((2, 4, 4), np.uint8)) + b"\x93NUM", "no .npy"),
        (npy(np.zeros((2, 4, 4), np.uint8)) + npy(np.zeros((2, 5, 4), np.uint8)), "images of"),
        (npy(np.zeros((2, 4, 4), np.float32)), "uint8"),
        (npy(np.zeros((2, 4, 4), np.uint8)).replace(b"(2, 4, 4)", b"(9000000000000, 4, 4)"), "header|cut off"),
    ],
)
def test_bad_streams(payload, says):
    with pytest.raises(InputError, match=says):
        read_image_stream(io.BytesIO(payload))


@pytest.mark.parametrize(
    "array",
    [
        np.full((2, 4, 4), np.nan),
        np.zeros((2, 4, 4), np.float32),
        np.zeros((2, 4, 4), np.int64),
        np.zeros((2, 4, 4), bool),
        np.zeros((0, 4, 4), np.uint8),
        np.zeros((2, 0, 4), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((2, 4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 2, 4, 4, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_bad_arrays(array, tmp_path):
    with pytest.raises(InputError, match="a name"):
        image_set(array, "a name")
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"a\.npy"):
        read_images(str(tmp_path / "a.npy"))


def test_objects_are_never_unpickled(tmp_path):
    array = np.array([Bomb()], object)
    (tmp_path / "a.npy").write_bytes(npy(array, allow_pickle=True))
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "a.npz", array, allow_pickle=True)
    for name in ("a.npy", "a.npz", "pickled.npy"):
        with pytest.raises(InputError):
            read_images(str(tmp_path / name))
    with pytest.raises(InputError, match="never unpickled"):
        read_image_stream(io.BytesIO(npy(array, allow_pickle=True)))
    assert not Bomb.exploded


def test_bad_npz(tmp_path, grey):
    np.savez(tmp_path / "two.npz", a=grey, b=grey)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "zip.npz").write_bytes(b"PK not a zip")
    with zipfile.ZipFile(tmp_path / "none.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    whole = io.BytesIO()
    np.savez_compressed(whole, grey)
    damaged = bytearray(whole.getvalue())
    damaged[120:140] = bytes(20)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    expected = {"two": "arr_0", "stats": "statistics", "zip": "damaged", "none": "no array", "damaged": "damaged"}
    for name, says in expected.items():
        with pytest.raises(InputError, match=says) as caught:
            read_images(str(tmp_path / f"{name}.npz"))
        assert f"{name}.npz" in str(caught.value)


def test_bad_idx(tmp_path, grey):
    bad = {
        "short": idx(grey)[:-1],
        "long": idx(grey) + b"\0",
        "headless": idx(grey)[:9],
        "floats": b"\0\0\x0d" + idx(grey)[3:],
    }
    for name, data in bad.items():
        for packed in (data, gzip.compress(data)):
            (tmp_path / f"{name}.gz").write_bytes(packed)
            with pytest.raises(InputError, match=name):
                read_images(str(tmp_path / f"{name}.gz"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(idx(grey))[:-20])
    with pytest.raises(InputError, match="cut off"):
        read_idx(tmp_path / "cut.gz")
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(np.arange(5, dtype=np.uint8))))
    with pytest.raises(InputError, match="labels"):
        read_images(str(tmp_path / "labels.gz"))


def test_bad_folders(tmp_path, grey, colour):
    with pytest.raises(InputError, match="no images"):
        read_images(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(InputError, match="train-images-idx3-ubyte"):
        read_images(str(tmp_path))
    Image.fromarray(grey[0]).save(tmp_path / "0.png")
    Image.fromarray(grey[1][:4]).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png is 4x7 grey"):
        read_images(str(tmp_path))
    Image.fromarray(colour[1]).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png is 5x7 RGB"):
        read_images(str(tmp_path))
    Image.fromarray(np.dstack([colour[1], grey[1]])).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png has mode RGBA"):
        read_images(str(tmp_path))
    whole = (tmp_path / "0.png").read_bytes()
    for broken in (whole[:-30], b"not a png", b"", whole[:20] + b"\xff" * 20 + whole[40:]):
        (tmp_path / "1.png").write_bytes(broken)
        with pytest.raises(InputError, match=r"1\.png is broken"):
            read_images(str(tmp_path))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_images(str(tmp_path / "nothing"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="no image set"):
        read_images(str(tmp_path / "a.txt"))
