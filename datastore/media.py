"""Images and sounds, from the bytes of a row to arrays: for the `transform` of a `RowLoader`, in its threads or processes.

Both take the bytes themselves, or the struct that Hugging Face `datasets` keeps them in. Whatever cannot be decoded whole is a
ValueError, so the loader names the row and, if it is told so, leaves it out. Decoders are more lenient than one may think: Pillow
makes white of most of a 16-bit picture, and shows what transparency hides; libsndfile gives the first part of a sound whose rest is lost.
"""

import io
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from datastore.errors import DependencyError

__all__ = ["Sound", "decode_image", "decode_sound"]

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
_UNKNOWN_LENGTH = (0, 0xFFFFFFFF)
"""What a writer that cannot go back leaves in the head of a WAV file."""

_FRAMES = 2**20
"""Decoded at a time."""

_PAGE = struct.Struct("<4sBBqIIIB")
_LAST_PAGE = 4


class Sound(NamedTuple):
    """A decoded sound."""

    samples: npt.NDArray[np.float32]
    """[channels, frames]; full scale is from -1 to 1, and what is stored as floating point may lie beyond."""

    rate: int
    """Frames a second."""


def decode_image(value: Any) -> npt.NDArray[np.uint8]:
    """Return [height, width, 3]: red, green and blue of the first frame, upright as EXIF says.

    Grey becomes three equal channels, also of 16 bits, of which the upper eight are taken. What is transparent lies on white. CMYK is
    converted without colour profiles, as Pillow does it.

    Raises:
        ValueError: the bytes are no image, or not all of one; or its numbers have no known range (32 bits).
        DependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415 - comes with an extra
    except ImportError:
        raise DependencyError("Pillow is not installed", hint="Run: pip install 'llm-datastore[images]'.") from None
    raw = _raw(value)
    try:
        with Image.open(io.BytesIO(raw)) as file:
            upright = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise ValueError(f"the {len(raw)} bytes are no image that Pillow knows") from None
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"the image is damaged: {error}") from None
    if upright.mode in _DEEP or (upright.mode == "I" and file.format == "PNG"):
        grey = (np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode in {"I", "F"}:
        raise ValueError(f"the range of the image's numbers is not known (mode {upright.mode}): decode it yourself")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return np.array(upright.convert("RGB"))


def decode_sound(value: Any) -> Sound:
    """Return all frames of a sound, every channel and at its own rate: of WAV, FLAC, OGG (Vorbis, Opus), MP3 or AIFF.

    Raises:
        ValueError: the bytes are no sound, or not all of one, as far as the format lets one see it.
        DependencyError: soundfile is not installed.
    """
    try:
        import soundfile  # noqa: PLC0415 - comes with an extra
    except ImportError:
        raise DependencyError("soundfile is not installed", hint="Run: pip install 'llm-datastore[audio]'.") from None
    raw = _raw(value)
    _check_whole(raw)
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            frames, rate = int(file.frames), int(file.samplerate)
            # In parts: memory for all that a damaged head announces is more than there is.
            parts = [file.read(_FRAMES, dtype="float32", always_2d=True)]
            while len(parts[-1]) == _FRAMES:
                parts.append(file.read(_FRAMES, dtype="float32", always_2d=True))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the {len(raw)} bytes are no sound, or damaged: {error.error_string}") from None
    samples = np.concatenate(parts)
    if len(samples) != frames:
        raise ValueError(f"the sound is damaged: it has {frames} frames, and {len(samples)} can be decoded")
    return Sound(np.ascontiguousarray(samples.T), rate)


def _raw(value: Any) -> bytes:
    """Return the bytes of a cell."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path") is not None:
            raise ValueError(f"the row names a file and does not hold it: {value['path']}")
        value = value.get("bytes")
    if value is None:
        raise ValueError("there is nothing to decode: the value is null")
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ValueError(f"bytes are decoded, not {type(value).__name__}")  # noqa: TRY004 - a bad row, not a bug
    return bytes(value)


def _check_whole(raw: bytes) -> None:
    """Raise if the end is missing, where a format says how long it is: libsndfile decodes what is there."""
    if raw[:4] == b"OggS":
        _check_pages(raw)
    elif raw[:4] in {b"RIFF", b"FORM"} and len(raw) >= 8:
        stated = int.from_bytes(raw[4:8], "little" if raw[:4] == b"RIFF" else "big")
        if stated not in _UNKNOWN_LENGTH and stated + 8 > len(raw):
            raise ValueError(f"the sound is cut: {stated + 8} bytes are announced, and {len(raw)} are there")


def _check_pages(raw: bytes) -> None:
    """Raise unless `raw` is whole pages of Ogg, the last of which says so.

    Source: RFC 3533, section 6.
    """
    at, flags = 0, 0
    while at < len(raw):
        if len(raw) < at + _PAGE.size:
            raise ValueError("the sound is cut within a page of Ogg")
        magic, _, flags, _, _, _, _, segments = _PAGE.unpack_from(raw, at)
        if magic != b"OggS":
            raise ValueError("the sound is damaged: a page of Ogg does not begin as one")
        table = at + _PAGE.size
        at = table + segments + sum(raw[table : table + segments])
        if at > len(raw):
            raise ValueError("the sound is cut within a page of Ogg")
    if not flags & _LAST_PAGE:
        raise ValueError("the sound is cut: its last page of Ogg is missing")
