"""The store's longer queries. Every walk through the tree of messages is one recursive query.

UNION, not UNION ALL, throughout: then even a damaged tree that runs in a circle comes to an end. CROSS JOIN keeps
SQLite to the written order: from the few rows of the walk to the indexed table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvchat.store.records import Row

# In thousandths, for SQLite divides integers to integers.
_STORED_TOKENS = "sum((segments.end_token - segments.start_token) * 1000 * stored_chunks / num_chunks) AS stored_tokens"
# Of a session, all but its draft, which may be long.
_OWN = """
sessions.id, name, model, fingerprint, sessions.tip, sessions.created, updated, settings, title, titled,
    (SELECT json_group_array(tag) FROM tags WHERE tags.session_id = sessions.id) AS tags,
    (SELECT count(*) FROM branches WHERE branches.session_id = sessions.id) AS num_branches
"""
_KV_BYTES = "(SELECT total(nbytes) FROM segments) + (SELECT total(length(body)) FROM bases)"

INFOS = """
WITH RECURSIVE chosen AS (SELECT {own} FROM sessions WHERE {where}),
walk(session_id, id) AS (
    SELECT id, tip FROM chosen WHERE tip IS NOT NULL
    UNION SELECT session_id, parent FROM walk CROSS JOIN messages USING (id) WHERE parent IS NOT NULL),
touched AS (
    SELECT DISTINCT session_id, segment_id FROM walk CROSS JOIN segment_messages ON message_id = walk.id),
stored AS (
    SELECT session_id, sum(nbytes) AS nbytes, {stored_tokens}
    FROM touched CROSS JOIN segments ON segments.id = segment_id GROUP BY session_id),
shared AS (
    SELECT session_id, sum(length(body)) AS nbytes FROM (
        SELECT DISTINCT session_id, basis FROM touched CROSS JOIN segments ON segments.id = segment_id)
    CROSS JOIN bases ON bases.id = basis GROUP BY session_id),
opening AS (
    SELECT session_id, substr(content, 1, 200) AS text
    FROM walk CROSS JOIN messages USING (id) WHERE turn = 1 AND role = 'user')
SELECT chosen.*, opening.text AS opening, tip.turn AS num_turns, tip.end_token AS num_tokens, stored_tokens,
    stored.nbytes + ifnull(shared.nbytes, 0) AS nbytes
