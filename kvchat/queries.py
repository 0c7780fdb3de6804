"""The store's longer queries. Every walk through the tree of messages is one recursive query.

UNION, not UNION ALL, throughout: then even a damaged tree that runs in a circle comes to an end. CROSS JOIN keeps
SQLite to the written order: from the few rows of the walk to the indexed table.
"""

from __future__ import annotations

INFOS = """
WITH RECURSIVE chosen AS (SELECT * FROM sessions WHERE {where}),
walk(session_id, id) AS (
    SELECT id, tip FROM chosen WHERE tip IS NOT NULL
    UNION SELECT session_id, parent FROM walk CROSS JOIN messages USING (id) WHERE parent IS NOT NULL),
touched AS (
    SELECT DISTINCT session_id, segment_id FROM walk CROSS JOIN segment_messages ON message_id = walk.id),
stored AS (
    SELECT session_id, sum(nbytes) AS nbytes
    FROM touched CROSS JOIN segments ON segments.id = segment_id GROUP BY session_id),
opening AS (
    SELECT session_id, substr(content, 1, 200) AS title
    FROM walk CROSS JOIN messages USING (id) WHERE turn = 1 AND role = 'user')
SELECT chosen.*, opening.title, tip.turn AS num_turns, tip.end_token AS num_tokens, stored.nbytes
FROM chosen LEFT JOIN messages tip ON tip.id = chosen.tip
LEFT JOIN opening ON opening.session_id = chosen.id LEFT JOIN stored ON stored.session_id = chosen.id
ORDER BY chosen.updated DESC, chosen.id DESC
"""
PATH = """
WITH RECURSIVE path(id) AS (
    SELECT :tip UNION SELECT parent FROM path CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
SELECT messages.* FROM path CROSS JOIN messages USING (id) ORDER BY depth
"""
# What any session still reaches; NULL must stay out, or NOT IN would hold for nothing.
REACHABLE = """
WITH RECURSIVE reachable(id) AS (
    SELECT tip FROM sessions WHERE tip IS NOT NULL UNION SELECT tip FROM branches
    UNION SELECT parent FROM reachable CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
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
SEARCH = """
WITH RECURSIVE hits AS (
    SELECT rowid AS number, rank, snippet(messages_fts, 0, '[', ']', '…', 12) AS snippet
    FROM messages_fts WHERE messages_fts MATCH :match ORDER BY rank LIMIT :limit),
walk(session_id, current, id) AS (
    SELECT id, 1, tip FROM sessions WHERE tip IS NOT NULL
    UNION SELECT session_id, 0, tip FROM branches
    UNION SELECT session_id, current, parent FROM walk CROSS JOIN messages USING (id) WHERE parent IS NOT NULL)
SELECT name, CASE WHEN max(current) THEN turn END AS turn, role, snippet
FROM hits CROSS JOIN messages USING (number) JOIN walk ON walk.id = messages.id
JOIN sessions ON sessions.id = session_id
GROUP BY number, session_id ORDER BY rank, sessions.updated DESC, sessions.id DESC LIMIT :limit
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
SELECT segment_id, ordinal, path.key AS place, kind, end_token,
    (SELECT count(*) FROM segment_messages AS all_of WHERE all_of.segment_id = segments.id) AS num_messages
FROM json_each(:ids) AS path CROSS JOIN segment_messages ON message_id = path.value
CROSS JOIN segments ON segments.id = segment_id
WHERE fingerprint = :fingerprint ORDER BY segment_id, ordinal
"""
SEGMENTS = """
SELECT segments.*, bases.body AS basis_body FROM segments LEFT JOIN bases ON bases.id = basis
WHERE segments.id IN (SELECT value FROM json_each(:ids))
"""
TOTALS = """
SELECT (SELECT count(*) FROM sessions) AS sessions,
    (SELECT count(*) FROM messages) AS messages,
    (SELECT count(*) FROM segments) AS segments,
    (SELECT count(*) FROM frames) AS frames,
    (SELECT total(nbytes) FROM segments) AS kv_bytes,
    (SELECT total(length(CAST(content AS BLOB)) + length(token_ids)) FROM messages) AS text_bytes,
    (SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size) AS free_bytes
"""
