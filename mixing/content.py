"""Content keys: what a cache knows an encoded image or prompt by. Everything that the encoding depends on is in its key, and nothing else.

No file name and no place in a source is part of a key, so an edited file under an old name has another key, and the same image in two sources has one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mixing.plain_file import open_plain

KEY_BYTES = 16
"""Bytes of a key and of a content hash. Among 1e9 keys of 128 bits, two are equal with a chance of 1e-21."""


def content_hash(data: bytes | Path) -> bytes:
    """What an image file is told apart by: BLAKE2b of its bytes, 16 bytes. A path is read. Raises OSError."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    if isinstance(data, bytes):
        digest.update(data)
        return digest.digest()
    with open_plain(data) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def latents_key(content: bytes, transform: str, encoder: str) -> bytes:
    """The key of an image's latents, 16 bytes.

    content: `content_hash` of its file. transform: what was done to its pixels, such as `512x512 crop 0.5 0.5 flip v1`.
    encoder: the family's `latents_identity`. Raises ValueError if content has not 16 bytes.
    """
    if len(content) != KEY_BYTES:
        raise ValueError(f"content: {len(content)} bytes found, a content hash has {KEY_BYTES}; make it with content_hash()")
    return _key(b"latents", content, _encoded(transform), _encoded(encoder))


def text_key(prompt: str, encoder: str) -> bytes:
    """The key of an encoded prompt, 16 bytes. encoder: the family's `text_identity`."""
    return _key(b"text", _encoded(prompt), _encoded(encoder))


def _key(kind: bytes, *parts: bytes) -> bytes:
    """BLAKE2b of the parts, each after its length, so that no two lists of parts read alike; kinds are told apart by personalisation."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=kind)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
