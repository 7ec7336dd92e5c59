"""How many elements of a tensor are made at a time, and what a worker allocates for it; ``schedule`` adds it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardmerge.ops.contract import Arithmetic, Meta, Op
from shardmerge.packed_names import packed_name
from shardmerge.tensors import Boxes, Columns, FileStamp, Made, Strided, TensorEntry, View
from shardmerge.tensors.strides import block, direct, in_order, row_major

# The largest tile, for up to four workers. fp32 to bf16 by two, 2 GiB in, whole process: 0.434 s with tiles of 2 MiB,
# 0.429 with 4. But a tile of 4 wants 6 MiB more of buffers for two workers, and its half is written in folios of 2 MiB:
# where the machine had to fetch memory first (a guest that gives free memory back to its host), the same runs took 0.45
# and 0.66 s.
LARGEST_TILE = 2 << 20

# Most bytes that `execute.gather` reads at once to rearrange them.
WORKSPACE = 1 << 20

# What `execute.rearrange` allocates, and the list of runs of `execute.gather`.
REARRANGING = 512 << 10

# A transposed matrix is made in bands of at most so many tiles, 32 MiB at the largest: a tile of it is so narrow a band
# of its source that every page would be read up to 100 times. See decision 18.
BAND_TILES = 16

# What a read of a box should bring, in bytes: it costs 20 us, mostly of Python. A matrix cut into narrow columns is
# made in bands for it, as a transposed one is. 1,024 boxes side by side, 16,384 columns of bf16, with 2, 4, 8, 16 and
# 32 KiB: 0.15, 0.29, 0.43, 0.68 and 0.50 GB/s of CPU time.
_BOX_READ = 16 << 10

# How many tensors in boxes a worker remembers the places of; one is made of a few at most.
KEPT_TILINGS = 8

# Tiles' worth of buffers that a worker keeps to use again: those of a cast, input and output. Fresh memory for every
# tile cost a third of the time of a ZeRO-3 gather.
KEPT_TILES = 2


# Bytes of a file that are read back at once for its SHA-256; a process has one buffer.
READ_BACK = 1 << 20


# Frames that a worker unpacks side by side, and what each takes beside its window: ``storage.packed`` keeps to both.
OPEN_FRAMES, PER_FRAME = 4, 1 << 20


def unpacking_peak(files: Iterable[FileStamp]) -> int:
    """Returns the most bytes a worker keeps to unpack files that are frames of others; 0 where none are."""
    windows = sorted((name.window for stamp in files if (name := packed_name(stamp.path))), reverse=True)
    return sum(window + PER_FRAME for window in windows[:OPEN_FRAMES])


# What a process keeps of a ``.metadata`` that it read, in bytes a byte of the file: arrays of chunks and of ranges,
# what the interpreter noted, and memory that is not given back. Measured: 0.82 of 216 MB, 0.76 of 103. With it a run of
# 128,000 parts (20 MB) took 75 MB of 83 planned, and without it of 66.
_OF_METADATA = 0.85


# What the modules of a target and its small files leave: an XTuner LLaVA, which loads most of them, has 54 MiB when it
# is planned and 63 in a terminal when it is published, where a conversion that keeps every name has 51.
_OF_TARGET = 12 << 20


def target_peak(target: str) -> int:
    """Returns what making the directory of a target takes, in bytes; nothing where the names stay as they are."""
    return 0 if target == "state-dict" else _OF_TARGET


def opening_peak(files: Iterable[FileStamp]) -> int:
    """Returns what reading the headers of some files takes, in bytes, where that is not little."""
    return int(_OF_METADATA * sum(stamp.size for stamp in files if stamp.path.endswith(".metadata")))


def tile_elements(entry: TensorEntry, tile: int) -> int:
    """Returns how many elements of a tensor are made at a time, at most: a tile, or a band of a transposed matrix."""
    held = entry.pieces[0].held if entry.pieces else None
    plain = max(tile // entry.dtype.itemsize, 1)
    count = chunk_elements(entry, held, tile) if isinstance(held, Made) else plain
    found = _block(entry) if granule(entry) == 1 else None
    return count if found is None else _band(*found, count)


def chunk_elements(entry: TensorEntry, held: Made, tile: int) -> int:
    """Returns how many elements arithmetic makes at a time: a tile on its larger side, cut where rows end."""
    widest = max([entry.dtype.itemsize, *(base.dtype.itemsize for base in held.bases)])
    unit = granule(entry)
    return max(tile // widest // unit * unit, unit)


def _band(whole: int, row: int, count: int) -> int:
    """Returns the elements of a block, or of several small ones, or of an equal part of a large one."""
    if whole <= count:
        return count // whole * whole
    rows, most = whole // row, BAND_TILES * count // row
    if most == 0:  # not even a row
        return count
    fewest = -(-rows // most)
    bands = next((n for n in range(fewest, 2 * fewest) if rows % n == 0), fewest)
    return -(-rows // bands) * row


def _block(entry: TensorEntry) -> tuple[int, int] | None:
    """Returns what of a tensor is better made as a whole (see ``strides.block``), and a row of it, in elements."""
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, View):
        held = direct(held)
    if isinstance(held, (View, Strided)):
        found = block(held.shape, held.strides, entry.dtype.itemsize)
        if found is None and isinstance(held, View) and held.offset == 0 and in_order(held.shape, held.strides):
            return _block(held.base) if held.base.numel == entry.numel else None
        return found
    if isinstance(held, Boxes):
        return _block_of_boxes(entry.dtype.itemsize, held)
    if isinstance(held, Columns):
        return _block_of_columns(entry, held)
    if isinstance(held, Made):
        blocks = (_block(base) for base in held.bases if base.numel == entry.numel)
        return max((found for found in blocks if found is not None), default=None)
    return None


def _block_of_boxes(itemsize: int, held: Boxes) -> tuple[int, int] | None:
    """Returns so many rows that a read of a box brings enough, or those of the block that a view among them has."""
    if held.view is not None:
        found = block(held.view.shape, held.view.strides, itemsize)
        if found is None:
            return None
        axis = row_major(held.view.shape).index(found[1])
        row = row_major(held.shape)[axis]
        return found[0] // found[1] * row, row
    rows = -(-_BOX_READ // (held.run * itemsize))
    return (rows * held.row, held.row) if rows > 1 else None


def _block_of_columns(entry: TensorEntry, held: Columns) -> tuple[int, int] | None:
    """Returns as many rows as the blocks of the tensors side by side have; tensors one after the other are apart."""
    blocks = [(base, found) for base in held.bases if (found := _block(base)) is not None]
    if not blocks:
        return None
    if held.rows == 1:
        return blocks[0][1] if len({base.numel for base in held.bases}) == 1 else None
    row = entry.numel // held.rows
    rows = max(-(-whole * held.rows // base.numel) for base, (whole, _) in blocks)
    return rows * row, row


def column_elements(base: TensorEntry, tile: int) -> int:
    """Returns how many elements of one of several tensors side by side are read at a time, at most."""
    least = WORKSPACE // base.dtype.itemsize
    return max(least, tile_elements(base, tile)) if _block(base) is not None else least


def granule(entry: TensorEntry) -> int:
    """Returns the elements that are best made together, so that no row is computed for two tiles."""
    held = entry.pieces[0].held if entry.pieces else None
    if not isinstance(held, Made) or not isinstance(held.recipe, Arithmetic):
        return 1
    unit = held.recipe.unit([Meta.of(base) for base in held.bases])
    if unit == 1 and len(held.bases) == 1 and held.bases[0].numel == entry.numel:
        return granule(held.bases[0])
    return unit


def has_state(entry: TensorEntry) -> bool:
    """Tells whether making a tensor begins with reading something whole, so that one worker should make all of it."""
    return next(_states(entry), None) is not None


def share_state(one: TensorEntry, other: TensorEntry) -> bool:
    """Tells whether what must be known to make two tensors is the same, so that it should be found once for both."""
    states = list(_states(one))
    return bool(states) and states == list(_states(other))


def _states(entry: TensorEntry) -> Iterator[tuple[Op, tuple[TensorEntry, ...]]]:
    """Yields what the states are made of: by what op, and of which tensors."""
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, Made) and isinstance(held.recipe, Arithmetic) and held.recipe.state_peak(_metas(held)):
        yield held.recipe.preparing, held.bases
    for base in held.bases if isinstance(held, (View, Columns, Made)) else ():
        yield from _states(base)


def _metas(held: Made) -> list[Meta]:
    return [Meta.of(base) for base in held.bases]


def making_peak(entry: TensorEntry, tile: int) -> int:
    """Returns the most bytes a worker allocates to make a tensor in tiles of so many bytes.

    The output of a tile, what making it needs, and the buffers that are kept to be used again.
    """
    count = min(tile_elements(entry, tile), entry.numel)
    return KEPT_TILES * tile + count * entry.dtype.itemsize + _need(entry, count, tile)


def _need(entry: TensorEntry, count: int, tile: int) -> int:
    """Bytes allocated while ``count`` elements are written to a buffer that is there already."""
    held = entry.pieces[0].held if entry.pieces else None
    if isinstance(held, Made):
        return _arithmetic_need(entry, held, count, tile)
    if isinstance(held, Columns):
        sizes = [min(column_elements(base, tile), base.numel) for base in held.bases]
        buffer = max(size * base.dtype.itemsize for size, base in zip(sizes, held.bases, strict=True))
        return buffer + max(_need(base, max(count, size), tile) for size, base in zip(sizes, held.bases, strict=True))
    if isinstance(held, View):
        base = direct(held).base
        return WORKSPACE + REARRANGING + _need(base, max(count, WORKSPACE // base.dtype.itemsize), tile)
    if isinstance(held, Boxes):
        return WORKSPACE + REARRANGING + tiling_bytes(held)
    # A plain tensor may have views among its pieces only if it is one (torch saves a view as one piece).
    return WORKSPACE + REARRANGING if isinstance(held, Strided) else 0


def tiling_bytes(held: Boxes) -> int:
    """Returns the bytes of what finds boxes by their place: three arrays a tensor, and lists of what a block meets."""
    axes = len(held.shape)
    return len(held.boxes) * (KEPT_TILINGS * (24 * axes + 40) + 60 * axes + 330)


def _arithmetic_need(entry: TensorEntry, held: Made, count: int, tile: int) -> int:
    op = held.recipe
    assert isinstance(op, Arithmetic)  # moves are views and columns
    metas = [Meta.of(base) for base in held.bases]
    unit = op.unit(metas)
    step = min(tile_elements(entry, tile), -(-count // unit) * unit + unit, entry.numel)
    total = op.peak(metas, min(chunk_elements(entry, held, tile), step)) + op.state_peak(metas)
    if unit > 1:
        total += step * entry.dtype.itemsize  # a block whose middle is asked for is made whole
    for base, (_, wanted) in zip(held.bases, op.ranges(metas, 0, step), strict=True):
        total += wanted * base.dtype.itemsize
    return total + max((_need(base, max(tile, step), tile) for base in held.bases), default=0)
