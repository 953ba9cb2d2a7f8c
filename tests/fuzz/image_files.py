"""Image files that are broken, enormous, or of another format than their name says."""

import io
import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.watch import MARKER

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
_FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "IM"
_MODES = "RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV", "LAB"
_EPS = f"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
({MARKER}) (w) file closefile showpage
%%EOF
"""


def image_file(random: Random) -> bytes:
    """Return the content of an image file."""
    return random.choices(_WAYS, _WEIGHTS)[0](random)


def _picture(random: Random, size: tuple[int, int] | None = None, mode: str = "RGB") -> Image.Image:
    width, height = size or (random.randrange(1, 200), random.randrange(1, 200))
    pixels = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)


def _written(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image in a format; as PNG, where the format does not have its mode."""
    file = io.BytesIO()
    try:
        image.save(file, kind, **options)
    except (OSError, ValueError, KeyError, struct.error):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _any_mode(random: Random) -> bytes:
    mode = random.choice(_MODES)
    try:
        return _written(_picture(random, mode=mode), random.choice(_FORMATS))
    except ValueError:  # Pillow has no conversion to this mode
        return _written(_picture(random), "PNG")


def _damaged(random: Random) -> bytes:
    return mutate_bytes(_any_mode(random), random)


def _damaged_body(random: Random) -> bytes:
    """Leave the header as it is, so that the damage shows only when pixels are decoded."""
    return mutate_bytes(_written(_picture(random), random.choice(("PNG", "JPEG", "WEBP", "BMP"))), random, start=64)


def _extreme(random: Random) -> bytes:
    long, short = random.choice((1, 100, 1000, 20_000, 65_500)), random.choice((1, 2, 10, 200))
    size = (long, short) if random.random() < 0.5 else (short, long)
    return _written(_picture(random, size), random.choice(("PNG", "BMP", "JPEG")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _claimed_png(random: Random) -> bytes:
    """Return a small PNG whose header claims any size; the pixels are zeros that compress to nothing."""
    sides = 0, 1, 64, 5000, 9000, 13_000, 20_000, 65_535, 2_000_000, 2**31 - 1, 2**32 - 1
    width, height = random.choice(sides), random.choice(sides)
    depth, colour = random.choice((1, 8, 16)), random.choice((0, 2, 3, 6))
    row_bytes = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour] + 7) // 8
    rows = zlib.compress(bytes(min(row_bytes * height, random.choice((0, 10**5, 4 * 10**8)))), 1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, random.choice((0, 0, 1)))
    text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(random.choice((10, 10**8)))))
    extra = text if random.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _large_png(random: Random) -> bytes:
    """Return a valid PNG of nearly as many pixels as Pillow reads, whose levels may have 16 bits."""
    width, height = random.choice(((13_300, 13_300), (30_000, 5900), (9000, 9000)))
    depth = random.choice((8, 16))
    rows = zlib.compress(bytes((1 + width * depth // 8) * height), 1)
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _claimed_bmp(random: Random) -> bytes:
    content = bytearray(_written(_picture(random), "BMP"))
    content[18:26] = struct.pack("<ii", *(random.choice((0, 1, -1, 64, 9000, 60_000, 2**31 - 1)) for _ in range(2)))
    return bytes(content)


def _claimed_jpeg(random: Random) -> bytes:
    content = bytearray(_written(_picture(random), "JPEG"))
    frame = content.find(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", *(random.choice((0, 1, 9000, 65_535)) for _ in range(2)))
    return bytes(content)


def _animated(random: Random) -> bytes:
    first, *more = (_picture(random, (64, 48)) for _ in range(random.choice((2, 30))))
    return _written(first, random.choice(("GIF", "PNG", "WEBP")), save_all=True, append_images=more)


def _large(random: Random) -> bytes:
    """Return a valid image with as many pixels as cameras give."""
    grey = Image.new("L", (random.choice((6000, 9000)), random.choice((4000, 9000))), 128)
    return _written(grey, random.choice(("PNG", "JPEG")))


def _no_image(random: Random) -> bytes:
    return random.choice((
        b"", b"\0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM", b"RIFF", _EPS.encode(), b"PK\3\4",
        b"P6 99999 99999 255\n", b"%PDF-1.4\n", bytes(10**6), random.randbytes(500),
    ))  # fmt: skip


_WAYS: tuple[Callable[[Random], bytes], ...] = (
    _any_mode, _damaged, _damaged_body, _extreme, _claimed_png, _claimed_bmp, _claimed_jpeg, _animated, _large,
    _large_png, _no_image,
)  # fmt: skip
_WEIGHTS = (4, 4, 5, 3, 5, 2, 2, 2, 1, 1, 3)
