"""The command line: the only room with click, tqdm and exit codes. Everything it does goes through the public door."""
