"""Merge configurations of mergekit as mappings."""
