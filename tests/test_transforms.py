"""The opener against files of known pixels, the views against torchvision's, the augmentations against closed forms."""

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from cvlab.data.augment import UNIFORMS_PER_IMAGE, change_colours, crop_grids, train_pairs, train_views, uniforms
from cvlab.models import build
from cvlab.transforms import (
    MAX_PIXELS,
    ImageError,
    centre_view,
    open_image,
    resize_logits,
    resized,
    view,
    whole_mask,
)

# Six blocks of 16 x 16 pixels, none like another: no turn and no mirror maps it to itself, and lossy codecs keep it.
COLOURS = np.array([[220, 30, 30], [30, 200, 30], [40, 40, 210], [230, 220, 40], [20, 20, 20], [240, 240, 240]])
INDICES = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(16, axis=0).repeat(16, axis=1)  # (32, 48)
PICTURE = COLOURS[INDICES].astype(np.uint8)  # (32, 48, 3)
GREY = (INDICES * 50).astype(np.uint8)
WHITE = np.full_like(PICTURE, 255)
LOSSY = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "HEIF": {"quality": 100},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
TOLERANCE = 12  # grey levels, of lossy codecs
AVIF = ["AVIF"] if features.check("avif") else []  # some builds of Pillow come without


def encode(image: Image.Image | np.ndarray, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, file_format, **LOSSY.get(file_format, {}) | options)
    return file.getvalue()


def opened(contents: bytes) -> np.ndarray:
    image = open_image(io.BytesIO(contents))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey_as_rgb(grey: object) -> np.ndarray:
    return np.asarray(grey)[..., None].repeat(3, axis=-1)


def with_palette(**options: object) -> bytes:
    image = Image.fromarray(INDICES).convert("P")
    image.putdata(INDICES.flatten())
    image.putpalette(COLOURS.astype(np.uint8).tobytes())
    return encode(image, "PNG", **options)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)


def animation(file_format: str, **options: object) -> bytes:
    return encode(PICTURE, file_format, save_all=True, append_images=[Image.fromarray(PICTURE[::-1])], **options)


