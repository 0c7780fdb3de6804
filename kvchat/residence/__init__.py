"""The KV of one conversation: what of it is in memory, and how it gets there.

residence.py   restored, computed, sealed          restoring.py   brought back from the store
catalogue.py   all sealed segments, in memory or not
room.py        how much of each memory holds       holding.py     held to that, and what gives way
reach.py       more tokens than positions, and what a question brings back
tiers.py       which rank chunks are in memory     host.py        frames in host memory
loading.py     those that come from the store      excerpts.py    some tokens of several segments at once
sealing.py     one segment: scored, ranked, encoded   saving.py   named and put into the store
"""
