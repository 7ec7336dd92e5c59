"""What a tensor is and where its bytes lie. Opens no files."""

from __future__ import annotations

from shardmerge.tensors.catalog import PEFT_ADAPTER, Catalog, Fact, FileStamp, Record
from shardmerge.tensors.entries import (
    Box,
    Boxes,
    Columns,
    Composed,
    Extent,
    Held,
    Made,
    Piece,
    Recipe,
    Shape,
    Strided,
    TensorEntry,
    View,
    composed,
    dense,
    leaves,
    of_source,
)
from shardmerge.tensors.side_file import ReadSideFile, SideFile

__all__ = [
    "PEFT_ADAPTER", "Box", "Boxes", "Catalog", "Columns", "Composed", "Extent", "Fact", "FileStamp", "Held", "Made",
    "Piece", "ReadSideFile", "Recipe", "Record", "Shape", "SideFile", "Strided", "TensorEntry", "View", "composed",
    "dense", "leaves", "of_source",
]  # fmt: skip
