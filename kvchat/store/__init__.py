"""The SQLite store: text, token ids and saved KV of all sessions.

store.py       what a caller has: sessions, messages, the tree; joined of the parts below
records.py     what it gives and takes             schema.py, migrations.py   its tables, and how they came to be
kv.py          segments and their frames           limited.py   within a disk budget     shed.py   what gives way
aliases.py     segments with the frames of others  vectors.py   which messages a text concerns
notes.py       titles, tags, drafts, the answer in the making
queries.py, listing.py   its longer queries        readers.py   frames, read by several threads
checks.py      finds damage and mends it           salvage.py   damaged pages left behind
recrypt.py     encrypted in place, and back
"""
