"""``shardmerge bench``: what a conversion costs on the machine at hand, beside the floor of its disk.

``suite`` is the benchmark; ``processes`` measures whole processes, and serves the project's own benchmarks too.
"""