def big_endian(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape
    contents = encode(Image.frombytes("I;16B", (width, height), pixels.astype(">u2").tobytes()), "TIFF")
    assert Image.open(io.BytesIO(contents)).mode == "I;16B"
    return contents


# --- the opener -------------------------------------------------------------------------------------------------------

ALPHA = np.array([0, 64, 128, 200, 255, 255], np.uint8)[INDICES]
WIDE = np.array([[0, 32768, 65535], [257, 514, 128]], np.uint16)  # 16-bit grey
WIDE_AS_8_BITS = [[0, 128, 255], [1, 2, 0]]
DARK = np.array([[0, 100], [200, 129]], np.uint16)  # 16 bits, of which the upper eight are unused
FRACTIONS = np.array([[0, 0.2], [0.6, 1]], np.float32)
HEIGHTS = np.array([[-10, 0], [10, 30]], np.float32)  # brought to 0..255 by (value + 10) / 40
COUNTS = np.array([[0, 100_000], [50_000, 20_000]], np.int32)

FILES = {
    # name: (contents, expected pixels, largest difference, how many notes)
    "rgb.jpg": (encode(PICTURE, "JPEG"), PICTURE, TOLERANCE, 0),
    "progressive.jpg": (encode(PICTURE, "JPEG", progressive=True), PICTURE, TOLERANCE, 0),
    "grey.jpg": (encode(GREY, "JPEG"), grey_as_rgb(GREY), TOLERANCE, 0),
    "cmyk.jpg": (encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"), PICTURE, TOLERANCE, 0),
    "two frames.jpg": (animation("MPO", quality=95, subsampling=0), PICTURE, TOLERANCE, 1),
    "rgb.png": (encode(PICTURE, "PNG"), PICTURE, 0, 0),
    "a png.JPG": (encode(PICTURE, "PNG"), PICTURE, 0, 0),  # the contents count, not the name
    "palette.png": (with_palette(), PICTURE, 0, 0),
    "palette, one transparent.png": (
        with_palette(transparency=0),
        on_white(PICTURE, np.where(INDICES == 0, 0, 255)),
        0,
        1,
    ),
    "palette with alpha.png": (
        with_palette(transparency=bytes([0, 64, 128, 200, 255, 255])),
        on_white(PICTURE, ALPHA),
        1,
        1,
    ),
    "rgba.png": (encode(np.dstack([PICTURE, ALPHA]), "PNG"), on_white(PICTURE, ALPHA), 1, 1),
    "rgba, opaque.png": (encode(np.dstack([PICTURE, np.full_like(GREY, 255)]), "PNG"), PICTURE, 0, 0),
    "rgba, all hidden.png": (encode(np.dstack([PICTURE, np.zeros_like(GREY)]), "PNG"), WHITE, 0, 1),
    "transparent colour.png": (
        encode(PICTURE, "PNG", transparency=tuple(COLOURS[2].tolist())),
        on_white(PICTURE, np.where(INDICES == 2, 0, 255)),
        0,
        1,
    ),
    "la.png": (encode(np.dstack([GREY, ALPHA]), "PNG"), on_white(grey_as_rgb(GREY), ALPHA), 1, 1),
    "16 bits.png": (encode(WIDE, "PNG"), grey_as_rgb(WIDE_AS_8_BITS), 0, 0),
    "1 bit.png": (encode(INDICES % 2 == 1, "PNG"), grey_as_rgb(INDICES % 2 * 255), 0, 0),
    "animated.png": (animation("PNG"), PICTURE, 0, 1),
    "animated.gif": (animation("GIF"), PICTURE, 0, 1),
    "still.gif": (encode(PICTURE, "GIF"), PICTURE, 0, 0),
    "lossless.webp": (encode(PICTURE, "WEBP", lossless=True), PICTURE, 0, 0),
    "alpha.webp": (
        encode(np.dstack([PICTURE, ALPHA]), "WEBP", lossless=True, exact=True),
        on_white(PICTURE, ALPHA),
        1,
        1,
    ),
    "animated.webp": (animation("WEBP", lossless=True), PICTURE, 0, 1),
    "uint8.tiff": (encode(PICTURE, "TIFF"), PICTURE, 0, 0),
    "lzw.tiff": (encode(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE, 0, 0),
    "pages.tiff": (animation("TIFF"), PICTURE, 0, 1),
    "uint16.tiff": (encode(WIDE, "TIFF"), grey_as_rgb(WIDE_AS_8_BITS), 0, 0),
    "uint16, dark.tiff": (encode(DARK, "TIFF"), grey_as_rgb([[0, 0], [1, 1]]), 0, 1),
    "uint16, big-endian.tiff": (big_endian(WIDE), grey_as_rgb(WIDE_AS_8_BITS), 0, 0),
    "uint16, big-endian, dark.tiff": (big_endian(DARK), grey_as_rgb([[0, 0], [1, 1]]), 0, 1),
    "float in 0..1.tiff": (encode(FRACTIONS, "TIFF"), grey_as_rgb([[0, 51], [153, 255]]), 0, 0),
    "float in 0..255.tiff": (encode(FRACTIONS * 200, "TIFF"), grey_as_rgb([[0, 40], [120, 200]]), 0, 0),
    "float beyond.tiff": (encode(HEIGHTS, "TIFF"), grey_as_rgb([[0, 64], [128, 255]]), 0, 1),
    "float, largest.tiff": (encode(HEIGHTS * np.float32(1e37), "TIFF"), grey_as_rgb([[0, 64], [128, 255]]), 1, 1),
    "float, one value.tiff": (encode(np.full((4, 4), 300, np.float32), "TIFF"), np.zeros((4, 4, 3)), 0, 1),
    "int32.tiff": (encode(COUNTS, "TIFF"), grey_as_rgb([[0, 255], [128, 51]]), 0, 1),
    "int32 of a byte.tiff": (encode(GREY.astype(np.int32), "TIFF"), grey_as_rgb(GREY), 0, 0),
    "rgb.bmp": (encode(PICTURE, "BMP"), PICTURE, 0, 0),
    "rgb.ppm": (encode(PICTURE, "PPM"), PICTURE, 0, 0),
    "rgb.heic": (encode(PICTURE, "HEIF"), PICTURE, TOLERANCE, 0),
    "alpha.heic": (encode(np.dstack([PICTURE, ALPHA]), "HEIF"), on_white(PICTURE, ALPHA), TOLERANCE, 1),
}
if AVIF:
    FILES["rgb.avif"] = (encode(PICTURE, "AVIF"), PICTURE, TOLERANCE, 0)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, of divisions by zero and the like
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_known_pixels(name: str, tmp_path: Path) -> None:
    contents, expected, tolerance, notes = FILES[name]
    path = tmp_path / name
    path.write_bytes(contents)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (np.shape(expected)[1], np.shape(expected)[0])
    # Rounding 127.5 either way is no difference.
    np.testing.assert_allclose(np.asarray(image).astype(float), expected, rtol=0, atol=tolerance + 0.5)
    assert len(image.info["notes"]) == notes


# EXIF says where row 0 and column 0 of the stored picture belong; what is stored of an upright picture follows.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "HEIF"] + AVIF)
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](PICTURE))
    # HEIC keeps the orientation as a box of its own, which pillow_heif writes from the bytes of the tag.
    contents = encode(stored, file_format, exif=exif.tobytes(), **{"lossless": True} if file_format == "WEBP" else {})
    np.testing.assert_allclose(opened(contents), PICTURE, rtol=0, atol=TOLERANCE if file_format in LOSSY else 0)


def test_16_bit_grey_is_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = encode(np.ascontiguousarray(STORED[6](WIDE)), "PNG", exif=exif)
    assert (opened(contents) == grey_as_rgb(WIDE_AS_8_BITS)).all()


def test_a_file_object_is_read_from_its_start_and_left_open() -> None:
    file = io.BytesIO(encode(PICTURE, "PNG"))
    file.seek(7)
    for _ in range(2):
        assert (np.asarray(open_image(file)) == PICTURE).all()


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(PICTURE, "PNG"))
    assert (np.asarray(open_image(str(tmp_path / "a.png"))) == PICTURE).all()


