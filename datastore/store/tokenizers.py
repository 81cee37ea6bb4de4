"""Tokenizers in a dataset: the exact bytes that made the tokens, named by their sha256."""

from typing_extensions import Buffer

from datastore.dataset.log.manifest import TokenizerRef, tokenizer_key
from datastore.digest import sha256_hex
from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.storage.verified import first_sound

__all__ = ["put_tokenizer", "read_tokenizer"]


def put_tokenizer(storage: Storage, raw: Buffer, *, vocab_size: int, end_of_text: int) -> TokenizerRef:
    """Store the `tokenizer.json` bytes `raw`; return how a commit names them. Storing them twice is no error."""
    ref = TokenizerRef(sha256=sha256_hex(raw), vocab_size=vocab_size, end_of_text=end_of_text)
    storage.put(tokenizer_key(ref.sha256), raw)
    return ref


def read_tokenizer(storage: Storage, ref: TokenizerRef) -> bytes:
    """Return the bytes of the tokenizer `ref`.

    Raises:
        MissingError: the file is gone.
        CorruptError: its sha256 differs.
    """
    key = tokenizer_key(ref.sha256)
    return first_sound(
        storage, key, lambda place: _checked(place.get(key), ref), is_good=lambda raw: sha256_hex(raw) == ref.sha256
    )


def _checked(raw: bytes, ref: TokenizerRef) -> bytes:
    found = sha256_hex(raw)
    if found != ref.sha256:
        raise CorruptError(
            "tokenizer does not match its sha256",
            where=tokenizer_key(ref.sha256),
            expected=ref.sha256,
            found=found,
            hint="Restore this file from a copy.",
        )
    return raw
