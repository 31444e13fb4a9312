"""Files that a row may name, and the pixels read from them."""

import os
import pickle
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pilot_flwr.data import images as image_files
from pilot_flwr.data.images import ImageError, ImageFile, expand_to_square, mean_colour

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("outside.png", "images/a.png", "images/sub/b.png", "images2.png"):
        Image.new("RGB", (6, 4), (10, 20, 30)).save(tmp_path / name)
    return tmp_path / "images"


def image(folder, name, **more):
    return ImageFile(folder, name, "train.json, row 17, image 1", **more)


def refused(folder, name, message, **more):
    for read in (image(folder, name, **more).read, image(folder, name, **more).size):
        with pytest.raises(ImageError, match=f"^train.json, row 17, image 1 {message}") as error:
            read()
        assert error.value.path == name
        assert len(name) < 5 or name not in str(error.value)
        assert pickle.loads(pickle.dumps(error.value)).path == name
        assert str(folder) not in str(error.value)


@pytest.mark.parametrize("name", ["a.png", "sub/b.png", "./sub//b.png"])
def test_an_image_of_the_folder_is_read(folder, name):
    assert image(folder, name).read().getpixel((0, 0)) == (10, 20, 30)
    assert image(folder, name).size() == (4, 6)


def test_a_header_is_read_again_only_if_the_file_has_changed(folder, monkeypatch):
    shown, opened = image(folder, "a.png"), []
    opens = image_files._open
    monkeypatch.setattr(image_files, "_open", lambda path: opened.append(path) or opens(path))
    assert [shown.size(), shown.size(), image(folder, "a.png").size()] == 3 * [(4, 6)]
    assert len(opened) == 1
    Image.new("RGB", (8, 2)).save(folder / "a.png")
    assert shown.size() == (2, 8)
    padded = image(folder, "a.png", background=(0, 0, 0))
    assert padded.size() == (8, 8)


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "sub/../a.png", "sub/../../outside.png", "/etc/hostname", "C:\\a.png"]
    + ["..\\outside.png", "\\\\host\\a.png", "//etc/hostname", "\\etc", "C:a.png", ".."],
)
def test_a_name_that_may_leave_the_folder_is_refused(folder, name):
    refused(folder, name, "must be relative to the image folder and must not go up")


def test_links_may_not_lead_out_of_the_folder(folder, tmp_path):
    (folder / "file.png").symlink_to(tmp_path / "outside.png")
    (folder / "relative.png").symlink_to("../outside.png")
    (folder / "sibling.png").symlink_to(tmp_path / "images2.png")  # its path begins with ours
    (folder / "up").symlink_to(tmp_path)
    (folder / "second.png").symlink_to("file.png")
    for name in ("file.png", "relative.png", "sibling.png", "up/outside.png", "second.png"):
        refused(folder, name, "is a link that leads out of the image folder")


def test_links_may_lead_to_the_folders_that_the_owner_lists(folder, tmp_path):
    """The hub's cache: a snapshot is a folder of links into a folder of blobs."""
    blobs = tmp_path / "hub" / "blobs"
    (blobs / "folder").mkdir(parents=True)
    (folder / "a.png").rename(blobs / "0123")
    os.mkfifo(blobs / "pipe")
    (folder / "a.png").symlink_to("../hub/blobs/0123")
    (folder / "sub" / "deep").symlink_to(blobs)
    (folder / "chain.png").symlink_to("a.png")
    refused(
        folder, "a.png", "is a link that leads out .* `linked-folders` .* `data.linked_folders`"
    )
    linked = {"linked_folders": (tmp_path / "nowhere", blobs)}
    for name in ("a.png", "sub/deep/0123", "chain.png"):
        assert image(folder, name, **linked).size() == (4, 6)
    (folder / "other.png").symlink_to(tmp_path / "outside.png")
    (blobs / "other").symlink_to(tmp_path / "outside.png")
    (folder / "through.png").symlink_to(blobs / "other")
    (tmp_path / "hub" / "blobs2").symlink_to(tmp_path / "outside.png")
    (folder / "beside.png").symlink_to("../hub/blobs2")
    for name in ("other.png", "through.png", "beside.png"):
        refused(folder, name, "is a link that leads out", **linked)
    (folder / "pipe.png").symlink_to(blobs / "pipe")
    (folder / "folder.png").symlink_to(blobs / "folder")
    for name in ("pipe.png", "folder.png"):
        refused(folder, name, "is not a file", **linked)
    for name in (str(blobs / "0123"), "../hub/blobs/0123"):
        refused(folder, name, "must be relative to the image folder", **linked)
    (tmp_path / "blobs-by-link").symlink_to(blobs)
    by_link = image(folder, "a.png", linked_folders=(tmp_path / "blobs-by-link",))
    assert by_link.size() == (4, 6)


