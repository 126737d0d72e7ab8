"""The newest commit of an index, for one `CandidateIndex`: its generation, its documents and their arrays.

Every call checks whether this or another process has committed since. It raises if another index has replaced the one
that was opened, and in a forked process.
"""

import os
import threading

from mixencoder.errors import IndexDamagedError, IndexStateError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.folder import FolderStore, Generation
from mixencoder.index.fork_check import check_same_process
from mixencoder.index.manifest import Manifest
from mixencoder.index.memory import MemoryStore
from mixencoder.index.view import Listing, Snapshot


class NewestCommit:
    """The newest commit of a store; safe to use from several threads.

    Raises (all methods):
        IndexStateError: it is closed, there is no index, or this is a forked process.
        IndexMismatchError: another index, with other fingerprint, schema or settings, has replaced the opened one.
        IndexDamagedError: the pointer or the catalogue is damaged.
        IndexStorageError: they cannot be read.
    """

    def __init__(self, store: FolderStore | MemoryStore) -> None:
        self._store, self._process = store, os.getpid()
        self._mutex = threading.RLock()
        self._closed = False
        self._manifest: Manifest | None = None
        # the commit that was read last, and what was read of it; guarded by the mutex
        self._commit: tuple[Catalogue, tuple[int, int]] | None = None
        self._listing: Listing | None = None
        self._snapshot: Snapshot | None = None

    def store(self) -> FolderStore | MemoryStore:
        """Return where the index is."""
        # before taking the mutex, which a thread of the parent may have held when this process was forked
        check_same_process(self._store.name, self._process)
        if self._closed:
            raise IndexStateError("the index is closed; open it again")
        return self._store

    def generation(self) -> Generation:
        """Return the current generation."""
        store = self.store()
        with self._mutex:
            while True:
                try:
                    generation = store.current()
                    break
                except FileNotFoundError:
                    # a compaction deleted it while it was being opened
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
        """Return the current generation and the documents of its newest commit."""
        self.store()
        with self._mutex:
            generation = self.generation()
            version = generation.catalogue.version()
            if self._listing is None or self._commit != (generation.catalogue, version):
                self._listing = Listing(generation.catalogue, generation.catalogue.row_map())
                self._commit, self._snapshot = (generation.catalogue, version), None
            return generation, self._listing

    def snapshot(self) -> Snapshot:
        """Return these documents with their arrays; the same object as long as nothing is committed.

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
                    # unless a compaction has deleted the files meanwhile
                    if self.generation() is generation:
                        raise

    def close(self) -> None:
        """Close the files; does nothing in a forked process."""
        if os.getpid() != self._process:
            # the files are the parent's, and a thread of it may hold the mutex
            return
        with self._mutex:
            self._closed = True
            self._commit = self._listing = self._snapshot = None
            self._store = MemoryStore()
