"""What a data file is, by its first bytes: files of another kind, compressed, cut or zeroed ones are named as such."""

from __future__ import annotations

import os
import re
from typing import BinaryIO

from jvlm.errors import UserError

# Every Riegeli file, hence every ArrayRecord file, begins with these 64 bytes: the header of its first block, and the
# chunk that is the signature (github.com/google/riegeli, doc/riegeli_records_file_format.md).
RIEGELI_SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f0000000000000000400000000000000091bac23c9287e1a9"
    "0000000000000000e19f13c0e9b1c37273000000000000000000000000000000"
)
BLOCK = 64 * 1024
# the last block's record, written three times: where the index is
_POSITION = re.compile(rb"\x00\x03.{3}\x08([\x80-\xff]*[\x00-\x7f])", re.DOTALL)
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_OTHER = {
    b"PAR1": ("Parquet", "Name it *.parquet"),
    b"ARROW1": ("Arrow", "Name it *.arrow"),
    b"version https://git-lfs": ("a Git LFS pointer", "Fetch the file: git lfs pull"),
    b"\xff\xfe": ("UTF-16 text", "Write it in UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "Write it in UTF-8"),
}


def check_file(path: str) -> None:
    """Check that a path is a regular file that this process may read, and neither empty nor zeroed at its head.

    Raises:
      UserError: it is not, and what it is instead.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder, not a file. Give it without a glob, or give the files in it")
    try:
        start = _start(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from error
    if not start:
        raise UserError(f"{path}: empty, 0 bytes. Copy or write it again, or leave it out of the list")
    if not any(start):
        raise UserError(f"{path}: begins with {len(start)} zero bytes. Its writing was interrupted; write it again")
    for mark, (name, program) in _COMPRESSED.items():
        if start.startswith(mark):
            raise UserError(f"{path}: compressed by {name}. Unpack it first ({program})")


def check_text(path: str, kind: str = "JSON lines") -> None:
    """Check that a file can be text in UTF-8.

    Args:
      kind: what it should be, for the message.

    Raises:
      UserError: it is of another kind.
    """
    check_file(path)
    start = _start(path)
    for mark, (name, fix) in _OTHER.items():
        if start.startswith(mark):
            raise UserError(f"{path}: {name}, not {kind}. {fix}")
    if start.startswith(RIEGELI_SIGNATURE[:16]):
        raise UserError(f"{path}: an ArrayRecord file. Name it *.arrayrecord")


def check_lines(path: str) -> None:
    """Check that a file can be JSON lines in UTF-8.

    Raises:
      UserError: it is of another kind, one JSON array, or objects each of which takes several lines.
    """
    check_text(path)
    start = _start(path).removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*\{[ \t\r]*\n", start):
        raise UserError(
            f"{path}: JSON objects over several lines each. Write one a line: jq -c . {path} > examples.jsonl"
        )
    words = start.split(None, 1)
    if words and (words[0] == b"[" or words[0].startswith(b"[{")):
        raise UserError(f"{path}: one JSON array, not JSON lines. Name it *.json")


def check_binary(path: str, kind: str, marks: tuple[bytes, ...]) -> None:
    """Check that a file begins with one of the marks of its kind.

    Raises:
      UserError: it does not.
    """
    check_file(path)
    start = _start(path)
    if not start.startswith(marks):
        raise UserError(f"{path}: not a file of kind {kind}, by its first bytes {start[:8].hex()}. Write it again")


def check_shard(path: str) -> None:
    """Check that a file begins as an ArrayRecord file does.

    Raises:
      UserError: it does not.
    """
    check_file(path)
    start = _start(path)
    if start == RIEGELI_SIGNATURE:
        return
    same = sum(a == b for a, b in zip(start, RIEGELI_SIGNATURE, strict=False))
    if len(start) == len(RIEGELI_SIGNATURE) and same < len(RIEGELI_SIGNATURE) // 2:
        raise UserError(f"{path}: not an ArrayRecord file, by its first bytes {start[:8].hex()}. Write it again")
    raise UserError(f"{path}: its header of {len(RIEGELI_SIGNATURE)} bytes is damaged or cut. Copy or write it again")


def check_padding(path: str) -> None:
    """Check the padding of an ArrayRecord file, which its reader does not look at.

    Zeros fill the file to multiples of 64 KiB after the index, and after the position of the index in the last block.

    Raises:
      UserError: padding that is not zeros.
    """
    size = os.path.getsize(path)
    last = size - BLOCK
    with open(path, "rb") as file:
        _check_zeros(path, file, _chunk(file, last)[2], size)
        index = index_position(file, size)
        if index is not None:
            _check_zeros(path, file, _chunk(file, index)[2], last)


def index_position(file: BinaryIO, size: int) -> int | None:
    """Return where the index of an ArrayRecord file of so many bytes begins; None where its last block is damaged."""
    if size < BLOCK:
        return None
    index = _POSITION.match(_chunk(file, size - BLOCK)[1])
    return index and sum((byte & 0x7F) << 7 * position for position, byte in enumerate(index[1]))


def _check_zeros(path: str, file: BinaryIO, start: int, end: int) -> None:
    while start < end:
        header, data, after = _chunk(file, start)
        # a padding chunk has no records, and nothing to decode
        if header[24:] != b"p" + bytes(15) or any(data) or not start < after <= end:
            raise UserError(f"{path}: damaged between bytes {start:,} and {end:,}. Copy it again, or write it again")
        start = after


def _chunk(file: BinaryIO, begin: int) -> tuple[bytes, bytes, int]:
    """(header, data, position after it) of the Riegeli chunk at a position; at most as much data as the file has."""
    header, position = _across_blocks(file, begin, 40)
    data, position = _across_blocks(file, position, int.from_bytes(header[8:16], "little"))
    # a chunk is as long as it has records, so that each has a position of its own; no chunk begins in a block's header
    least = begin + int.from_bytes(header[25:32], "little")
    if least % BLOCK:
        least += max(0, 24 - least % BLOCK)
    return header, data, max(position, least)


def _across_blocks(file: BinaryIO, position: int, size: int) -> tuple[bytes, int]:
    """(``size`` bytes, position after them), without the headers of 24 bytes that each block begins with."""
    data = bytearray()
    while len(data) < size:
        position += 24 * (position % BLOCK == 0)
        file.seek(position)
        piece = file.read(min(size - len(data), BLOCK - position % BLOCK))
        if not piece:
            break
        data += piece
        position += len(piece)
    return bytes(data), position


def _start(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(RIEGELI_SIGNATURE))
