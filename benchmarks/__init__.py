"""Measures shardmerge beside the floor of the machine and the tools people use now."""
