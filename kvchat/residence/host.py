"""Frames of segments in host memory, as the store has them, so that what comes back need not wait for the disk.

Which frames stay is decided by what they are worth (`utility.py`), not by when they were read last. Pinning them would
not pay: what goes to a GPU is what frames decode to, and that lies in pinned buffers already (`cache/assembly.py`,
`cache/pack.py`). A frame is hashed once: by whoever decodes it when it has just been read (if damaged, its segment is
dropped, here too), and here when it was read ahead, or is served from here for the first time.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from operator import itemgetter
from threading import Lock

from kvchat.bandwidths import Bandwidths
from kvchat.codecs.frame import Sound, check
from kvchat.errors import CodecError, StoreError
from kvchat.pool import submit
from kvchat.residence.loading import Fetch
from kvchat.store.shed import Sacrifice
from kvchat.store.store import Store

Key = tuple[str, int, int]
"""Segment, chunk and group."""
Read = Callable[[], bytes]
Worth = Callable[[str, int], float]
"""What a byte of a segment's chunk in host memory is worth; at most 0: nothing."""
FOUND = """
SELECT segments.id, ifnull(source.nbytes, segments.nbytes) AS nbytes,
    ifnull(source.created, segments.created) AS created
FROM segments LEFT JOIN segments AS source ON source.id = segments.frames_of
WHERE segments.id IN (SELECT value FROM json_each(:ids))
"""


class HostCache:
    """Wraps a `Fetch`, and is one (`fetch`), to be called from one thread; what it gives may be read in any.

    Args:
        below: where frames come from that are not here.
        pool: threads that read ahead.
        cap: most bytes of frames.
        worth: may be called from any thread.
        version: of a segment, which is another when it was written anew under the same name.
        bandwidths: told what reading takes.
    """

    def __init__(
        self,
        below: Fetch,
        pool: Executor,
        cap: int,
        worth: Worth,
        version: Callable[[str], object] = lambda _: None,
        bandwidths: Bandwidths | None = None,
    ) -> None:
        self.worth, self.cap = worth, cap
        self._below, self._pool, self._version = below, pool, version
        self._bandwidths = bandwidths or Bandwidths()
        self._lock = Lock()
        self._frames: dict[Key, bytes] = {}
        self._versions: dict[str, object] = {}
        self._groups: dict[str, int] = {}
        """Of segments that were read to the end: frames of a chunk."""
        self._order: list[tuple[float, Key]] = []
        """A heap with what each frame is worth, the least first; with some that are gone."""
        self._nbytes = 0
        self._ahead: list[Future[None]] = []
        self._counts = {"hits": 0, "misses": 0, "hit_bytes": 0, "miss_bytes": 0}

    def fetch(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Read]]:
        """As `Fetch`; whoever reads waits for no frame that is only read ahead."""
        self._hurry()
        there = self._there(segment_id, chunks)
        missing = [chunk for chunk in sorted(set(chunks)) if (chunk, 0) not in there]
        hits: Iterator[tuple[int, int, Read]] = (
            (chunk, group, partial(self._hit, (segment_id, chunk, group), blob))
            for (chunk, group), blob in sorted(there.items())
        )
        yield from heapq.merge(hits, self._misses(segment_id, missing), key=itemgetter(0, 1))

    def prefetch(self, leading: Mapping[str, int]) -> None:
        """Have so many leading chunks of segments read by the pool, those that are worth it and not here; no waiting.

        What was to be read ahead before, and is not yet, no longer is.
        """
        self._hurry()
        for segment_id, count in leading.items():
            with suppress(CodecError, StoreError):  # who needs it finds out
                there = self._there(segment_id, range(count))
                missing = [
                    chunk for chunk in range(count) if (chunk, 0) not in there and self._would_stay(segment_id, chunk)
                ]
                for chunk, group, read in self._learning(segment_id, missing):
                    work = partial(self._read_ahead, (segment_id, chunk, group), self._versions[segment_id], read)
                    self._ahead.append(submit(self._pool, work))

    def rate(self) -> None:
        """Find out anew what frames are worth."""
        with self._lock:
            keys = [*self._frames]
        rated = [(self.worth(*key[:2]), key) for key in keys]
        heapq.heapify(rated)
        with self._lock:
            self._order = rated

    def forget(self, segment_id: str) -> None:
        """Drop all of a segment."""
        with self._lock:
            for key in [key for key in self._frames if key[0] == segment_id]:
                self._nbytes -= len(self._frames.pop(key))
            # What is read again stands there anew: in order twice, its bytes would be counted twice when it goes.
            self._order = [one for one in self._order if one[1][0] != segment_id]
            heapq.heapify(self._order)
            self._groups.pop(segment_id, None)
            self._versions.pop(segment_id, None)

    def forget_all_but(self, stored: Collection[str]) -> None:
        """Drop what the store has no more; nobody asks for it, so that nothing else would find out."""
        for segment_id in self.chunks().keys() - {*stored}:
            self.forget(segment_id)

    def stats(self) -> dict[str, int]:
        """Frames served from here and from below, their bytes, and what is here."""
        with self._lock:
            return {**self._counts, "frames": len(self._frames), "nbytes": self._nbytes, "cap": self.cap}

    def chunks(self) -> dict[str, int]:
        """How many chunks of each segment have a frame here."""
        with self._lock:
            there = {(segment_id, chunk) for segment_id, chunk, _ in self._frames}
        return dict(Counter(segment_id for segment_id, _ in there))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _hurry(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead = []

    def _there(self, segment_id: str, chunks: Iterable[int]) -> dict[tuple[int, int], bytes]:
        """Frames by chunk and group of those asked chunks that are here whole."""
        version = self._version(segment_id)
        if self._versions.get(segment_id, version) != version:
            self.forget(segment_id)
        with self._lock:
            self._versions[segment_id] = version
            groups, found = self._groups.get(segment_id, 0), dict[tuple[int, int], bytes]()
            for chunk in set(chunks):
                blobs = [self._frames.get((segment_id, chunk, group)) for group in range(groups)]
                found |= {(chunk, group): blob for group, blob in enumerate(blobs) if blob is not None and all(blobs)}
        return found

    def _hit(self, key: Key, blob: bytes) -> bytes:
        """The frame, checked. Raises what `check` raises."""
        check(blob)
        sound = blob if isinstance(blob, Sound) else Sound(blob)
        with self._lock:
            self._counts["hits"] += 1
            self._counts["hit_bytes"] += len(blob)
            if self._frames.get(key) is blob:
                self._frames[key] = sound
        return sound

    def _misses(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Read]]:
        for chunk, group, read in self._learning(segment_id, chunks):
            yield chunk, group, partial(self._miss, (segment_id, chunk, group), self._versions[segment_id], read)

    def _learning(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Read]]:
        """What is below, and, when all was seen, how many groups there are."""
        last = -1
        for chunk, group, read in self._below(segment_id, chunks) if chunks else ():
            last = max(last, group)
            yield chunk, group, read
        if last >= 0:
            self._groups[segment_id] = last + 1

    def _miss(self, key: Key, version: object, read: Read) -> bytes:
        begun = time.perf_counter()
        blob = read()
        self._bandwidths.add_read(len(blob), time.perf_counter() - begun)
        with self._lock:
            self._counts["misses"] += 1
            self._counts["miss_bytes"] += len(blob)
        self._admit(key, version, blob)
        return blob

    def _read_ahead(self, key: Key, version: object, read: Read) -> None:
        with suppress(CodecError, StoreError):
            begun = time.perf_counter()
            blob = read()
            self._bandwidths.add_read(len(blob), time.perf_counter() - begun)
            check(blob)
            self._admit(key, version, Sound(blob))

    def _would_stay(self, segment_id: str, chunk: int) -> bool:
        """Whether there is room for a chunk, or what is worth less."""
        worth = self.worth(segment_id, chunk)
        with self._lock:
            least = min((rated for rated, key in self._order[:1] if key in self._frames), default=0.0)
            return worth > 0 and (self._nbytes < self.cap or worth > least)

    def _admit(self, key: Key, version: object, blob: bytes) -> None:
        """Keep a frame if what must go for it is worth less, each byte of it."""
        worth = self.worth(*key[:2])
        if worth <= 0 or len(blob) > self.cap:
            return
        with self._lock:
            if key in self._frames or self._versions.get(key[0]) != version:
                return
            going, freed = list[tuple[float, Key]](), self.cap - self._nbytes
            while freed < len(blob) and self._order and self._order[0][0] < worth:
                going.append(heapq.heappop(self._order))
                freed += len(self._frames.get(going[-1][1], b""))
            if freed < len(blob):
                for one in going:
                    heapq.heappush(self._order, one)
                return
            for _, gone in going:
                self._nbytes -= len(self._frames.pop(gone, b""))
            self._frames[key] = blob
            self._nbytes += len(blob)
            heapq.heappush(self._order, (worth, key))