def png(width: int, height: int, pixels: bytes, depth: int = 1) -> bytes:
    """A grey PNG that says what it is told to."""

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def one_bit_png(width: int, height: int) -> bytes:
    return png(width, height, zlib.compress(bytes((width + 7) // 8 + 1) * height, 1))


NOT_PICTURES = {
    "text.jpg": b"Dear diary, these are no pixels.\n" * 20,
    "empty.png": b"",
    "one pixel wide.png": encode(PICTURE[:, :1], "PNG"),
    "one pixel high.jpg": encode(PICTURE[:1], "JPEG"),
    "nan.tiff": encode(np.array([[0, np.nan], [1, 0.5]], np.float32), "TIFF"),
    "infinite.tiff": encode(np.array([[0, np.inf], [1, 0.5]], np.float32), "TIFF"),
    "page.html": b"<html><img src='x.jpg'></html>",
    "header only.png": png(64, 64, b""),
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(NOT_PICTURES[name])
    with pytest.raises(ImageError):
        open_image(tmp_path / name)


def test_postscript_is_refused_unread() -> None:
    """Pillow knows it, and would have Ghostscript run it: it is a program."""
    with pytest.raises(ImageError) as refusal:
        opened(encode(PICTURE, "EPS"))
    assert isinstance(refusal.value.__cause__, UnidentifiedImageError)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("", "missing.jpg", "file/a.jpg", "a" * 300, "a\0.jpg"):  # the first is the folder
        with pytest.raises(ImageError):
            open_image(tmp_path / name)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "HEIF"] + AVIF)
def test_a_picture_that_is_cut_off_is_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    contents = encode(noise, file_format)
    with pytest.raises(ImageError):
        opened(contents[: int(share * len(contents))])


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000), (2, MAX_PIXELS // 2 + 1)])
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int]) -> None:
    for contents in (one_bit_png(*size), png(*size, b"no pixels at all")):
        assert len(contents) < 1_000_000
        with pytest.raises(ImageError) as refusal:
            opened(contents)
        # The second holds nothing that could be decoded, and is refused for the same reason as the first.
        assert not isinstance(refusal.value.__cause__, OSError)


