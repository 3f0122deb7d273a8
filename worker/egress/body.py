"""Reading an answer whose sender may mean ill: never more of it than was asked for, compressed or not."""

import zlib

from aiohttp import ClientResponse, hdrs

from app.domain.errors import EgressRefused

CHUNK_BYTES = 64 * 1024
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(response: ClientResponse, *, max_bytes: int) -> bytes:
    """The body, decompressed here because it is counted while it grows: a thousand bytes of gzip are a megabyte.

    Raises `EgressRefused` where it is larger than `max_bytes`, or compressed in a way that was not asked for.
    """
    too_large = EgressRefused(f"The answer has more than {max_bytes:,} bytes.")
    if (response.content_length or 0) > max_bytes:
        raise too_large
    inflate = _decompressor(response.headers.get(hdrs.CONTENT_ENCODING, ""))
    body = bytearray()
    received = 0
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        body += chunk if inflate is None else _inflated(inflate, chunk, max_bytes + 1 - len(body))
        if len(body) > max_bytes:
            raise too_large
    if inflate is not None and received and not inflate.eof:
        raise EgressRefused("The answer is compressed, and broken.")
    return bytes(body)


async def read_beginning(response: ClientResponse, *, max_bytes: int) -> bytes:
    """The first bytes of the body as they come, still compressed where they are; the rest is not waited for."""
    body = bytearray()
    while chunk := await response.content.read(max_bytes - len(body)):
        body += chunk
    return bytes(body)


def _decompressor(encoding: str) -> "zlib._Decompress | None":
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name not in _WINDOWS:
        raise EgressRefused("The answer is compressed in a way that is not understood.")
    return zlib.decompressobj(_WINDOWS[name])


def _inflated(inflate: "zlib._Decompress", chunk: bytes, room: int) -> bytes:
    try:
        found = inflate.decompress(chunk, room)
    except zlib.error:
        raise EgressRefused("The answer is compressed, and broken.") from None
    if inflate.unused_data:
        raise EgressRefused("The answer is compressed, and broken.")
    return found
