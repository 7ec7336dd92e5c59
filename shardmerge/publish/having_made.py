"""Has parts made, by whoever is at hand, after everything was checked that can be checked before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shardmerge.errors import ResourceError
from shardmerge.execute.cloning import clonable_bytes
from shardmerge.execute.executors.contract import Executor, Make, Progress
from shardmerge.execute.executors.here import make_here
from shardmerge.execute.means import Means, check_device
from shardmerge.execute.patience import patiently
from shardmerge.execute.pins import Pins
from shardmerge.execute.products import one_thread_for
from shardmerge.plan.shard import bytes_read
from shardmerge.plan.value import Part
from shardmerge.prepare.options import Options, granted
from shardmerge.publish.checks import check_output
from shardmerge.publish.making import PartMaker, read_receipt
from shardmerge.publish.staging import Staging
from shardmerge.sources.checksums import read_records
from shardmerge.storage.limits import bounds_cache
from shardmerge.tensors import FileStamp

# For how long a node may not see what another one has made: NFS caches what is in a directory, and what is not, for as
# long as acdirmax says, 60 seconds unless somebody changed it. How often it is looked for, both in seconds.
_CACHED, _LOOK = 65.0, 0.5


def have_made(  # noqa: PLR0913  # what, where, and how
    todo: Sequence[Part],
    staging: Staging,
    out: Path,
    options: Options,
    progress: Progress | None,
    *,
    files: Sequence[FileStamp] = (),
    more: int = 0,
    target: str = "state-dict",
    made_by: Callable[[Make], Make] | None = None,
) -> None:
    """Checks all that can be checked before anything is written, makes the staging directory, and has parts made."""
    shards, files = [part.shard for part in todo], files or todo[0].files
    how = granted(shards, options, files, target)  # before another thread is started: only a process without may fork
    needed = sum(shard.nbytes for shard in shards) + more - clonable_bytes(shards, out)
    check_output(files, out, needed, overwrite=options.overwrite)
    check_device(options.device)
    pins = Pins(files)
    pins.check()
    moved = sum(bytes_read(tensor) + tensor.nbytes for shard in shards for tensor in shard.tensors)
    io = options.io if how.apart or options.engine != "here" else "pread"
    means = Means(
        how.threads,
        how.tile,
        io,
        bounds_cache(moved),
        options.sync,
        options.device,
        read_records,
        options.sha256,
    )
    maker = PartMaker(staging, means, pins)
    try:
        patiently(lambda _: staging.begin(files, out))
        # By this thread, which the caller's own setting is of: others' are ignored then.
        with one_thread_for(tensor.entry for shard in shards for tensor in shard.tensors):
            _executor(options)(todo, made_by(maker) if made_by else maker, how, progress)
        if options.engine != "here":
            await_receipts(todo, staging)
    except BaseException as error:
        staging.tidy()
        if isinstance(error, ResourceError):
            pins.check()  # a process that reads a map of a file that shrank is ended by the system
        raise
    finally:
        maker.close()


def await_receipts(parts: Sequence[Part], staging: Staging) -> None:
    """Waits until the receipts of parts that were made are seen here, or it is certain that they never will be."""
    end = time.monotonic() + _CACHED
    while any(read_receipt(staging, part) is None for part in parts) and time.monotonic() < end:
        time.sleep(_LOOK)


def _executor(options: Options) -> Executor:
    if options.engine == "here":
        return make_here
    from shardmerge.execute.executors.ray import OnRay

    return OnRay(options.address)
