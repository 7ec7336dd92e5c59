"""Bytes and paths: open, read, map, write, sync. Knows nothing of tensors."""
