"""Measures whole processes from outside; what ``shardmerge bench`` measures with."""

from shardmerge.bench.processes import Measured, answer, measure, order, succeed, thinned

__all__ = ["Measured", "answer", "measure", "order", "succeed", "thinned"]
