"""What counts in an index right now, for one `CandidateIndex`: its generation, its documents and their arrays.

Looks at every call whether something was committed, by whomever, and refuses what is not the index that was opened:
one of another model in its place, or a process that was forked off.
"""

import os
import threading

from mixencoder.errors import IndexDamagedError, IndexStateError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.folder import FolderStore, Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.memory import MemoryStore
from mixencoder.index.process import check_process
from mixencoder.index.view import Listing, Snapshot


class Current:
    """The newest commit of a store; safe to use from several threads.

    Raises (all methods):
        IndexStateError: it is closed, there is no index, or this is a forked process.
        IndexMismatchError: an index that something else made lies where the one was that was opened.
        IndexDamagedError: the pointer or the catalogue is damaged.
        IndexStorageError: they cannot be read.
    """

    def __init__(self, store: FolderStore | MemoryStore) -> None:
        self._store, self._process = store, os.getpid()
        self._mutex = threading.RLock()
        self._closed = False
        self._manifest: Manifest | None = None
        # what was read of the newest commit, and of which; guarded by the mutex
        self._listed: tuple[Catalogue, tuple[int, int]] | None = None
        self._listing: Listing | None = None
        self._snapshot: Snapshot | None = None

    def store(self) -> FolderStore | MemoryStore:
        """Return where the index is."""
        # before the mutex, which a thread of the parent may have held when this process was forked
        check_process(self._store.name, self._process)
        if self._closed:
            raise IndexStateError("the index is closed; open it again")
        return self._store

    def generation(self) -> Generation:
        """Return the generation that counts."""
        store = self.store()
        with self._mutex:
            while True:
                try:
                    generation = store.current()
                    break
                except FileNotFoundError:
                    # compaction swept it away while it was being opened
                    continue
            if self._manifest is None:
                self._manifest = generation.manifest
            elif generation.manifest is not self._manifest:
                found, replaced = generation.manifest, f"{store.name} was replaced by another index"
                found.check_fingerprint(f"{replaced}, which", self._manifest.fingerprint)
                found.check_settings(replaced, self._manifest, "Open it again")
                self._manifest = generation.manifest
            return generation

    def listing(self) -> tuple[Generation, Listing]:
        """Return the generation and the documents of its newest commit."""
        self.store()
        with self._mutex:
            generation = self.generation()
            version = generation.catalogue.version()
            if self._listing is None or self._listed != (generation.catalogue, version):
                self._listing = Listing(generation.catalogue, generation.catalogue.row_map())
                self._listed, self._snapshot = (generation.catalogue, version), None
            return generation, self._listing

    def snapshot(self) -> Snapshot:
        """Return the same documents with their arrays; one object as long as nothing is committed.

        Raises:
            IndexDamagedError: an array file is missing or too short.
        """
        self.store()
        with self._mutex:
            while True:
                generation, listing = self.listing()
                if self._snapshot is not None:
                    return self._snapshot
                try:
                    self._snapshot = listing.with_arrays(generation.manifest, generation.arrays.map)
                except IndexDamagedError:
                    # unless compaction swept the files away meanwhile
                    if self.generation() is generation:
                        raise

    def close(self) -> None:
        """Let go of the files."""
        if os.getpid() != self._process:
            # they are the parent's, and so may be the mutex
            return
        with self._mutex:
            self._closed = True
            self._listed = self._listing = self._snapshot = None
            self._store = MemoryStore()
