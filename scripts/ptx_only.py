"""Copies a library without the machine code of its CUDA kernels, so that the driver has to compile their PTX.

    ptx_only.py build-gpu/lib/_ops.so OUT.so

This is how a Hopper card runs what an Ampere card would get. CUDA_FORCE_PTX_JIT=1 is not the same: it holds for every library of
the process, and torch's has no PTX for most of its kernels.

A library holds one "fat binary" per CUDA source: a header (magic, version, header size, bytes of the entries), then entries, each
with its kind (1 = PTX, 2 = machine code), header size and data size. The entries that are PTX move to the front, the rest becomes zero.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2


def ptx_only(library: bytes) -> tuple[bytes, int]:
    """The library with PTX alone, and how many fat binaries it has. ValueError where one of them has no PTX."""
    out, count, at = bytearray(library), 0, library.find(MAGIC)
    while at >= 0:
        version, header_bytes, entry_bytes = struct.unpack_from("<HHQ", library, at + 4)
        first = at + header_bytes
        end = first + entry_bytes
        if version != 1 or header_bytes != 16 or end > len(library):  # the four bytes stand there by chance
            at = library.find(MAGIC, at + 4)
            continue
        kept, entry = b"", first
        while entry < end:
            kind, _, entry_header, data = struct.unpack_from("<HHIQ", library, entry)
            if kind not in (PTX, MACHINE_CODE) or entry + entry_header + data > end:
                raise ValueError(f"the fat binary at {at:#x} has an entry of unknown kind {kind}")
            if kind == PTX:
                kept += library[entry : entry + entry_header + data]
            entry += entry_header + data
        if not kept:
            raise ValueError(f"the fat binary at {at:#x} has no PTX")
        struct.pack_into("<Q", out, at + 8, len(kept))
        out[first:end] = kept.ljust(entry_bytes, b"\0")
        count, at = count + 1, library.find(MAGIC, end)
    return bytes(out), count


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    library, count = ptx_only(Path(sys.argv[1]).read_bytes())
    if not count:
        sys.exit(f"{sys.argv[1]} has no CUDA kernels")
    Path(sys.argv[2]).write_bytes(library)


if __name__ == "__main__":
    main()
