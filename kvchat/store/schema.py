"""The tables of the store, as each migration makes them: append-only, what was released is never edited."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

-- number: the search index refers to it, and VACUUM would renumber an implicit rowid.
-- depth, turn, start_token, end_token follow from the parent, which never changes.
CREATE TABLE messages (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    parent TEXT REFERENCES messages(id),
    role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
    depth INTEGER NOT NULL,
    turn INTEGER NOT NULL,
    start_token INTEGER NOT NULL,
    end_token INTEGER NOT NULL,
    span_start INTEGER NOT NULL,
    span_end INTEGER NOT NULL,
    finish_reason TEXT,
    usage TEXT,
    timings TEXT,
    created TEXT NOT NULL,
    content TEXT NOT NULL,
    token_ids BLOB NOT NULL CHECK (length(token_ids) % 4 = 0)
);
CREATE INDEX messages_parent ON messages(parent);

-- AUTOINCREMENT: a process that still holds a deleted session must not write into a later one.
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    tip TEXT REFERENCES messages(id),
    created TEXT NOT NULL,
    updated TEXT NOT NULL
);
CREATE INDEX sessions_tip ON sessions(tip);

CREATE TABLE branches (
    session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    tip TEXT NOT NULL REFERENCES messages(id),
    created TEXT NOT NULL,
    PRIMARY KEY (session_id, tip)
);
CREATE INDEX branches_tip ON branches(tip);

CREATE TABLE segments (
    id TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    start_token INTEGER NOT NULL,
    end_token INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('sealed', 'open')),
    codec TEXT NOT NULL,
    scorer TEXT NOT NULL,
    num_chunks INTEGER NOT NULL,
    num_groups INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    seal_s REAL,
    created TEXT NOT NULL,
    header BLOB NOT NULL
);

CREATE TABLE segment_messages (
    segment_id TEXT NOT NULL REFERENCES segments(id) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    message_id TEXT NOT NULL REFERENCES messages(id),
    PRIMARY KEY (segment_id, ordinal)
) WITHOUT ROWID;
CREATE INDEX segment_messages_message ON segment_messages(message_id);

CREATE TABLE frames (
    segment_id TEXT NOT NULL REFERENCES segments(id) ON DELETE CASCADE,
    chunk INTEGER NOT NULL,
    grp INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX frames_place ON frames(segment_id, chunk, grp);
"""
PARTIAL = """
-- What archived segments of one conversation share; it goes with the last of them.
CREATE TABLE bases (id TEXT PRIMARY KEY, body BLOB NOT NULL);
ALTER TABLE segments ADD COLUMN basis TEXT REFERENCES bases(id);
CREATE INDEX segments_basis ON segments(basis);
CREATE TRIGGER segments_leave_basis AFTER DELETE ON segments WHEN old.basis IS NOT NULL BEGIN
    DELETE FROM bases WHERE id = old.basis AND NOT EXISTS (SELECT 1 FROM segments WHERE basis = old.basis);
END;

-- Leading chunks that are stored; the rest was given up for room.
ALTER TABLE segments ADD COLUMN stored_chunks INTEGER NOT NULL DEFAULT 0;
UPDATE segments SET stored_chunks = num_chunks;

-- Taken from a portable file: nobody here has computed it, and it serves no path but those that hold all of it.
ALTER TABLE segments ADD COLUMN from_file INTEGER NOT NULL DEFAULT 0;

-- What a session answered greedily once, to tell whether it still does: `state` stands for model, path and held KV.
CREATE TABLE probes (
    session_id INTEGER PRIMARY KEY REFERENCES sessions(id) ON DELETE CASCADE,
    state TEXT NOT NULL,
    token_ids BLOB NOT NULL,
    created TEXT NOT NULL
);
"""
ALIASES = """
-- A segment that has the frames and the header of another one: the same tokens, said in another conversation. It goes
-- with that one. Only its place is its own: by how much positions are smaller, those of its keys and those behind it.
ALTER TABLE segments ADD COLUMN frames_of TEXT REFERENCES segments(id) ON DELETE CASCADE;
ALTER TABLE segments ADD COLUMN key_offset INTEGER NOT NULL DEFAULT 0;
ALTER TABLE segments ADD COLUMN onward INTEGER;
CREATE INDEX segments_frames_of ON segments(frames_of) WHERE frames_of IS NOT NULL;
CREATE TRIGGER segments_lead_aliases AFTER UPDATE OF stored_chunks ON segments WHEN new.frames_of IS NULL BEGIN
    UPDATE segments SET stored_chunks = new.stored_chunks WHERE frames_of = new.id;
END;
"""
VECTORS = """
-- What messages are about, float16 vectors one after another; whose, says `embedder`.
CREATE TABLE vectors (
    message_id TEXT NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
    embedder TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (message_id, embedder)
);
"""
NOTES = """
-- titled: whose the title is; '' if there is none. draft: what was typed and not sent. It may be long, and so it stands
-- last: what stands before it is read without it.
ALTER TABLE sessions ADD COLUMN title TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN titled TEXT NOT NULL DEFAULT '' CHECK (titled IN ('', 'model', 'user'));
ALTER TABLE sessions ADD COLUMN draft TEXT NOT NULL DEFAULT '';

CREATE TABLE tags (
    session_id INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    PRIMARY KEY (session_id, tag)
);

-- The tokens of an answer that is not at its end yet, and the message that it follows. A few rows: they need no index.
CREATE TABLE unfinished (
    session_id INTEGER PRIMARY KEY REFERENCES sessions(id) ON DELETE CASCADE,
    parent TEXT NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
    token_ids BLOB NOT NULL CHECK (length(token_ids) % 4 = 0)
);
"""
