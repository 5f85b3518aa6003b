"""Parts of a checkpoint from rank to rank, a piece at a time, so that none is in memory whole."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from scale_llm.checkpoint.local_files import Copy, Shelf

PIECE_BYTES = 16 << 20


def exchange(
    shelf: Shelf,
    group: dist.ProcessGroup,
    *,
    send: Copy | None = None,
    to: int | None = None,
    source: int | None = None,
) -> Copy | None:
    """Sends a copy of this shelf to rank `to` and keeps one that comes from rank `source`, which is returned; either
    may be None. send=None: there is none to send, and the other rank gets none.

    Raises:
        OSError: what came could not be kept. The exchange is finished all the same, so that the other rank goes on.
    """
    coming = _exchange_heads(group, send if to is not None else None, to, source)
    problem = None
    outgoing = open(shelf.path(send.iteration, send.rank), "rb") if send is not None and to is not None else None
    incoming = None
    try:
        incoming = shelf.receiving(coming) if coming is not None else None
    except OSError as error:
        problem = error
    left_out = send.bytes if outgoing is not None and send is not None else 0
    left_in = coming.bytes if coming is not None else 0
    try:
        while left_out or left_in:
            sending = piece = None
            if left_out:
                assert outgoing is not None and to is not None
                piece = _tensor(_read(outgoing, min(PIECE_BYTES, left_out)))
                sending = dist.isend(piece, to, group=group)
                left_out -= piece.numel()
            if left_in:
                assert source is not None
                came = torch.empty(min(PIECE_BYTES, left_in), dtype=torch.uint8)
                dist.recv(came, source, group=group)
                left_in -= came.numel()
                if incoming is not None and problem is None:
                    try:
                        incoming.write(came.numpy())
                    except OSError as error:
                        problem = error
            if sending is not None:
                sending.wait()
    finally:
        if outgoing is not None:
            outgoing.close()
        if incoming is not None:
            incoming.__exit__(type(problem) if problem else None, problem, None)
    if problem is not None:
        raise problem
    return shelf.keep(coming, incoming) if coming is not None and incoming is not None else None


def _exchange_heads(
    group: dist.ProcessGroup, send: Copy | None, to: int | None, source: int | None
) -> Copy | None:  # fmt: skip
    """What the files are that follow."""
    mine = _tensor(json.dumps(asdict(send)).encode()) if send is not None else _tensor(b"")
    sent = []
    if to is not None:
        sent.append(dist.isend(torch.tensor([mine.numel()]), to, group=group))
        if mine.numel():
            sent.append(dist.isend(mine, to, group=group))
    coming = None
    if source is not None:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, source, group=group)
        if length.item():
            text = torch.empty(int(length.item()), dtype=torch.uint8)
            dist.recv(text, source, group=group)
            coming = Copy(**json.loads(text.numpy().tobytes()))
    for work in sent:
        work.wait()
    return coming


def _read(file: BinaryIO, count: int) -> bytes:
    """So many bytes whatever happens to the file, for somebody waits for them; the checksum tells."""
    try:
        data = file.read(count)
    except OSError:
        data = b""
    return data.ljust(count, b"\0")


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def peers(rank: int, world_size: int, ranks_per_node: int, replicas: int) -> list[tuple[int, int]]:
    """(rank that gets this rank's part, rank whose part this one gets) of every replica, all on other nodes."""
    steps = [count * ranks_per_node for count in range(1, replicas + 1)]
    assert not steps or steps[-1] < world_size, "more replicas than other nodes"
    return [((rank + step) % world_size, (rank - step) % world_size) for step in steps]


def directory_of(local_dir: Path, run_dir: Path, rank: int) -> Path:
    """What a rank keeps; ranks of one node do not share it."""
    run = f"{run_dir.name}-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"
    return local_dir / run / f"rank_{rank:05d}"