def test_a_picture_within_the_limit_is_opened() -> None:
    assert open_image(io.BytesIO(one_bit_png(4_000, 1_000))).size == (4_000, 1_000)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it reads around
def test_damaged_files_open_or_are_refused() -> None:
    """200 mutations of valid files: whatever a decoder makes of them, nothing but ImageError comes out."""
    formats = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "HEIF", "JPEG2000"] + AVIF
    originals = [encode(PICTURE, file_format) for file_format in formats]
    originals += [encode(WIDE, "TIFF"), encode(FRACTIONS, "TIFF"), encode(np.dstack([PICTURE, ALPHA]), "PNG")]
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(200):
        contents = bytearray(originals[i % len(originals)])
        # Half of them in the header, where sizes and kinds are.
        end = len(contents) if rng.random() < 0.5 else min(100, len(contents))
        for position in rng.integers(0, end, size=rng.integers(1, 6)):
            contents[position] = rng.integers(256)
        if rng.random() < 0.2:
            first, last = sorted(rng.integers(0, len(contents), size=2))
            del contents[first:last]
        try:
            opened(bytes(contents))
        except ImageError:
            refused += 1
    assert 0 < refused < 200  # both outcomes occur


# --- evaluation -------------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (90, 60), (61, 97), (133, 71), (75, 101), (40, 80), (37, 33), (21, 31)]  # width, height


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_a_classifiers_view_is_resize_and_centre_crop(size: tuple[int, int], crop_pct: float) -> None:
    image = noise_image(*size)
    model = build("convnet", ["a", "b"], 33, {"widths": (4, 4)}, crop_pct=crop_pct)
    shorter = v2.Resize(math.floor(33 / crop_pct), InterpolationMode.BILINEAR, antialias=True)
    expected = v2.Compose([shorter, v2.CenterCrop(33), v2.ToImage()])(image)
    seen = view(image, model)
    assert seen.shape == (1, 3, 33, 33)
    assert seen.dtype == torch.float32
    assert seen.min() >= 0
    assert seen.max() <= 1
    torch.testing.assert_close(seen[0] * 255, expected.float(), rtol=0, atol=1.001)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", SIZES[:3])
def test_a_squashed_view_shows_the_whole_photo_whatever_its_shape(size: tuple[int, int], crop_pct: float) -> None:
    image, side = noise_image(*size), math.floor(33 / crop_pct)
    model = build("convnet", ["a", "b"], 33, {"widths": (4, 4)}, crop_pct=crop_pct, crop_mode="squash")
    both = v2.Resize((side, side), InterpolationMode.BILINEAR, antialias=True)
    expected = v2.Compose([both, v2.CenterCrop(33), v2.ToImage()])(image)
    torch.testing.assert_close(view(image, model)[0] * 255, expected.float(), rtol=0, atol=1.001)


