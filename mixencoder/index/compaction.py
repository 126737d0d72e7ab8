"""Copying an index into a new generation, in the same order, without removed documents."""

import numpy as np

from mixencoder.errors import IndexDamagedError
from mixencoder.index.folder import FolderStore, Generation
from mixencoder.index.memory import MemoryStore
from mixencoder.index.rows import BLOCK_ROWS, RowMap
from mixencoder.index.transaction import transaction
from mixencoder.index.verification import verify
from mixencoder.index.view import Snapshot

_CHUNK_ROWS = 4 * BLOCK_ROWS


def compact(store: FolderStore | MemoryStore, generation: Generation) -> int:
    """Publish a generation that holds only live documents, and return the bytes freed; only under the lock.

    Raises:
        IndexDamagedError: a checksum differs, which new checksums would hide; nothing was changed.
        IndexStorageError: the disk is full, read-only or failing; nothing was changed.
    """
    row_map = generation.catalogue.row_map()
    if row_map.live_rows == row_map.rows:
        return 0
    manifest = generation.manifest
    report = verify(generation.catalogue, generation.arrays, manifest.schema)
    if not report.ok:
        raise IndexDamagedError(f"{store.name} is damaged; nothing was changed: {report.damages[0]}")
    view = Snapshot(generation.catalogue, row_map, manifest, generation.arrays.map(row_map.rows))
    try:
        fresh = store.new_generation(manifest)
        with transaction(fresh.writer(), fresh.arrays, manifest.schema) as current:
            last = -1
            for positions, fields in view.chunks(_CHUNK_ROWS):
                current.append_rows(fields, np.diff(positions, prepend=last) > 0)
                last = int(positions[-1])
            _copy_entries(generation, fresh, row_map)
        before, after = _bytes(generation), _bytes(fresh)
        store.publish(fresh)
    except BaseException:
        store.delete_leftovers()
        raise
    return before - after


def _copy_entries(old: Generation, fresh: Generation, row_map: RowMap) -> None:
    """Copy the entries of live documents; readers do not see them before the generation is published."""
    with fresh.writer().transaction():
        for page in old.catalogue.pages(row_map.rows):
            rows = np.array([entry.row for entry, _ in page], dtype=np.int64)
            live, moved = row_map.is_live(rows).tolist(), row_map.live_before(rows).tolist()
            kept = [entry._replace(row=row) for (entry, _), alive, row in zip(page, live, moved, strict=True) if alive]
            fresh.writer().write(kept, [])


def _bytes(generation: Generation) -> int:
    return generation.arrays.size() + generation.catalogue.size()
