"""A Slurm cluster of several nodes on this machine, for tests: its own munged, one slurmctld, a slurmd for each node.

The daemons are children in the foreground, everything is in one directory, and ports are free ones, so several clusters
and an installed Slurm do not meet. Partition ``high`` preempts ``low``, whose jobs are then queued again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CAN = not os.geteuid() and all(shutil.which(name, path=SBIN) for name in DAEMONS)
needs_slurm = pytest.mark.skipif(not CAN, reason="a Slurm cluster takes root and the packages slurm-wlm and munge")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldPort={ctld}
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP OverSubscribe=FORCE:1
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


class SlurmCluster:
    """A cluster that is up.

    Parameters
    ----------
    folder
        For its configuration, state and logs.
    nodes
        How many, named n0, n1, ..., with two CPUs each.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        for name in [name for name in self.env if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.env[name]
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
        names = [f"n{i}" for i in range(nodes)]
        self._configure(names)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start_munged()
            self._start("slurmctld", "slurmctld", "-D")
            for name in names:
                self._start(name, "slurmd", "-D", "-N", name)
            until(lambda: self.said("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(nodes)], 60)
        except BaseException:
            self._end()
            raise

    def _configure(self, names: Sequence[str]) -> None:
        host = socket.gethostname().split(".")[0]
        ports = free_ports(len(names) + 1)
        rows = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for name, port in zip(names, ports, strict=False)
        ]
        text = CONF.format(host=host, folder=self.folder, ctld=ports[-1], nodes="\n".join(rows))
        (self.folder / "slurm.conf").write_text(text)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        own = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in own.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        until((self.folder / "munge.socket").exists, 20)

    def _start(self, name: str, *command: str) -> None:
        """Starts a daemon in a session of its own: what a terminal sends to a test does not reach it."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def said(self, *command: str, given: str | None = None, cwd: Path | None = None) -> str:
        """Returns what a command of Slurm prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, input=given, cwd=cwd)
        return done.stdout.strip() if not done.returncode else f"exit {done.returncode}: {done.stderr}"

    def sbatch(self, *options: str, script: str, cwd: Path) -> str:
        """Submits a script, as by a pipe, and returns the number of its job."""
        found = self.said("sbatch", "--parsable", *options, given=script, cwd=cwd)
        assert found.isdigit(), found
        return found

    def queued(self, job: str) -> list[str]:
        """Returns the states of the tasks of a job that have not ended."""
        return self.said("squeue", "-h", "-r", "-j", job, "-o", "%T").split()

    def ended(self, job: str, seconds: float = 120) -> list[str]:
        """Waits until all tasks of a job have ended; returns how, as ``COMPLETED`` or ``FAILED 5``."""
        until(lambda: not self.queued(job), seconds)
        return sorted(self.shown(job))

    def shown(self, job: str) -> Iterator[str]:
        """Yields how each task of a job is."""
        for line in self.said("scontrol", "show", "-o", "job", job).splitlines():
            row = dict(pair.partition("=")[::2] for pair in line.split())
            code = row["ExitCode"].partition(":")[0]
            yield row["JobState"] + ("" if code == "0" else f" {code}")

    def restarts(self, job: str) -> int:
        """Returns how often tasks of a job were queued again."""
        rows = self.said("scontrol", "show", "-o", "job", job).split()
        return sum(int(word.partition("=")[2]) for word in rows if word.startswith("Restarts="))

    def at_once(self, job: str) -> None:
        """Lets a job that was queued again begin now: Slurm has it wait for two minutes."""
        until(lambda: "PENDING" in self.queued(job), 60)
        self.said("scontrol", "update", f"JobId={job}", "StartTime=now")

    def lose(self, node: str) -> None:
        """Ends all that runs on a node as a power cut would: nothing of it says goodbye to the controller."""
        tasks = self.processes(node)
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        guards = [pid for pid in parents if Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")]
        self._daemons[node].kill()
        for pid in (*guards, *tasks):
            os.kill(pid, signal.SIGKILL)

    def processes(self, node: str) -> list[int]:
        """Returns the numbers of the processes that jobs have on a node."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURMD_NODENAME={node}".encode() in words and f"SLURM_CONF={self.folder}/slurm.conf".encode() in words:
                found.append(int(folder.name))
        return found

    def back(self, node: str) -> None:
        """Brings a lost node back."""
        self._daemons[node].wait()
        self._start(node, "slurmd", "-D", "-N", node)
        self.said("scontrol", "update", f"NodeName={node}", "State=RESUME")
        until(lambda: self.said("sinfo", "-h", "-n", node, "-o", "%T") == "idle", 60)

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        self.said("scancel", "--state=PENDING", "--partition=low")
        self.said("scancel", "--partition=low")
        self.said("scancel", "--partition=high")
        try:
            until(lambda: not self.said("squeue", "-h"), 30)
        finally:
            self._end()

    def _end(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            daemon.wait(30)


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
