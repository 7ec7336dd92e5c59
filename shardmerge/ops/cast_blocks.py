"""The blocks that casts are made in, and so the memory that they take: known to the plan, which imports no numpy."""

# Elements made at a time. A kernel runs over a tile in the L3 cache as fast as over less, and each call around it costs
# 1 to 3 us: as much as it needs for 16 Ki elements. 64 Ki where float32 lies between, 32 Ki where an index of 8 bytes
# does, 16 Ki where the exact road takes 40 bytes an element.
TILE, BETWEEN, INDEX, EXACT = 512 << 10, 64 << 10, 32 << 10, 16 << 10

# Most bytes of a table: 64 Ki patterns of 2 bytes.
TABLE = 128 << 10

# Allocated by a cast of any size at most: a table, and one of what lies between, an index with its parts, the exact
# road with its count, the comparison of a kernel.
PEAK = TABLE + max(5 * BETWEEN, 14 * INDEX, 44 * EXACT)
