"""Images and sounds: what each kind of file becomes, and that no part of one passes for the whole."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

import datastore as ds
from datastore.errors import RejectedError
from datastore.media import Sound, decode_image, decode_sound

RNG = np.random.default_rng(0)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def of(values: Any, mode: str | None = None) -> Image.Image:
    image = Image.fromarray(np.array(values))
    return image if mode is None else image.convert(mode)


def deep_png(pixels: npt.NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write for colours."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def u8(*pixels: Any) -> npt.NDArray[np.uint8]:
    return np.array([pixels], np.uint8)


RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (saved(of(u8(RED, GREEN)), "png"), [RED, GREEN]),
        (saved(of(u8(10, 200)), "png"), [(10,) * 3, (200,) * 3]),
        (saved(of(u8(0, 255), "1"), "png"), [(0,) * 3, WHITE]),
        (saved(of(u8(RED, GREEN)).quantize(2), "png"), [RED, GREEN]),
        (saved(of(u8(RED, GREEN)).quantize(2), "png", transparency=0), None),
        (saved(of(u8((*RED, 255), (*GREEN, 0), (0, 0, 0, 128))), "png"), [RED, WHITE, (127,) * 3]),
        (saved(of(np.array([[[10, 0], [10, 255]]], np.uint8)), "png"), [WHITE, (10,) * 3]),
        (saved(of(np.array([[0, 300, 40_000, 65_535]], np.uint16)), "png"), [(0,) * 3, (1,) * 3, (156,) * 3, WHITE]),
        (saved(of(np.array([[300, 40_000]], np.uint16)), "tiff"), [(1,) * 3, (156,) * 3]),
        (deep_png(np.array([[[65_535, 300, 0], [40_000, 255, 256]]], np.uint16)), [(255, 1, 0), (156, 0, 1)]),
        (saved(of(u8(RED, RED)), "gif", save_all=True, append_images=[of(u8(GREEN, GREEN))]), [RED, RED]),
        (saved(of(u8(RED)), "webp", lossless=True), [RED]),
        (saved(of(np.full((8, 8, 3), RED, np.uint8), "CMYK"), "jpeg"), [RED] * 8),
    ],
    ids=[
        "rgb",
        "grey",
        "1",
        "palette",
        "clear palette",
        "alpha",
        "grey alpha",
        "16",
        "tiff 16",
        "48",
        "gif",
        "webp",
        "cmyk",
    ],
)
def test_every_kind_of_image_is_red_green_and_blue(raw: bytes, wanted: list[Any] | None) -> None:
    found = decode_image(raw)
    assert found.dtype == np.uint8
    assert found.shape[2] == 3
    assert found.flags.writeable
    if wanted is None:
        assert [255, 255, 255] in found[0].tolist()
    else:
        assert found[0].tolist() == [list(pixel) for pixel in wanted]


def test_an_image_is_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # To be turned by 90 degrees
    lying = of(np.zeros((4, 8, 3), np.uint8))
    assert decode_image(saved(lying, "jpeg")).shape == (4, 8, 3)
    assert decode_image(saved(lying, "jpeg", exif=exif)).shape == (8, 4, 3)


NOISE = of(RNG.integers(0, 255, (50, 50, 3), np.uint8))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (saved(NOISE, "jpeg")[:900], "the image is damaged"),
        (saved(NOISE, "png")[:900], "the image is damaged"),
        (b"", "the 0 bytes are no image"),
        (b"no image", "the 8 bytes are no image"),
        (saved(of(np.zeros((1, 1), np.float32)), "tiff"), "range"),
        (saved(of(np.zeros((1, 1), np.int32)), "tiff"), "range"),
        (None, "null"),
        ({"bytes": None, "path": "a.png"}, "names a file and does not hold it: a.png"),
        ({"bytes": None, "path": None}, "null"),
        ("text", "not str"),
    ],
)
def test_what_is_no_whole_image_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(value)


# Sounds

LONG = np.zeros((2**20 + 5, 1))
TONE = np.stack([np.sin(np.arange(8000) / 20) / 2, np.cos(np.arange(8000) / 30) / 3], 1)


def wave(kind: str, encoding: str, samples: Any = TONE) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, 16_000, format=kind, subtype=encoding)
    return out.getvalue()


KINDS = [
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_24", 1e-6),
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "FLOAT", 1e-7),
    ("WAV", "DOUBLE", 1e-7),
    ("FLAC", "PCM_16", 1e-4),
    ("OGG", "VORBIS", 0.1),
    ("OGG", "OPUS", 0.3),
    ("MP3", "MPEG_LAYER_III", 0.3),
    ("AIFF", "PCM_16", 1e-4),
]


@pytest.mark.parametrize(("kind", "encoding", "off"), KINDS)
def test_every_kind_of_sound_has_its_channels_frames_and_rate(kind: str, encoding: str, off: float) -> None:
    for value in (wave(kind, encoding), {"bytes": wave(kind, encoding), "path": "a.wav"}):
        found: Sound = decode_sound(value)
        assert found.rate == 16_000
        assert found.samples.shape == (2, 8000)
        assert found.samples.dtype == np.float32
        assert float(np.abs(found.samples - TONE.T).max()) < off
    assert decode_sound(wave(kind, encoding, TONE[:, :1])).samples.shape == (1, 8000)


def test_a_long_sound_has_all_its_frames() -> None:
    assert decode_sound(wave("WAV", "PCM_16", LONG)).samples.shape == (1, 2**20 + 5)
    assert decode_sound(wave("WAV", "PCM_16", LONG[: 2**20])).samples.shape == (1, 2**20)


def test_floating_point_is_not_clipped() -> None:
    assert decode_sound(wave("WAV", "FLOAT", np.array([[3.0]]))).samples.tolist() == [[3.0]]


def test_a_length_that_was_left_open_is_no_damage() -> None:
    raw = bytearray(wave("WAV", "PCM_16"))
    raw[4:8] = b"\xff\xff\xff\xff"
    assert decode_sound(bytes(raw)).samples.shape == (2, 8000)


@pytest.mark.parametrize(("kind", "encoding", "_off"), KINDS)
def test_a_sound_that_is_cut_is_an_error(kind: str, encoding: str, _off: float) -> None:
    raw = wave(kind, encoding, RNG.uniform(-0.5, 0.5, (60_000, 2)))
    for left in (len(raw) // 2, len(raw) - 2):
        with pytest.raises(ValueError, match=r"cut|damaged"):
            decode_sound(raw[:left])


@pytest.mark.parametrize("kind", ["OGG", "FLAC"])
def test_a_sound_with_a_flipped_bit_is_an_error_where_the_format_has_checksums(kind: str) -> None:
    raw = bytearray(wave(kind, "VORBIS" if kind == "OGG" else "PCM_16", RNG.uniform(-0.5, 0.5, (60_000, 2))))
    raw[len(raw) // 2] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        decode_sound(bytes(raw))


@pytest.mark.parametrize("value", [b"", b"no sound", b"OggS", b"RIFF", None, 3])
def test_what_is_no_sound_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r"no sound|cut|null|not int"):
        decode_sound(value)


# In a loader


def pixels(row: dict[str, Any], _random: np.random.Generator) -> npt.NDArray[np.uint8]:
    return decode_image(row["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_a_failing_row(tmp_path: Path, workers: int) -> None:
    images = [saved(of(np.full((4, 4, 3), value, np.uint8)), "png") for value in range(20)]
    images[13] = images[13][:40]
    (tmp_path / "rows").mkdir()
    rows = pa.table({"image": [{"bytes": image, "path": "x.png"} for image in images]})
    pq.write_table(rows, tmp_path / "rows" / "a.parquet")
    source = ds.open_files(tmp_path / "rows", index=tmp_path / "index")
    options = ds.LoaderSettings(epochs=1)
    rows_of = ds.Rows(transform=pixels, on_error="leave_out", workers=workers)
    with ds.RowLoader(source, global_batch=4, rows=rows_of, options=options) as loader:
        batches = list(loader)
    assert sorted(int(image[0, 0, 0]) for batch in batches for image in batch.data) == [*range(13), *range(14, 20)]
    assert [list(batch.failed) for batch in batches if batch.failed] == [[13]]
    strict = ds.RowLoader(source, global_batch=20, rows=ds.Rows(transform=pixels), options=options)
    with pytest.raises(RejectedError, match="the 40 bytes are no image") as caught:
        next(strict)
    assert caught.value.values["row"] == 13


@pytest.mark.parametrize(("package", "call"), [("PIL", "decode_image"), ("soundfile", "decode_sound")])
def test_a_missing_package_names_its_extra(package: str, call: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from datastore.media import {call}; {call}(b'')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'llm-datastore[" in done.stderr