@pytest.mark.parametrize("size", [(500, 90), (90, 501)])
def test_of_a_panorama_the_middle_is_seen(size: tuple[int, int]) -> None:
    """Cutting the ends off first moves the view by half a pixel at most; the picture is smooth enough for that."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    image = Image.fromarray((np.stack([x, y, (x + y) / 2], axis=-1) * 255).round().astype(np.uint8))
    expected = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32)])(image)
    difference = np.asarray(expected).astype(int) - np.asarray(centre_view(image, 32, 0.875))
    assert np.abs(difference).max() <= 2


def test_the_shorter_side_is_what_is_asked_for_and_a_panorama_is_not_wider_than_two() -> None:
    sizes = {(90, 60): (48, 32), (61, 97): (32, 50), (32, 32): (32, 32), (500, 90): (64, 32), (90, 501): (32, 64)}
    for size, expected in sizes.items():
        assert resized(Image.new("RGB", size), 32).size == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_segmenters_view_is_the_whole_photo(size: tuple[int, int]) -> None:
    image = noise_image(*size)
    model = build("unet", ["a"], 48, {"width": 4, "depth": 2})
    expected = v2.Compose([v2.Resize((48, 48), InterpolationMode.BILINEAR, antialias=True), v2.ToImage()])(image)
    seen = view(image, model)
    assert seen.shape == (1, 3, 48, 48)
    torch.testing.assert_close(seen[0] * 255, expected.float(), rtol=0, atol=1.001)


@pytest.mark.parametrize("size", [(7, 11), (32, 32), (97, 61), (5, 3)])
def test_whole_mask_takes_the_nearest_pixel(size: tuple[int, int]) -> None:
    masks = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = ((np.arange(16) + 0.5) * size[0] / 16).astype(int)  # the pixel in which the output pixel's centre lies
    columns = ((np.arange(16) + 0.5) * size[1] / 16).astype(int)
    small = whole_mask(masks, 16)
    assert small.dtype == torch.bool
    assert torch.equal(small, masks[:, rows][:, :, columns])


def test_resize_logits_is_bilinear_between_pixel_centres() -> None:
    logits = torch.tensor([[[[0.0, 4.0]]]]).expand(2, 3, 2, 2)
    resized = resize_logits(logits, (5, 4))
    assert resized.shape == (2, 3, 5, 4)
    torch.testing.assert_close(resized, torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(2, 3, 5, 4))


# --- training ---------------------------------------------------------------------------------------------------------


def steady(n: int, **columns: float) -> Tensor:
    """Random numbers that change nothing: the whole photo, not turned, not flipped, in its own colours."""
    neutral = {"area": 1.0, "aspect": 0.5, "x": 0.5, "y": 0.5, "angle": 0.5, "flip": 0.9, "colour": 0.5}
    values = neutral | columns
    return torch.tensor([[*list(values.values())[:6], *[values["colour"]] * (UNIFORMS_PER_IMAGE - 6)]] * n)


def photos(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_uniforms_depend_on_seed_epoch_and_index_alone() -> None:
    before = torch.get_rng_state()
    together = uniforms(3, 5, range(10))
    assert torch.equal(torch.get_rng_state(), before)
    assert together.shape == (10, UNIFORMS_PER_IMAGE)
    assert together.min() >= 0
    assert together.max() < 1
    torch.manual_seed(9)
    assert torch.equal(uniforms(3, 5, [7, 2]), together[[7, 2]])
    assert torch.equal(uniforms(3, 5, torch.tensor([4])), together[[4]])
    assert len({row.numpy().tobytes() for row in together}) == 10
    for other in (uniforms(4, 5, range(10)), uniforms(3, 6, range(10))):
        assert (other != together).any(dim=1).all()


def test_uniforms_are_uniform() -> None:
    """Across epochs and indices, though each is the start of a sequence of its own."""
    drawn = torch.cat([uniforms(0, epoch, range(100)) for epoch in range(10)])
    expected = torch.full((UNIFORMS_PER_IMAGE,), 0.5)
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.04)  # 4 standard errors
    correlations = np.corrcoef(drawn.numpy().T) - np.eye(UNIFORMS_PER_IMAGE)
    assert np.abs(correlations).max() < 0.15


def sample(image: Tensor, **crop: float) -> Tensor:
    """The crop of one image (3, H, W) in [0, 1], read bilinearly."""
    height, width = image.shape[1:]
    whole = {"centre_x": width / 2, "centre_y": height / 2, "crop_w": width, "crop_h": height, "angles": 0.0}
    arguments = {"heights": height, "widths": width, **whole, "flips": False} | crop
    image_size = arguments.pop("image_size")
    grid = crop_grids(image_size=image_size, **{key: torch.tensor([value]) for key, value in arguments.items()})
    return torch.nn.functional.grid_sample(image[None], grid, align_corners=False)[0]


def test_crop_grids_of_the_whole_picture_is_the_identity_and_its_mirror() -> None:
    image = photos(1, 24, 24)[0] / 255
    torch.testing.assert_close(sample(image, image_size=24), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(image, image_size=24, flips=True), image.flip(-1), rtol=0, atol=1e-5)
    side, middle = torch.tensor([24.0]), torch.tensor([12.0])
    constant_coordinates = crop_grids(side, side, 24, middle, middle, side, side, torch.zeros(1), flips=middle < 0)[0]
    centres = (torch.arange(24) + 0.5) / 12 - 1
    torch.testing.assert_close(constant_coordinates[..., 0], centres.expand(24, 24), rtol=0, atol=1e-6)
    torch.testing.assert_close(constant_coordinates[..., 1], centres[:, None].expand(24, 24), rtol=0, atol=1e-6)


def test_crop_grids_cuts_pixels_out() -> None:
    image = photos(1, 20, 32)[0] / 255
    cut = sample(image, image_size=8, centre_x=4 + 11, centre_y=4 + 5, crop_w=8, crop_h=8)
    torch.testing.assert_close(cut, image[:, 5:13, 11:19], rtol=0, atol=1e-5)


def test_crop_grids_turns_without_distortion() -> None:
    """A quarter turn is torch.rot90, also of a crop of a picture that is not square."""
    image = photos(1, 20, 32)[0] / 255
    for turns in range(4):
        turned = sample(image, image_size=8, centre_x=15, centre_y=9, crop_w=8, crop_h=8, angles=turns * math.pi / 2)
        torch.testing.assert_close(turned, torch.rot90(image[:, 5:13, 11:19], turns, (1, 2)), rtol=0, atol=1e-5)


def test_train_views_of_neutral_numbers_are_the_photos() -> None:
    images = photos(3, 24, 24)
    torch.testing.assert_close(train_views(images, 24, steady(3)), images / 255, rtol=0, atol=1e-5)
    mirrored = train_views(images, 24, steady(3, flip=0.1))
    torch.testing.assert_close(mirrored, images.flip(-1) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(60, 60), (40, 80), (80, 40), (40, 60)])
@pytest.mark.parametrize("min_area", [0.2, 0.35, 0.6, 1.0])
def test_train_views_show_at_least_the_smallest_area(size: tuple[int, int], min_area: float) -> None:
    """Red grows along x and green along y: what a view spans of them is what it shows of the photo."""
    height, width = size
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    photo = torch.from_numpy(np.stack([x, y, y]).round().astype(np.uint8))
    u = uniforms(0, 0, range(60))
    u[:, 6:] = 0.5
    seen = train_views([photo] * 60, 32, u, min_area, degrees=0.0)
    spans = (seen.amax(dim=(2, 3)) - seen.amin(dim=(2, 3))) * 255 / 215 * 32 / 31
    areas = spans[:, 0] * spans[:, 1]
    assert areas.min() > min_area - 0.03
    assert areas.max() < 1.05
    if min_area < 1:
        expected = min_area + (1 - min_area) * u[:, 0]
        torch.testing.assert_close(areas, expected, rtol=0, atol=0.05)


def test_train_views_take_photos_of_any_sizes_and_stay_in_range() -> None:
    images = [photos(1, 20 + 7 * i, 50 - 5 * i, seed=i)[0] for i in range(6)]
    u = uniforms(1, 2, range(6))
    views = train_views(images, 16, u)
    assert views.shape == (6, 3, 16, 16)
    assert views.min() >= 0
    assert views.max() <= 1
    torch.testing.assert_close(train_views(images[4:5], 16, u[4:5]), views[4:5])  # no image depends on its batch


def discs(size: int) -> Tensor:
    """(3, 1, size, size) bool: a disc off the centre, an ellipse and a half-plane."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    shapes = [(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06, (x - 0.5) ** 2 + 3 * (y - 0.3) ** 2 < 0.08, x + 0.3 * y < 0.6]
    return torch.stack(shapes)[:, None]


