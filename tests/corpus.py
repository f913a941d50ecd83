"""The corpus: pictures and payloads that each hide one recognisable secret in one place, built afresh."""

import base64
import gzip
import json
import struct
import zlib
from urllib.parse import quote

import msgpack
import numpy as np
from blocks import (
    after_ihdr,
    after_soi,
    chunk,
    exif_text,
    exif_thumbnail,
    raw_png,
    riff,
    segment,
    slices,
    thumbnail,
    with_webp_chunks,
)
from canary import HEIGHT, TEXT, WIDTH, Vector, saved, scene
from PIL import Image


def jpeg_vectors() -> list[Vector]:
    plain = saved(scene(), "JPEG", quality=85)
    progressive = saved(scene(), "JPEG", quality=85, progressive=True)
    second = saved(scene(), "JPEG", quality=60)
    thumb, text = thumbnail(), (TEXT,)
    wide = TEXT.decode().encode("utf-16-le")
    small = np.asarray(Image.fromarray(scene()).resize((48, 36), Image.Resampling.BOX)).tobytes()
    jfif = b"JFIF\x00\x01\x02\x00\x00\x01\x00\x01"
    rows = {
        "exif-thumbnail": (after_soi(plain, segment(0xE1, exif_thumbnail())), slices(thumb)),
        "exif-thumbnail-turned": (after_soi(plain, segment(0xE1, exif_thumbnail(3))), slices(thumb)),
        "exif-serial-number": (after_soi(plain, segment(0xE1, exif_text(0xA431, 2))), text),
        "exif-user-comment-utf16": (
            after_soi(plain, segment(0xE1, exif_text(0x9286, 7, b"UNICODE\x00" + wide))),
            (wide,),
        ),
        "exif-maker-note": (after_soi(plain, segment(0xE1, exif_text(0x927C))), text),
        "exif-gps-area": (after_soi(plain, segment(0xE1, exif_text(0x001C))), text),
        "exif-twice": (
            after_soi(plain, segment(0xE1, exif_text(0x0112, 3, b"\x00\x01")), segment(0xE1, exif_text())),
            text,
        ),
        "exif-malformed": (after_soi(plain, segment(0xE1, b"Exif\x00\x00MM\x00*\xff\xff\xff\xf0" + TEXT)), text),
        "xmp": (after_soi(plain, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00<x>" + TEXT + b"</x>")), text),
        "xmp-picture": (
            after_soi(plain, segment(0xE1, b"http://ns.adobe.com/xmp/extension/\x00" + base64.b64encode(thumb))),
            (base64.b64encode(thumb)[600:640],),
        ),
        "icc": (after_soi(plain, segment(0xE2, b"ICC_PROFILE\x00\x01\x01" + TEXT * 4)), text),
        "icc-in-two-segments": (
            after_soi(plain, *(segment(0xE2, b"ICC_PROFILE\x00" + bytes([n, 2]) + TEXT) for n in (1, 2))),
            text,
        ),
        "flashpix": (after_soi(plain, segment(0xE2, b"FPXR\x00" + TEXT)), text),
        "photoshop-thumbnail": (
            after_soi(
                plain, segment(0xED, b"Photoshop 3.0\x008BIM\x04\x0c\x00\x00" + len(thumb).to_bytes(4, "big") + thumb)
            ),
            slices(thumb),
        ),
        "iptc": (
            after_soi(
                plain, segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x00\x00\x30\x1c\x02\x78" + TEXT)
            ),
            text,
        ),
        "comment": (after_soi(plain, segment(0xFE, TEXT)), text),
        "comment-before-end": (plain[:-2] + segment(0xFE, TEXT) + plain[-2:], text),
        "comment-between-scans": (progressive.replace(b"\xff\xda", segment(0xFE, TEXT) + b"\xff\xda"), text),
        "jumbf": (after_soi(plain, segment(0xEB, b"JP\x00\x01" + TEXT)), text),
        "private-app15": (after_soi(plain, segment(0xEF, TEXT)), text),
        "adobe-tail": (after_soi(plain, segment(0xEE, b"Adobe\x00\x64\x00\x00\x00\x00\x01" + TEXT)), text),
        "jfif-thumbnail": (plain[:2] + segment(0xE0, jfif + bytes([48, 36]) + small) + plain[20:], (small[2000:2060],)),
        "jfxx-thumbnail": (plain[:20] + segment(0xE0, b"JFXX\x00\x10" + thumb) + plain[20:], slices(thumb)),
        "unused-quantisation-table": (after_soi(plain, segment(0xDB, b"\x03" + TEXT.ljust(64, b"\x01"))), text),
        "unused-huffman-table": (
            after_soi(plain, segment(0xC4, b"\x13" + bytes([0] * 7 + [36] + [0] * 8) + TEXT)),
            text,
        ),
        "after-last-block": (plain[:-2] + TEXT + plain[-2:], text),
        "trailing-text": (plain + TEXT, text),
        "trailing-picture": (plain + second, slices(second)),
        "multi-picture-format": (
            after_soi(plain, segment(0xE2, b"MPF\x00MM\x00*\x00\x00\x00\x08" + TEXT)) + second,
            (TEXT, *slices(second)),
        ),
        "motion-photo": (plain + b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00isommp42" + TEXT, text),
        "trailing-zip": (plain + b"PK\x03\x04" + TEXT, text),
        "seft-trailer": (plain + b"\x00\x00\x01\x0a" + TEXT + b"SEFT", text),
        "grey": (
            after_soi(saved(Image.fromarray(scene()).convert("L"), "JPEG"), segment(0xE1, exif_thumbnail())),
            slices(thumb),
        ),
    }
    made = [Vector(name=f"jpeg-{name}", payload=data, needles=needles) for name, (data, needles) in rows.items()]
    inks = np.dstack([scene()[..., 0], scene()[..., 1], scene()[..., 2], np.full((HEIGHT, WIDTH), 255, np.uint8)])
    made.append(Vector(name="jpeg-cmyk-under-black", payload=saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)))
    return made


def png_vectors() -> list[Vector]:
    plain, thumb, text = saved(scene(), "PNG"), thumbnail(), (TEXT,)
    squeezed = zlib.compress(TEXT * 3)
    grey, marked = np.full((HEIGHT, WIDTH), 128, np.uint8), scene()[..., 0]
    rows = b"".join(b"\x00" + bytes(row) for row in scene().reshape(HEIGHT, -1))
    hidden_rows = b"".join(
        b"\x00" + bytes(row) for row in np.dstack([marked, marked, marked, grey * 0]).reshape(HEIGHT, -1)
    )
    low = b"".join(b"\x00" + bytes(row) for row in np.dstack([grey, marked]).reshape(HEIGHT, -1))
    palette = bytes(range(256)) * 0 + b"".join(bytes([v, v, v]) for v in range(200)) + TEXT[:36].ljust(168, b"\x07")
    indexed = b"".join(b"\x00" + bytes(row) for row in np.minimum(scene()[..., 0], 199))
    frame = struct.pack(">IIIIIHHBB", 1, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0)
    animated = after_ihdr(plain, chunk(b"acTL", struct.pack(">II", 2, 0)))
    animated = (
        animated[:-12]
        + chunk(b"fcTL", frame)
        + chunk(b"fdAT", b"\x00\x00\x00\x02" + zlib.compress(rows))
        + animated[-12:]
    )
    table = {
        "text": (after_ihdr(plain, chunk(b"tEXt", b"Comment\x00" + TEXT)), text),
        "compressed-text": (after_ihdr(plain, chunk(b"zTXt", b"Comment\x00\x00" + squeezed)), text),
        "international-text": (
            after_ihdr(plain, chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + squeezed)),
            text,
        ),
        "exif-thumbnail": (after_ihdr(plain, chunk(b"eXIf", exif_thumbnail()[6:])), slices(thumb)),
        "icc": (after_ihdr(plain, chunk(b"iCCP", b"icc\x00\x00" + squeezed)), text),
        "private-chunk": (after_ihdr(plain, chunk(b"caMr", TEXT)), text),
        "suggested-palette": (after_ihdr(plain, chunk(b"sPLT", b"name\x00\x08" + TEXT.ljust(36))), text),
        "after-end": (plain + TEXT, text),
        "picture-after-end": (plain + thumb, slices(thumb)),
        "inside-end-chunk": (plain[:-12] + chunk(b"IEND", TEXT), text),
        "after-deflate-stream": (raw_png(WIDTH, HEIGHT, 8, 2, rows, tail=TEXT), text),
        "rows-below-the-picture": (
            raw_png(WIDTH, HEIGHT - 30, 8, 2, rows[: len(rows) - 30 * (3 * WIDTH + 1)] + b"\x00" + TEXT * 16),
            text,
        ),
        "under-transparency": (raw_png(WIDTH, HEIGHT, 8, 6, hidden_rows), ()),
        "in-alpha": (saved(np.dstack([scene(mark=False), marked]), "PNG"), ()),
        "low-byte-of-16-bit": (raw_png(WIDTH, HEIGHT, 16, 0, low), ()),
        "unused-palette-entries": (raw_png(WIDTH, HEIGHT, 8, 3, indexed, chunk(b"PLTE", palette)), text),
    }
    made = [Vector(name=f"png-{name}", payload=data, needles=needles) for name, (data, needles) in table.items()]
    made.append(Vector(name="png-second-frame", payload=animated, fate="picture.limit.frames"))
    return made


def webp_vectors() -> list[Vector]:
    lossy, lossless, text = saved(scene(), "WEBP", quality=90), saved(scene(), "WEBP", lossless=True), (TEXT,)
    clear = np.dstack([scene(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    frames = [Image.fromarray(scene()), Image.fromarray(scene(mark=False))]
    table = {
        "exif-thumbnail": (with_webp_chunks(lossy, 8, (b"EXIF", exif_thumbnail())), slices(thumbnail())),
        "xmp": (with_webp_chunks(lossy, 4, (b"XMP ", TEXT)), text),
        "icc": (with_webp_chunks(lossless, 0x20, (b"ICCP", TEXT)), text),
        "unknown-chunk": (with_webp_chunks(lossless, 0, (b"CAMR", TEXT)), text),
        "after-riff": (lossy + TEXT, text),
        "after-bitstream": (riff((b"VP8L", lossless[20:] + TEXT)), text),
        "under-transparency": (saved(clear, "WEBP", lossless=True, exact=True), ()),
    }
    made = [Vector(name=f"webp-{name}", payload=data, needles=needles) for name, (data, needles) in table.items()]
    moving = saved(frames[1], "WEBP", save_all=True, append_images=[frames[0]], lossless=True)
    return [*made, Vector(name="webp-animation", payload=moving, fate="picture.limit.frames")]


def payload_vectors() -> list[Vector]:
    picture = saved(scene(), "JPEG", quality=85)
    code, needles = base64.b64encode(picture), slices(picture)
    text = code.decode()
    wrapped = base64.encodebytes(picture)
    field = b"\x12" + _varint(len(picture)) + picture + b"\x1a\x04jpeg\x22\x05front"
    doubled = b'{"image":"' + code + b'","image":"none"}'
    redacted = {
        "base64": code,
        "base64-in-lines": wrapped,
        "json": json.dumps({"ts": 1.5, "image": text}).encode(),
        "json-url-safe": json.dumps({"image": base64.urlsafe_b64encode(picture).decode().rstrip("=")}).encode(),
        "json-data-url": json.dumps({"image": f"data:image/jpeg;base64,{text}"}).encode(),
        "json-escaped-slashes": json.dumps({"image": text}).replace("/", "\\/").encode(),
        "json-escaped-letters": b'{"image":"' + b"".join(b"\\u%04x" % c for c in code) + b'"}',
        "json-nested": json.dumps({"a": [{"b": [[{"c": text}]]}]}).encode(),
        "json-in-json": json.dumps({"body": json.dumps({"body": json.dumps({"image": text})})}).encode(),
        "json-duplicate-key": doubled,
        "json-key": json.dumps({text: 1}).encode(),
        "json-numbers": json.dumps({"data": list(picture)}).encode(),
        "json-signed-numbers": json.dumps({"data": [byte - 256 if byte > 127 else byte for byte in picture]}).encode(),
        "json-numbers-by-key": json.dumps({"data": dict(enumerate(picture))}).encode(),
        "json-escaped-lines": b'{"i":"' + code.replace(b"/", b"\\/") + b'"}\n{"a":1}\n',
        "json-hex": json.dumps({"data": picture.hex()}).encode(),
        "json-latin-1": json.dumps({"data": picture.decode("latin-1")}).encode(),
        "json-lines-in-string": json.dumps({"data": wrapped.decode()}).encode(),
        "json-two-pictures": json.dumps([text, text]).encode(),
        "json-base64-of-msgpack": json.dumps({"b": base64.b64encode(msgpack.packb({"p": picture})).decode()}).encode(),
        "hex-in-lines": picture.hex("\n", 30).encode(),
        "xml": b"<frame><data>" + code + b"</data></frame>",
        "msgpack-bin": msgpack.packb({"ts": 1.5, "image": picture}),
        "msgpack-ext": msgpack.packb([1, msgpack.ExtType(42, picture)]),
        "msgpack-str": msgpack.packb({"image": text}),
        "msgpack-numbers": msgpack.packb({"image": list(picture)}),
        "msgpack-duplicate-key": b"\x82" + 2 * (msgpack.packb("i") + msgpack.packb(picture)),
        "foxglove-compressed-image-json": json.dumps(
            {"timestamp": {"sec": 1, "nsec": 2}, "frame_id": "front", "data": text, "format": "jpeg"}
        ).encode(),
        "foxglove-compressed-image-protobuf": b"\x0a\x04\x08\x01\x10\x02" + field,
        "protobuf-nested": b"\x0a" + _varint(len(field)) + field,
    }
    refused = {
        "base64-behind-a-prefix": (b'{"image":"x' + code + b'"}', "picture.hidden"),
        "escaped-in-torn-json": (b'{"i":"' + code.replace(b"/", b"\\/") + b'","a":', "picture.hidden"),
        "escaped-for-a-url": (b"image=" + quote(text, safe="").encode() + b"&n=1", "picture.hidden"),
        "utf-16": (json.dumps({"image": text}).encode("utf-16"), "picture.hidden"),
        "binary": (b"\x00\x01\x02\xfe" * 5 + picture + b"\xfe\x00", "picture.hidden"),
        "binary-base64": (b"\x00\x01\xfe" + code + b"\xfe", "picture.hidden"),
        "multipart": (b"--b\r\nContent-Type: image/jpeg\r\n\r\n" + picture + b"\r\n--b--", "picture.hidden"),
        "percent-encoded": (
            b'{"i":"data:image/jpeg,' + b"".join(b"%%%02X" % c for c in picture) + b'"}',
            "picture.hidden",
        ),
        "gzip": (gzip.compress(picture), "payload.compressed"),
        "zlib": (zlib.compress(picture), "payload.compressed"),
        "json-zlib": (
            json.dumps({"i": base64.b64encode(zlib.compress(picture)).decode()}).encode(),
            "payload.compressed",
        ),
        "zip": (b"PK\x03\x04" + picture, "payload.compressed"),
        "pdf": (b"%PDF-1.7\n" + picture, "payload.compressed"),
        "gif": (saved(scene(), "GIF"), "picture.format"),
        "bmp": (saved(scene(), "BMP"), "picture.format"),
        "tiff": (saved(scene(), "TIFF"), "picture.format"),
        "avif": (saved(scene(), "AVIF"), "picture.format"),
        "netpbm": (saved(scene(), "PPM"), "picture.format"),
        "svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='data:image/jpeg;base64," + code + b"'/></svg>",
            "picture.format",
        ),
        "video": (b"\x00\x00\x00\x18ftypisom" + picture, "picture.format"),
        "json-gif": (json.dumps({"i": base64.b64encode(saved(scene(), "GIF")).decode()}).encode(), "picture.format"),
    }
    made = [Vector(name=f"payload-{n}", payload=p, needles=needles, picture=False) for n, p in redacted.items()]
    return made + [
        Vector(name=f"payload-{n}", payload=p, needles=needles, fate=fate, picture=False)
        for n, (p, fate) in refused.items()
    ]


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def vectors() -> list[Vector]:
    """All of them, built afresh."""
    return jpeg_vectors() + png_vectors() + webp_vectors() + payload_vectors()
