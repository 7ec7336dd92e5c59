"""From a mapping, or a command line, to a plan: opens sources, reads small files, moves no tensor."""
