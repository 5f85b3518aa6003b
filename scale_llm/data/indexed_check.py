"""Looks into Megatron's .idx and .bin without torch or megatron, to refuse damaged pairs before a run starts.

The .idx file: 9 bytes magic, u64 version, u8 dtype code, u64 sequences S, u64 document marks D, then i32
lengths [S] (tokens), i64 pointers [S] (bytes into the .bin), i64 document marks [D] (sequence numbers), and
perhaps i8 modes [S].
"""

import os
import struct

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_REMEDY = "copy both files again, or index the text again"


def check_indexed(prefix: str, vocab_size: int | None = None) -> list[str]:
    """What is wrong with PREFIX.idx and PREFIX.bin; empty when they are whole and belong together.

    With `vocab_size` a sample of the tokens (up to a million) is compared with it too.
    """
    try:
        header = read_header(prefix)
    except (OSError, ValueError) as error:
        return [f"data.path={prefix}: {error}; {_REMEDY}"]
    problems = _check_arrays(prefix, header)
    if not problems and vocab_size is not None:
        problems = _check_tokens(prefix, header, vocab_size)
    return problems


def read_header(prefix: str) -> tuple[str, int, int]:
    """(dtype name, sequences, document marks) of PREFIX.idx, its length checked against them."""
    size = os.path.getsize(prefix + ".idx")
    os.path.getsize(prefix + ".bin")  # raises when absent
    with open(prefix + ".idx", "rb") as stream:
        head = stream.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise ValueError(f"{prefix}.idx is no Megatron index (its first bytes are not MMIDIDX)")
    if len(head) < HEADER.size:
        raise ValueError(f"{prefix}.idx is truncated: {size} bytes, its header alone has {HEADER.size}")
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{prefix}.idx has version {version} and dtype code {code}; known: 1 and {sorted(DTYPES)}")
    wanted = HEADER.size + 12 * sequences + 8 * marks
    if size < wanted:
        raise ValueError(f"{prefix}.idx is truncated: {size} bytes of {wanted}")
    if size not in (wanted, wanted + sequences):
        raise ValueError(f"{prefix}.idx has {size} bytes where its header announces {wanted}")
    return DTYPES[code], sequences, marks


def sequence_lengths(prefix: str):
    """Tokens of each sequence, int32 numpy array [S], mapped from the file."""
    import numpy

    _, sequences, _ = read_header(prefix)
    if not sequences:
        return numpy.zeros(0, dtype=numpy.int32)
    return numpy.memmap(prefix + ".idx", dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))


def document_marks(prefix: str):
    """The sequence at which each document ends, int64 numpy array [documents + 1] that begins with 0, copied."""
    import numpy

    _, sequences, marks = read_header(prefix)
    with open(prefix + ".idx", "rb") as stream:
        stream.seek(HEADER.size + 12 * sequences)
        return numpy.fromfile(stream, dtype="<i8", count=marks)


def _check_arrays(prefix: str, header: tuple[str, int, int]) -> list[str]:
    import numpy

    dtype, sequences, marks = header
    bin_bytes = os.path.getsize(prefix + ".bin")
    if not sequences or not bin_bytes:
        return [f"data.path={prefix}: holds no tokens ({sequences} sequences, {bin_bytes} bytes); {_REMEDY}"]
    index = numpy.memmap(prefix + ".idx", dtype=numpy.uint8, mode="r")
    lengths, pointers, documents = numpy.split(
        index[HEADER.size : HEADER.size + 12 * sequences + 8 * marks], [4 * sequences, 12 * sequences]
    )
    token_bytes = lengths.view("<i4").astype(numpy.int64) * numpy.dtype(dtype).itemsize
    pointers, documents = pointers.view("<i8"), documents.view("<i8")
    announced = int(token_bytes.sum())
    if announced != bin_bytes:
        return [
            f"data.path={prefix}: the .idx does not belong to this .bin (it announces {announced} bytes of "
            f"tokens, the .bin has {bin_bytes}); {_REMEDY}"
        ]
    if token_bytes.min() < 0 or pointers.min() < 0 or int((pointers + token_bytes).max()) > bin_bytes:
        return [f"data.path={prefix}: the .idx points outside the .bin of {bin_bytes} bytes; {_REMEDY}"]
    if not marks or documents[-1] != sequences or (numpy.diff(documents) < 0).any():
        return [
            f"data.path={prefix}: the document marks of the .idx do not end at its {sequences} sequences; {_REMEDY}"
        ]
    return []


def _check_tokens(prefix: str, header: tuple[str, int, int], vocab_size: int) -> list[str]:
    import numpy

    tokens = numpy.memmap(prefix + ".bin", dtype=header[0], mode="r")
    # 64 stretches spread over the file: whole pages, so that a terabyte costs as little as a megabyte.
    starts = numpy.linspace(0, max(len(tokens) - 16384, 0), 64, dtype=numpy.int64)
    highest = max(int(tokens[start : start + 16384].max()) for start in starts)
    if highest < vocab_size:
        return []
    return [
        f"data.path={prefix}: holds token {highest}, but the tokenizer has {vocab_size} tokens; set "
        "tokenizer.path to the tokenizer these files were made with"
    ]