class HostedStore(Store):
    """A store whose frames are read through a `HostCache`, if it is given one (`serve_from`)."""

    _host: HostCache | None = None

    def serve_from(
        self, pool: Executor, cap: int, worth: Worth, bandwidths: Bandwidths | None = None
    ) -> HostCache | None:
        """Keep up to so many bytes of frames in host memory from now on; 0: none."""
        below = super().readings
        self._host = HostCache(below, pool, cap, worth, self._version, bandwidths) if cap else None
        return self._host

    def readings(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Read]]:
        """As of `KVStore`."""
        return self._host.fetch(segment_id, chunks) if self._host else super().readings(segment_id, chunks)

    def read_ahead(self, leading: Mapping[str, int]) -> None:
        """`HostCache.prefetch`; nothing of an encrypted store, whose frames only this thread reads."""
        if self._host and self._key is None:
            self._host.prefetch(leading)

    def drop_segment(self, segment_id: str) -> None:
        """As of `KVStore`."""
        if self._host:
            self._host.forget(segment_id)
        super().drop_segment(segment_id)

    def thin(self, segment_id: str, chunks: int) -> None:
        """Give up all but so many leading chunks of a segment, at least one."""
        assert chunks > 0
        found = self.segment(segment_id)
        with self._write("NORMAL"):
            self._give(Sacrifice((found.frames_of if found and found.frames_of else segment_id,), chunks))

    def frame_bytes(self, ids: Sequence[str]) -> dict[str, int]:
        """Bytes of each segment's frames and header; those that are gone are left out."""
        return {row["id"]: row["nbytes"] for row in self._rows(FOUND, ids=json.dumps(list(ids)))}

    def _version(self, segment_id: str) -> object:
        with self._damage_of(segment_id):
            return [row["created"] for row in self._rows(FOUND, ids=json.dumps([segment_id]))]
