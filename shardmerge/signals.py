"""The signals that end a run cleanly."""

from __future__ import annotations

import signal

# Ctrl-C and Ctrl-\; Slurm and Kubernetes send SIGTERM, a time limit with a warning SIGUSR1 or SIGUSR2, a limit of CPU
# time SIGXCPU, a terminal that closes SIGHUP, a timer of whoever started it SIGALRM.
STOPS = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGHUP,
    signal.SIGALRM,
)
