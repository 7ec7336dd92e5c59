"""Adapters: read, placed in their bases, merged before any rule sees the bases."""