def test_links_within_the_folder_and_to_it_are_fine(folder, tmp_path):
    (folder / "inner.png").symlink_to("sub/b.png")
    (tmp_path / "linked").symlink_to(folder)
    assert image(folder, "inner.png").size() == (4, 6)
    assert image(tmp_path / "linked", "a.png").size() == (4, 6)
    (folder / "in").symlink_to(tmp_path / "linked" / "sub")
    assert image(folder, "in/b.png").size() == (4, 6)


def test_what_is_no_plain_file_is_refused(folder):
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    (folder / "circle.png").symlink_to("circle.png")
    refused(folder, "pipe.png", "is not a file")
    refused(folder, "sub", "is not a file")
    refused(folder, ".", "is not a file")
    refused(folder, "absent.png", r"cannot be opened \(No such file or directory\)")
    refused(folder, "a.png/b.png", r"cannot be opened \(Not a directory\)")
    refused(folder, "circle.png", "cannot be opened")
    refused(folder, "a" * 5000, r"cannot be opened \(File name too long\)")
    refused(folder, "\ud800.png", r"cannot be opened \(not a valid file name\)")
    for name in ("", "a.png\0.txt"):
        refused(folder, name, "is empty or has a NUL in its name")


def test_a_folder_that_is_absent_is_an_error_of_the_row(folder):
    refused(folder / "nowhere", "a.png", "cannot be opened")


def test_a_broken_or_cut_image_names_the_row(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(pixels).save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        assert image(folder, name).size() == (64, 64)  # the header is whole
        with pytest.raises(
            ImageError, match=r"image 1 cannot be decoded \(truncated: the file ends"
        ):
            image(folder, name).read()
    for content, reason in [
        (b"no image", "in no supported format"),
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"<svg/>", "an SVG drawing, which is not supported"),
        (b"\x89PNG\r\n", "truncated or damaged"),
        (b"../../blobs/0123", "a path in a text file, as copying a link may leave it"),
        (b"../blobs/0123\n", "a path in a text file"),
    ]:
        (folder / "other.png").write_bytes(content)
        refused(folder, "other.png", rf"cannot be read as an image \({reason}")


def test_sixteen_bit_greys_keep_their_levels(folder):
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(folder / name)
        assert np.array_equal(np.asarray(image(folder, name).read())[..., 0], ramp >> 8)
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    with pytest.raises(ImageError, match="row 17, image 1 has floating-point grey values"):
        image(folder, "float.tif").read()
    (folder / "ramp.pgm").write_bytes(b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(image(folder, "ramp.pgm").read())[..., 0], ramp >> 8)


@pytest.mark.parametrize("most", [255, 65_535, 2**31 - 1])
def test_greys_of_thirty_two_bits_have_no_known_range(folder, most):
    levels = np.linspace(0, most, 256).astype(np.int32).reshape(16, 16)
    Image.fromarray(levels).save(folder / "ramp.tif")
    for official in (False, True):
        with pytest.raises(ImageError, match="image 1 has grey values of 32 bits; save it with 8"):
            image(folder, "ramp.tif", official=official).read()


