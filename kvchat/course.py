"""What was said in a conversation: its path through the tree of messages, in the store before anything else has it.

What a path leaves stays in the store as a branch, and at no moment is the session without its old path or the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvchat.branching import questions
from kvchat.config import Config
from kvchat.drafting import Drafted, chained, drafts
from kvchat.engine import Engine
from kvchat.errors import InputError, SessionChanged
from kvchat.events import Notice
from kvchat.residence.residence import Residence, Steps
from kvchat.store.store import Message, SessionInfo, Store


class Course:
    """The part of a `Conversation` that changes its path, and computes nothing; arguments as for that."""

    def __init__(self, info: SessionInfo, store: Store, engine: Engine, residence: Residence) -> None:
        self.info = info
        self.store = store
        self.engine = engine
        self.residence = residence
        self.path: list[Message] = store.path(info.tip)
        self.seal_s = 0.0
        self._template = engine.model.template

    @property
    def num_tokens(self) -> int:
        """Tokens of the path."""
        return sum(len(message.token_ids) for message in self.path)

    def begin(self, system: str | None) -> None:
        """Write the opening of a new conversation."""
        piece = self._template.system(system)
        if piece.ids:
            self._commit([("system", system or "", piece)])

    def take(self, messages: Sequence[Mapping[str, str]], after: int | None = None) -> None:
        """Commit messages after the path, text and ids; their KV is not computed yet.

        With `after` they follow that many messages of it, and what they take the place of stays as a branch.

        Raises:
            InputError: an unknown role, a system message that is not the first, a blank message.
            CapacityError: the window has no room for all; nothing is saved then.
        """
        found = drafts(messages, self.path[:after], self.residence)
        if after is None or after >= len(self.path):
            self._commit(found)
        else:
            self._say_anew(after, found)

    def rewind(self, index: int) -> None:
        """Go back to just before message `index` of the path; the branch left stays in the store."""
        self.save()  # what is written later must not be of messages that are gone
        self.store.set_tip(self.info.id, self.path[index - 1].id if index else None)
        self.path = self.path[:index]
        self.residence.crop(self.path)

    def user_index(self, turns: int) -> int:
        """Index in the path of the user's message `turns` turns ago; 1 = the newest.

        Raises:
            InputError: there are not so many turns.
        """
        asked = questions(self.path)
        if not 1 <= turns <= len(asked):
            raise InputError(f"this session has {len(asked)} turns; {turns} cannot be taken back")
        return asked[-turns]

    def configure(self, settings: Mapping[str, Any], base: Config) -> None:
        """Give the session settings of its own on top of `base`; None takes one away. Old segments stay as ranked."""
        own = {key: value for key, value in {**self.info.settings, **settings}.items() if value is not None}
        self.residence.configure(base.for_session(own, settings), self.path)
        self.store.set_settings(self.info.id, own)
        self.info = replace(self.info, settings=own)

    def rebuild(self, retokenise: bool) -> None:
        """Drop the KV of the path, to be computed again; `retokenise` makes new ids from the texts, as a new branch."""
        said = [{"role": message.role, "content": message.content} for message in self.path]
        opening = bool(said) and said[0]["role"] == "system" and not said[0]["content"]
        found = drafts(said[opening:], [], self.residence) if retokenise else []
        while cover := self.store.cover([message.id for message in self.path], self.residence.fingerprint):
            for record, _ in cover:
                self.store.drop_segment(record.id)
        if found:
            self._say_anew(0, found)

    def save(self) -> float:
        """Write all that is not in the store yet; seconds that sealing the last answer's turn took."""
        self.unseen(self.residence.save())
        return self.seal_s

    def unseen(self, steps: Steps) -> None:
        """Take steps that nobody follows; what they say is told with the next turn."""
        self.residence.notices += [event for event in steps if isinstance(event, Notice)]

    def _commit(self, found: Sequence[Drafted], **about: Any) -> None:
        """Append messages to the path, in the store first. Raises SessionChanged."""
        tip = self.path[-1].id if self.path else None
        messages = chained(found, tip, **about)
        try:
            self.store.add_messages(self.info.id, messages, tip)
        except SessionChanged as error:
            if messages[-1].role != "assistant" or tip is None:
                raise
            self.store.add_branch(self.info.id, messages)
            raise SessionChanged(f"{error}; this answer is kept beside it, where `kvchat search` finds it") from None
        self.path += messages

    def _say_anew(self, index: int, found: Sequence[Drafted]) -> None:
        """Put messages in place of those of the path from `index` on."""
        self.save()  # what is written later must not be of messages that are gone
        kept = self.path[:index]
        messages = chained(found, kept[-1].id if kept else None)
        self.store.add_branch(self.info.id, messages)
        self.store.set_tip(self.info.id, messages[-1].id)
        self.path = [*kept, *messages]
        self.residence.crop(kept)
