"""What a message concerns that is still being written is read from the disk meanwhile."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence

from kvchat.residence.host import HostedStore
from kvchat.session import Conversation


def foresee(store: HostedStore, conversations: Sequence[Conversation]) -> None:
    """Have host memory read the segments that would come back if the drafts of these sessions were sent."""
    drafts = [(one, store.draft(one.info.id)) for one in conversations]
    found = [one.residence.foreseen(one.path, draft) for one, draft in drafts if draft.strip()]
    if any(found):
        store.read_ahead(ChainMap(*found))