def test_greys_of_twelve_bits_keep_their_upper_eight(folder):
    """Two pixels, 0xFFF and 0x800, in three bytes of a TIFF file."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0"
    (folder / "a.tif").write_bytes(data + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert np.asarray(image(folder, "a.tif").read())[0, :, 0].tolist() == [0xFF, 0x80]


def with_transparent(folder, levels, colour):
    """Save a PNG of 16 bits with a transparent colour, which Pillow does not write."""
    kind = 2 if levels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, kind, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(colour)}H", *colour),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    (folder / "clear.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def test_a_transparent_grey_of_sixteen_bits_is_white(folder):
    """Only this very level: others with the same upper 8 bits stay."""
    with_transparent(folder, np.array([[0x1000, 0x1001, 0x2000]], np.uint16), (0x1001,))
    assert image(folder, "clear.png").header().transparent
    assert np.asarray(image(folder, "clear.png").read())[0, :, 0].tolist() == [0x10, 0xFF, 0x20]
    official = image(folder, "clear.png", official=True).read()
    assert np.asarray(official)[0, :, 0].tolist() == [0x10, 0x10, 0x20]


def test_a_transparent_colour_of_sixteen_bits_is_refused(folder):
    """Pillow keeps 8 bits of each colour, so that it cannot find the transparent pixels."""
    colour = (0x1001, 0x2002, 0x3003)
    with_transparent(folder, np.array([[colour, (0, 0, 0)]], np.uint16), colour)
    with pytest.raises(ImageError, match="image 1 has a transparent colour of 16 bits; save it"):
        image(folder, "clear.png").read()
    official = image(folder, "clear.png", official=True).read()
    assert np.asarray(official)[0].tolist() == [[0x10, 0x20, 0x30], [0, 0, 0]]


def test_a_png_with_much_metadata_is_read(folder):
    info = PngInfo()
    info.add_text("workflow", "a" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / "text.png", pnginfo=info)
    assert image(folder, "text.png").read().getpixel((0, 0)) == (1, 2, 3)


def test_a_format_that_runs_other_programs_is_not_opened(folder):
    Image.new("RGB", (4, 4)).save(folder / "a.eps")
    refused(folder, "a.eps", "cannot be read as an image")


def png_header(width, height):
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 50_000])  # Pillow warns of the one, refuses the other
def test_a_decompression_bomb_is_refused_by_its_header(folder, side):
    (folder / "bomb.png").write_bytes(png_header(side, side))
    refused(folder, "bomb.png", "has more than 89,478,485 pixels")


@pytest.mark.parametrize(("width", "height"), [(30_000, 400), (400, 30_000), (9_460, 95)])
def test_padding_counts_for_the_bound_before_anything_is_allocated(folder, width, height):
    """The largest square within the bound has a side of 9,459 pixels."""
    (folder / "long.png").write_bytes(png_header(width, height))
    message = "has more than 89,478,485 pixels when padded to a square"
    refused(folder, "long.png", message, background=(1, 2, 3))
    assert image(folder, "long.png").size() == (height, width)  # without padding it is fine


def test_the_largest_square_that_padding_may_make(folder):
    (folder / "long.png").write_bytes(png_header(9_459, 95))
    assert image(folder, "long.png", background=(1, 2, 3)).size() == (9_459, 9_459)


@pytest.mark.parametrize(("width", "height"), [(30_000, 1), (1, 101), (201, 2)])
def test_a_thread_of_pixels_is_refused_by_its_header(folder, width, height):
    """An image processor that resizes the short side would enlarge the long one 300 times."""
    (folder / "thin.png").write_bytes(png_header(width, height))
    refused(folder, "thin.png", "has one side more than 100 times as long as the other")
    (folder / "thin.png").write_bytes(png_header(100, 1))
    assert image(folder, "thin.png").size() == (1, 100)


def test_memory_that_is_not_there_is_an_error_of_the_image(folder, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(image_files, "expand_to_square", exhausted)
    with pytest.raises(ImageError, match=r"image 1 cannot be decoded \(MemoryError\)"):
        image(folder, "a.png", background=(1, 2, 3)).read()


def test_the_bound_is_pillows_own():
    assert image_files.MOST_PIXELS == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(folder, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    original = Image.new("RGB", (5, 3), (200, 100, 50)).convert(mode)
    original.save(folder / f"mode.{suffix}")
    found = image(folder, f"mode.{suffix}").read()
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(original.convert("RGB")))


def test_transparency_is_composited_on_white(folder):
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(folder / "clear.png")
    assert image(folder, "clear.png").read().getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.putpalette([200, 100, 50] + [0] * 765)
    palette.save(folder / "palette.png", transparency=b"\x00\xff")
    assert image(folder, "palette.png").read().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_in_exif_is_applied_as_pillow_does(folder, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: a camera held upright; 0 and 9 mean nothing
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"exif.{suffix}", exif=exif, lossless=True)
    with Image.open(folder / f"exif.{suffix}") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    found = image(folder, f"exif.{suffix}")
    assert np.array_equal(np.asarray(found.read()), expected)
    turned = 2 <= orientation <= 8
    assert found.header() == (*found.read().size[::-1], False, turned)
    assert found.size() == ((6, 4) if 5 <= orientation <= 8 else (4, 6))


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_the_official_reading_turns_nothing_itself(folder, suffix):
    """As LLaVA's `Image.open(path).convert("RGB")`, in which Pillow turns TIFF alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"exif.{suffix}", exif=exif)
    with Image.open(folder / f"exif.{suffix}") as opened:
        expected = np.asarray(opened.convert("RGB"))
    found = image(folder, f"exif.{suffix}", official=True)
    assert np.array_equal(np.asarray(found.read()), expected)
    assert found.header() == (*expected.shape[:2], False, True)
    assert found.identity() != image(folder, f"exif.{suffix}").identity()


