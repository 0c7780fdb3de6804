"""What the chat screen is made of. Widgets show values and post messages; none of them knows the engine.

Text of the user, the model and the store is shown as it is: never as Textual markup, and without control characters.
"""

from __future__ import annotations

from kvchat.tui.answer import Answer
from kvchat.tui.items import Question
from kvchat.tui.plain_text import Note, Plain
from kvchat.tui.prompt import Prompt
from kvchat.tui.session_list import SessionList, age
from kvchat.tui.transcript import Transcript

__all__ = ["Answer", "Note", "Plain", "Prompt", "Question", "SessionList", "Transcript", "age"]