@pytest.mark.parametrize("epoch", range(6))
def test_train_pairs_move_image_and_mask_together(epoch: int) -> None:
    masks = discs(64)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    images[:, :1] = masks * 255  # red is the mask
    u = uniforms(0, epoch, range(3))
    u[:, 6:] = 0.5
    moved, moved_masks = train_pairs(images, masks, u)
    assert moved_masks.dtype == torch.bool
    assert moved.min() >= 0
    assert moved.max() <= 1
    agree = ((moved[:, :1] > 0.5) == moved_masks).float().mean(dim=(1, 2, 3))
    assert (agree >= 0.99).all()
    assert ((moved_masks != masks).float().mean(dim=(1, 2, 3)) > 0.01).all()  # and they did move


def test_train_pairs_keep_channels_apart_and_neutral_numbers_change_nothing() -> None:
    images = photos(2, 32, 32)
    masks = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    u = steady(2, area=0.5)  # of train_pairs the first number is the zoom, 1 in the middle
    same, same_masks = train_pairs(images, masks, u)
    torch.testing.assert_close(same, images / 255, rtol=0, atol=1e-5)
    assert torch.equal(same_masks, masks)
    _, mirrored = train_pairs(images, masks, steady(2, area=0.5, flip=0.1))
    assert torch.equal(mirrored, masks.flip(-1))


