"""Matrices for the emulator's tests, as their elements lie in registers and in shared memory."""

import numpy as np

LAYOUTS = [(chunks, contiguous) for chunks in (1, 2, 4, 8) for contiguous in (True, False)]


def integers(*shape: int, seed: int = 0, most: int = 8) -> np.ndarray:
    """Small whole numbers, which every format holds and every order sums alike."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def raw(x: np.ndarray, kind: str) -> np.ndarray:
    """Bits in the format of an operand."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == "tf32":
        return x.view(np.uint32)
    return x.astype(np.float16).view(np.uint16) if kind == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


# Operands of wgmma in shared memory. A chunk is 16 bytes; rows of 8 (128 bytes), 4 or 2 chunks are repeated eight
# times, and within each 128 bytes chunks change places by the number of the row.


def swizzled(row: int, chunk: int, chunks: int) -> int:
    """Which chunk of its row a chunk becomes."""
    return chunk ^ (row // (8 // chunks)) % chunks if chunks > 1 else chunk


def place(outer: int, inner: int, chunks: int, per_chunk: int, lead: int, stride: int) -> int:
    """In bytes, of an element whose `inner` coordinate is contiguous."""
    block, within = divmod(inner, chunks * per_chunk)
    row, chunk = outer % 8, within // per_chunk
    size = 16 // per_chunk
    where = outer // 8 * stride + block * lead + row * 16 * chunks + swizzled(row, chunk, chunks) * 16
    return where + within % per_chunk * size


def in_shared_memory(x: np.ndarray, kind: str, chunks: int, contiguous: bool) -> tuple[np.ndarray, int]:
    """The bytes of an operand [outer, depth], whose depth is contiguous or not, and its descriptor at address 0."""
    bits = raw(x, kind)
    table = bits if contiguous else bits.T
    per_chunk = 16 // bits.itemsize
    width = chunks * per_chunk
    blocks = -(-table.shape[1] // width)
    block = 8 * 16 * chunks
    stride, lead = block * blocks, block
    memory = np.full(table.shape[0] // 8 * stride, 0xFF, np.uint8).view(bits.dtype)
    for outer in range(table.shape[0]):
        for inner in range(table.shape[1]):
            memory[place(outer, inner, chunks, per_chunk, lead, stride) // bits.itemsize] = table[outer, inner]
    if chunks == 1 and not contiguous:  # without a swizzle the first field is always the depth's
        lead, stride = stride, lead
    mode = {8: 1, 4: 2, 2: 3, 1: 0}[chunks]
    return memory, mode << 62 | (stride >> 4) << 32 | (lead >> 4) << 16
