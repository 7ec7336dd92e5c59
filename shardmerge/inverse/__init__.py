"""The way back: a mapping that undoes another one."""
