"""Hostile pictures, and hostile names of pictures."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.attacks.harness import Case, GoesOn, Victim, cli


def encoded(form: str = "PNG", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, form, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    """A PNG of any size on paper."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + png_chunk(b"IDAT", body or zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bytes_of(data: bytes | Callable[[], bytes], name: str = "x.jpg") -> Case:
    """These bytes as a picture that is embedded."""

    def case(folder: Path) -> Victim:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())

        def victim() -> object:
            from runtime.preprocess import PreprocessConfig, preprocess

            return preprocess([folder / name], PreprocessConfig(image_size=32)).shape

        return victim

    return case


def gif_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_of_size(width: int, height: int) -> bytes:
    from PIL import TiffImagePlugin

    out = io.BytesIO()
    facts = TiffImagePlugin.ImageFileDirectory_v2()
    Image.new("L", (4, 4)).save(out, "TIFF", tiffinfo=facts)
    data = bytearray(out.getvalue())
    start = struct.unpack("<I", data[4:8])[0]
    for n in range(struct.unpack("<H", data[start : start + 2])[0]):
        at = start + 2 + 12 * n
        tag = struct.unpack("<H", data[at : at + 2])[0]
        if tag in (256, 257):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


def text_bomb() -> bytes:
    """A comment of 128 MB in a few hundred kB."""
    return png(4, 4, zlib.compress(bytes(4 * 13)), before=png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(128 * 2**20), 6)))


def profile_bomb() -> bytes:
    return png(4, 4, zlib.compress(bytes(4 * 13)), before=png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(128 * 2**20), 6)))


def postscript(folder: Path) -> Victim:
    """EPS is a program, for a program that Pillow would start."""
    mark = folder / "mark"
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n({mark}) (w) file closefile\nshowpage\n%%EOF\n"
    return bytes_of(program.encode())(folder)


def odd_exif() -> bytes:
    """An orientation of no kind, and an offset that points at itself."""
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHII", 0x0112, 3, 1, 77) + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    data = encoded("JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def many_frames() -> bytes:
    frames = [Image.new("P", (8, 8), n % 255) for n in range(400)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def good(data: bytes) -> Case:
    """Strange, but a picture: it must be read."""

    def case(folder: Path) -> Victim:
        inner = bytes_of(data)(folder)
        return lambda: GoesOn(f"pixels {inner()}")

    return case


def special(kind: str) -> Case:
    def case(folder: Path) -> Victim:
        path = folder / "x.jpg"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(path)

        def victim() -> object:
            from runtime.preprocess import PreprocessConfig, preprocess

            return preprocess([path], PreprocessConfig(image_size=32)).shape

        return victim

    return case


NAMES = [
    "-rf.jpg", "$(touch mark).jpg", "; touch mark;.jpg", "`touch mark`.jpg", "a\nb.jpg",
    "\x1b[2J\x1b]0;x\x07.jpg", "<img src=x onerror=alert(1)>.jpg", "'\"><script>alert(1)<.jpg", "%s%n.jpg",
]  # fmt: skip


def names(folder: Path) -> Victim:
    """Pictures with the names of commands, options, escapes and markup: indexed, found, and shown on a page that holds none of them as markup."""
    from tests.attacks.bundles import toy_bundle

    bundle, place = toy_bundle(folder), folder / "photos"
    place.mkdir()
    for number, name in enumerate([*NAMES, os.fsdecode(b"\xff\xfe.jpg")]):
        (place / name).write_bytes(encoded("JPEG", (30 + number, 30)))

    def victim() -> object:
        cli("index", place, "--out", folder / "p.idx", "--bundle", bundle)()
        from runtime.index import Index
        from runtime.index_page import contact_sheet

        with Index.open(folder / "p.idx", create=False) as index:
            hits = index.search_vector(np.ones(12, np.float32) / 12**0.5, k=20)
        page = contact_sheet("<b>query</b>", "", [(hit.path, hit.score, hit.taken) for hit in hits])
        for markup in ("<img src=x", "<script>alert", "<b>query"):
            assert markup not in page, markup
        assert len(hits) == len(NAMES) + 1
        assert not list(folder.rglob("mark"))
        return GoesOn(f"{len(hits)} pictures, shown as text")

    return victim


PICTURES: dict[str, Case] = {
    "png of 50,000 x 50,000": bytes_of(png(50_000, 50_000)),
    "png of 2^31 x 1": bytes_of(png(2**31 - 1, 1)),
    "png of no size": bytes_of(png(0, 0)),
    "png whose rows expand 1,000 times": bytes_of(lambda: png(13_000, 13_000, zlib.compress(bytes(13_000 * 3 * 1000), 6))),
    "png with a comment of 128 MB": bytes_of(text_bomb),
    "png with a profile of 128 MB": bytes_of(profile_bomb),
    "png that ends early": bytes_of(encoded()[:-200]),
    "jpeg of 65,500 x 65,500 on paper": bytes_of(jpeg_of_size(65_500, 65_500)),
    "jpeg that ends early": bytes_of(encoded("JPEG", (400, 300))[:3000]),
    "jpeg of nothing but its first mark": bytes_of(b"\xff\xd8" * 2000),
    "gif of 65,535 x 65,535 on paper": bytes_of(gif_of_size(65_535, 65_535)),
    "bmp of 100,000 x 100,000 on paper": bytes_of(bmp_of_size(100_000, 100_000)),
    "bmp of negative width": bytes_of(bmp_of_size(-5, 10)),
    "tiff of 2^32 x 2^32 on paper": bytes_of(tiff_of_size(2**32 - 1, 2**32 - 1)),
    "webp that ends early": bytes_of(encoded("WEBP", (200, 200))[:200]),
    "webp that lies about its length": bytes_of(b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8 " + struct.pack("<I", 2**32 - 1) + bytes(40)),
    "program in PostScript": postscript,
    "svg with an entity bomb": bytes_of(b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>'),
    "html in place of a picture": bytes_of(b"<html><script>alert(1)</script></html>"),
    "nothing": bytes_of(b""),
    "exif that points at itself": good(odd_exif()),
    "gif of 400 frames": good(many_frames()),
    "png with text of its own": good(encoded(pnginfo=(lambda info: (info.add_text("x", "y" * 1000), info)[1])(PngImagePlugin.PngInfo()))),
    "a pipe": special("fifo"),
    "a link to a device": special("device"),
    "a folder": special("folder"),
    "a link to itself": special("loop"),
    "names of commands, options and markup": names,
}