FROM chosen LEFT JOIN messages tip ON tip.id = chosen.tip
LEFT JOIN opening ON opening.session_id = chosen.id LEFT JOIN stored ON stored.session_id = chosen.id
LEFT JOIN shared ON shared.session_id = chosen.id
ORDER BY chosen.updated DESC, chosen.id DESC
""".replace("{stored_tokens}", _STORED_TOKENS).replace("{own}", _OWN)
# Those of `listing` are read from indexes, or read a few rows.
TIPS = f"""
SELECT {_OWN}, tip.number, tip.turn AS num_turns, tip.end_token AS num_tokens
FROM sessions LEFT JOIN messages tip ON tip.id = sessions.tip ORDER BY sessions.updated DESC, sessions.id DESC
"""
EDGES = """
SELECT child.number AS child, parent.number AS parent
FROM messages AS child INDEXED BY messages_parent CROSS JOIN messages AS parent ON parent.id = child.parent
"""
FIRSTS = f"""
SELECT messages.number, sum(nbytes) AS nbytes, {_STORED_TOKENS}
FROM segments CROSS JOIN segment_messages ON segment_id = segments.id AND ordinal = 0
CROSS JOIN messages ON messages.id = message_id GROUP BY 1
"""
BASES = """
SELECT DISTINCT messages.number, bases.id, length(body) AS nbytes
FROM bases CROSS JOIN segments ON basis = bases.id
CROSS JOIN segment_messages ON segment_id = segments.id AND ordinal = 0 CROSS JOIN messages ON messages.id = message_id
"""
OPENINGS = """
SELECT number, substr(content, 1, 200) AS opening FROM json_each(:numbers) CROSS JOIN messages ON number = value
WHERE turn = 1 AND role = 'user'
"""
PATH = """
WITH RECURSIVE path(id) AS (
    SELECT :tip UNION SELECT parent FROM path CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
SELECT messages.* FROM path CROSS JOIN messages USING (id) ORDER BY depth
"""
# All that one session reaches.
TREE = """
WITH RECURSIVE own(id) AS (
    SELECT tip FROM sessions WHERE sessions.id = :session AND tip IS NOT NULL
    UNION SELECT tip FROM branches WHERE session_id = :session
    UNION SELECT parent FROM own CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
SELECT messages.* FROM own CROSS JOIN messages USING (id) ORDER BY depth, number
"""
# What any session still reaches; NULL must stay out, or NOT IN would hold for nothing.
REACHABLE = """
WITH RECURSIVE reachable(id) AS (
    SELECT tip FROM sessions WHERE tip IS NOT NULL UNION SELECT tip FROM branches
    UNION SELECT parent FROM reachable CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
"""
# Bases that may have been fitted to any of a session's text, also to that of a segment which was given up since.
BASES_OF = """
WITH RECURSIVE own(id) AS (
    SELECT tip FROM sessions WHERE sessions.id = :session AND tip IS NOT NULL
    UNION SELECT tip FROM branches WHERE session_id = :session
    UNION SELECT parent FROM own CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
SELECT DISTINCT basis FROM own CROSS JOIN segment_messages ON message_id = own.id
CROSS JOIN segments ON segments.id = segment_id WHERE basis IS NOT NULL
"""
# Only leaves are kept: an older tip on the way to a younger one is reached through it.
PRUNE_BRANCHES = """
WITH RECURSIVE above(id) AS (
    SELECT parent FROM messages WHERE id IN (
        SELECT tip FROM branches WHERE session_id = :session UNION SELECT tip FROM sessions WHERE id = :session)
    UNION SELECT parent FROM above CROSS JOIN messages USING (id))
DELETE FROM branches WHERE session_id = :session AND (
    tip IN (SELECT id FROM above WHERE id IS NOT NULL)
    OR tip = (SELECT tip FROM sessions WHERE id = :session))
"""
# A hit stands between two bytes that no text has, so the snippet comes as bytes.
HITS = """
WITH hits AS (
    SELECT rowid AS number, rank,
        CAST(snippet(messages_fts, 0, CAST(x'FE' AS TEXT), CAST(x'FF' AS TEXT), '…', 12) AS BLOB) AS snippet
    FROM messages_fts WHERE messages_fts MATCH :match ORDER BY rank LIMIT :limit)
SELECT number, turn, role, rank, snippet FROM hits CROSS JOIN messages USING (number)
"""
NUMBERS = "SELECT number, id FROM messages WHERE id IN (SELECT value FROM json_each(:ids))"
WITH_WORD = "SELECT rowid FROM messages_fts WHERE messages_fts MATCH :match"
# From messages down to the ends of paths, at most so many steps; the first row says how many there were.
HOLDERS = """
WITH RECURSIVE walk(number, id) AS (
    SELECT number, messages.id FROM json_each(:numbers) CROSS JOIN messages ON number = value
    UNION SELECT walk.number, messages.id FROM walk CROSS JOIN messages ON parent = walk.id LIMIT :most)
SELECT count(*) AS number, NULL AS session_id, NULL AS current FROM walk
UNION ALL SELECT number, sessions.id, 1 FROM walk CROSS JOIN sessions ON tip = walk.id
UNION ALL SELECT number, session_id, 0 FROM walk CROSS JOIN branches ON tip = walk.id
"""
# A waiting turn's exact KV goes when a sealed segment holds it, unless another branch or session leaves the path there.
DROP_REPLACED = """
DELETE FROM segments WHERE kind = 'open' AND id IN (SELECT value FROM json_each(:ids)) AND NOT EXISTS (
    SELECT 1 FROM segment_messages AS held WHERE held.segment_id = segments.id AND (
        EXISTS (SELECT 1 FROM messages WHERE parent = held.message_id
            AND id NOT IN (SELECT value FROM json_each(:messages))
            AND held.message_id <> (SELECT value FROM json_each(:messages) ORDER BY key DESC LIMIT 1))
        OR (held.message_id <> (SELECT value FROM json_each(:messages) ORDER BY key DESC LIMIT 1) AND (
            EXISTS (SELECT 1 FROM sessions WHERE tip = held.message_id)
            OR EXISTS (SELECT 1 FROM branches WHERE tip = held.message_id)))))
"""
CANDIDATES = """
SELECT segment_id, ordinal, path.key AS place, kind, end_token, from_file,
    (SELECT count(*) FROM segment_messages AS all_of WHERE all_of.segment_id = segments.id) AS num_messages
FROM json_each(:ids) AS path CROSS JOIN segment_messages ON message_id = path.value
CROSS JOIN segments ON segments.id = segment_id
WHERE fingerprint = :fingerprint ORDER BY segment_id, ordinal
"""
SEGMENTS = """
SELECT segments.*, source.header AS source_header, bases.body AS basis_body
FROM segments LEFT JOIN segments AS source ON source.id = segments.frames_of
LEFT JOIN bases ON bases.id = ifnull(source.basis, segments.basis)
WHERE segments.id IN (SELECT value FROM json_each(:ids))
"""
TOTALS = f"""
SELECT (SELECT count(*) FROM sessions) AS sessions,
    (SELECT count(*) FROM messages) AS messages,
    (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM frames) AS frames,
    {_KV_BYTES} AS kv_bytes,
    (SELECT total(length(CAST(content AS BLOB)) + length(token_ids)) FROM messages) AS text_bytes,
    (SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size) AS free_bytes
"""
# Where the paths of all sessions end, and what lies on them: from these and EDGES follows who reaches which segment.
ENDS = """
SELECT sessions.id AS session_id, updated, number, 1 AS current
FROM sessions CROSS JOIN messages ON messages.id = tip
UNION ALL SELECT session_id, updated, number, 0 FROM branches CROSS JOIN sessions ON sessions.id = session_id
    CROSS JOIN messages ON messages.id = branches.tip
"""
# A segment that others have their frames from stands there once more for each of them.
HOLDINGS = """
SELECT ifnull(source.id, segments.id) AS id, ifnull(source.start_token, segments.start_token) AS start_token,
    segments.kind, segments.codec, segments.stored_chunks, messages.number
FROM segments LEFT JOIN segments AS source ON source.id = segments.frames_of
LEFT JOIN segment_messages ON segment_id = segments.id AND ordinal = 0
LEFT JOIN messages ON messages.id = message_id ORDER BY 2, 1
"""
FRAME_SIZES = "SELECT segment_id, chunk, nbytes FROM frames ORDER BY segment_id, chunk"
# From the first messages of segments down to the ends of paths: whoever holds the first message may use a part.
REACHING = """
WITH RECURSIVE below(id) AS (
    SELECT message_id FROM json_each(:ids) CROSS JOIN segment_messages ON segment_id = value AND ordinal = 0
    UNION SELECT message_id FROM json_each(:ids) CROSS JOIN segments ON frames_of = value
        CROSS JOIN segment_messages ON segment_id = segments.id AND ordinal = 0
    UNION SELECT messages.id FROM below CROSS JOIN messages ON parent = below.id)
SELECT sessions.id AS session_id FROM below CROSS JOIN sessions ON tip = below.id
UNION SELECT session_id FROM below CROSS JOIN branches ON tip = below.id
"""
THINNED = """
UPDATE segments SET stored_chunks = :chunks,
    nbytes = length(header) + (SELECT total(nbytes) FROM frames WHERE segment_id = :id)
WHERE id = :id AND stored_chunks > :chunks
"""
# Who has the frames of a segment that is replaced has those of its successor.
REPOINT = """
UPDATE segments SET (frames_of, codec, num_chunks, num_groups, stored_chunks) = (?, ?, ?, ?, ?) WHERE frames_of = ?
"""
ALIAS = """
INSERT OR IGNORE INTO segments(id, fingerprint, start_token, end_token, kind, codec, scorer, num_chunks, num_groups,
    stored_chunks, nbytes, created, header, frames_of, key_offset, onward)
SELECT :id, fingerprint, :start, :start + end_token - start_token, kind, codec, scorer, num_chunks, num_groups,
    stored_chunks, 0, :created, x'', id, :offset, :onward
FROM segments WHERE id = :source
"""
KV_BYTES = f"SELECT {_KV_BYTES} AS nbytes"
# Rows that a segment left behind.
ORPHANS = "DELETE FROM {table} WHERE segment_id NOT IN (SELECT id FROM segments)"
PAGES = """
SELECT (page_count - freelist_count) * page_size AS in_use, freelist_count * page_size AS reusable
FROM pragma_page_count, pragma_freelist_count, pragma_page_size
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment of which the first `count` messages stand on a path, from index `place` on."""

    id: str
    place: int
    count: int
    order: tuple[int, int, bool, bool, int, str]


def candidate_of(rows: Sequence[Row]) -> Candidate | None:
    """From a segment's messages on the path, in the segment's order; None if it is not to be used there."""
    place = rows[0]["place"]
    count = sum(row["ordinal"] == i and row["place"] == place + i for i, row in enumerate(rows))
    beyond = rows[0]["num_messages"] > count
    if count == 0 or (beyond and rows[0]["from_file"]):
        return None
    segment_id, kind, end = rows[0]["segment_id"], rows[0]["kind"], rows[0]["end_token"]
    return Candidate(segment_id, place, count, (place, -count, beyond, kind != "sealed", end, segment_id))