def transparent(mode):
    """Return an image of a mode with transparency, and what to save it with."""
    if mode == "P":
        palette = Image.new("P", (4, 2))
        palette.putpalette([200, 100, 50] + [0] * 765)
        return palette, {"transparency": b"\x00\xff"}
    if mode in ("RGB", "L"):
        colour = (200, 100, 50) if mode == "RGB" else 50
        return Image.new(mode, (4, 2), colour), {"transparency": colour}
    return Image.new("RGBA", (4, 2), (200, 100, 50, 128)).convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_the_official_reading_drops_transparency(folder, mode):
    original, options = transparent(mode)
    original.save(folder / "clear.png", **options)
    with Image.open(folder / "clear.png") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of a palette's transparency
        expected = np.asarray(opened.convert("RGB"))
    found = image(folder, "clear.png", official=True)
    assert np.array_equal(np.asarray(found.read()), expected)
    assert found.header() == (2, 4, True, False)
    assert not np.array_equal(np.asarray(image(folder, "clear.png").read()), expected)


def test_sixteen_bit_greys_keep_their_levels_in_the_official_reading(folder):
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(folder / "ramp.png")
    found = image(folder, "ramp.png", official=True).read()
    assert np.array_equal(np.asarray(found)[..., 0], ramp >> 8)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b"Exif\0\0no"]
)
def test_corrupt_exif_data_neither_warn_nor_turn(folder, exif):
    """The tests fail on any warning; Pillow's reach a terminal without file or row."""
    Image.new("RGB", (6, 4)).save(folder / "exif.jpg", exif=exif)
    Image.new("RGB", (6, 4)).save(folder / "exif.webp", exif=exif)
    for name in ("exif.jpg", "exif.webp"):
        for official in (False, True):
            found = image(folder, name, official=official)
            assert found.read().size == (6, 4)
            assert found.header() == (4, 6, False, False)


def test_a_tiff_with_a_corrupt_part_does_not_warn(folder):
    pixels = np.zeros((4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = "comment"
    Image.fromarray(pixels).save(folder / "a.tif", exif=exif)
    data = (folder / "a.tif").read_bytes()
    (folder / "a.tif").write_bytes(data.replace(struct.pack("<HH", 0x9286, 2), b"\x86\x92\x07\0"))
    assert image(folder, "a.tif").read().size == (6, 4)


def test_the_mean_colour_is_clips_as_llava_has_it():
    processor = SimpleNamespace(image_mean=CLIP_MEAN)
    assert mean_colour(processor) == (122, 116, 104)  # 122.77, 116.75, 104.09


@pytest.mark.parametrize(("width", "height"), [(5, 2), (2, 5), (4, 1), (3, 3), (1, 4)])
def test_padding_is_numpys_centred_padding(folder, width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side, colour = max(width, height), (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = colour
    expected[top : top + height, left : left + width] = pixels
    assert np.array_equal(expand_to_square(Image.fromarray(pixels), colour), expected)
    Image.fromarray(pixels).save(folder / "odd.png")
    padded = image(folder, "odd.png", background=colour)
    assert np.array_equal(np.asarray(padded.read()), expected)
    assert padded.size() == (side, side)
