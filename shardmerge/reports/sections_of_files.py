"""What the page says of files: sources, files of the result, and digests."""

from __future__ import annotations

from collections import Counter, defaultdict

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.markup import code, escaped, table
from shardmerge.reports.provenance import Provenance

# Files that have a row; a checkpoint for training has three for every tensor.
_MOST_FILES = 500


def sources(found: Provenance) -> str:
    """Returns the sources as the receipt has them: paths are those that the user wrote."""
    used: Counter[str] = Counter()
    for one in found.tensors:
        used.update({leaf.source for leaf in one.leaves})
    rows = (
        (
            code(source.name),
            escaped(source.kind),
            code(source.path),
            f"{used[source.name]:,}",
            "<br>".join(escaped(note) for note in source.notes),
        )
        for source in found.sources
    )
    heads = ("Source", "Format", "Path", "Tensors from it", "Notes")
    return (
        '<section aria-labelledby="sources"><h2 id="sources">Sources</h2>'
        "<p>Paths as the user wrote them; relative ones are relative to the mapping.</p>"
        f"{table(heads, rows, caption='Sources', numbers=(3,))}</section>"
    )


def files(found: Provenance) -> str:
    """Returns the files of weights, and the small ones beside them."""
    tensors: dict[str, int] = defaultdict(int)
    for one in found.tensors:
        tensors[one.shard] += 1
    rows = [
        (code(name), escaped(human_bytes(nbytes)), f"{tensors[name]:,}")
        for name, nbytes, _ in found.shards[:_MOST_FILES]
    ]
    sides = ", ".join(code(name) for name, _ in found.side_files[:_MOST_FILES])
    more = len(found.shards) - len(rows)
    rest = f"<p>And {more:,} more files of weights.</p>" if more > 0 else ""
    beside = f"<p>Beside them: {sides}.</p>" if sides else ""
    weights = table(("File", "Bytes", "Tensors"), rows, caption="Files of weights", numbers=(1, 2))
    return f'<section aria-labelledby="files"><h2 id="files">Files</h2>{weights}{rest}{beside}</section>'


def digests(found: Provenance) -> str:
    """Returns what proves that files are those of the run; checksums of tensors stand in their table."""
    rows = [
        ("plan", _hash(found.plan), "of all that decides the bytes of the result"),
        *((code(f"{one.name}:"), _hash(one.fingerprint), "of the headers of a source") for one in found.sources),
        *(
            (code(name), _hash(digest), "of all bytes of the file that are no tensor")
            for name, _, digest in found.shards[:_MOST_FILES]
        ),
        *((code(name), _hash(digest), "of the file") for name, digest in found.side_files[:_MOST_FILES]),
    ]
    return (
        '<section aria-labelledby="digests"><h2 id="digests">Digests</h2>'
        "<p>SHA-256. Tensors have a CRC-32 each, in the table above and in the receipt; cloned ones have none.</p>"
        f"<details><summary>{len(rows):,} digests</summary>"
        f"{table(('What', 'SHA-256', 'Of'), rows, caption='Digests')}</details></section>"
    )


def _hash(digest: str) -> str:
    return f'<code class="hash">{escaped(digest)}</code>'