def test_zoom_shows_the_middle_larger_or_all_of_it_smaller() -> None:
    images, masks = photos(1, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    masks[..., 8:24, 8:24] = True  # the middle half of each side
    _, larger = train_pairs(images, masks, steady(1, area=0.5), zoom=(2.0, 2.0))
    assert larger.all()
    _, smaller = train_pairs(images, masks, steady(1, area=0.5), zoom=(0.5, 0.5))
    assert smaller[..., 12:20, 12:20].all()
    assert smaller[..., 8:24, 8:24].sum() == 64  # of the photo; beyond it its mirror images
    _, between = train_pairs(images, masks, steady(1, area=1.0), zoom=(1.0, 1.4))
    assert torch.equal(between, masks)  # the last uniform number is the smallest factor


def test_colours_in_the_middle_of_their_range_stay() -> None:
    images = photos(2, 8, 8) / 255
    torch.testing.assert_close(change_colours(images, torch.full((2, 3), 0.5)), images)


def test_brightness_contrast_and_saturation() -> None:
    images = 0.3 + 0.3 * photos(2, 8, 8) / 255  # nothing reaches 0 or 1
    brighter = change_colours(images, torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]]))
    torch.testing.assert_close(brighter, images * torch.tensor([1.3, 0.7]).view(2, 1, 1, 1))
    contrasted = change_colours(images, torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]]))
    torch.testing.assert_close(contrasted.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(contrasted.std(dim=(1, 2, 3)) / images.std(dim=(1, 2, 3)), torch.tensor([1.3, 0.7]))
    saturated = change_colours(images, torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.5, 0.0]]))
    torch.testing.assert_close(saturated.mean(dim=1), images.mean(dim=1))  # the grey of each pixel stays
    spread = saturated.std(dim=1) / images.std(dim=1)
    torch.testing.assert_close(spread, torch.tensor([1.3, 0.7]).view(2, 1, 1).expand(2, 8, 8))


def test_colours_stay_in_range() -> None:
    changed = change_colours(photos(8, 8, 8) / 255, uniforms(0, 0, range(8)))
    assert changed.min() >= 0
    assert changed.max() <= 1
