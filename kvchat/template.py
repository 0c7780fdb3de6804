"""A model's chat template as pieces of token ids, derived once at load; the history is never rendered again.

Small conversations are rendered with sentinels for their contents and cut at the sentinels. What stands between them is

    prefix | first_open U user_close | generation_prompt A assistant_close | later_open U user_close | ...

with `system_open S system_close` in place of the prefix where a system text is given. Templates that rewrite earlier
replies (dropped reasoning) do no harm: a reply keeps the ids that it was generated with.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from tokenizers.decoders import DecodeStream

from kvchat.errors import InputError, ModelError

SYSTEM, USER, REPLY, AGAIN = "KvchatSystem", "KvchatUser", "KvchatReply", "KvchatAgain"
ROLES = {SYSTEM: "system", USER: "user", REPLY: "assistant", AGAIN: "user"}


class Piece(NamedTuple):
    """One message as it stands in the context: its ids, and the span [first, last) of them that is content."""

    ids: tuple[int, ...]
    content_span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The template's text around contents; `system_open` None = the template has no system role."""

    prefix: str
    system_open: str | None
    system_close: str
    first_open: str
    later_open: str
    user_close: str
    generation_prompt: str
    reply_lead: str
    """Spaces before a reply, which the model itself generates after the generation prompt."""
    assistant_close: str


class ChatTemplate:
    """Turns messages into token ids, one message at a time, and ids into text.

    Raises:
        ModelError: the tokenizer has no chat template, or one that cannot be cut into pieces.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("this model has no fast tokenizer (tokenizer.json); choose a model that has one")
        if not tokenizer.chat_template:
            raise ModelError("this model's tokenizer has no chat template; choose an instruction-tuned (chat) model")
        self._tokenizer = tokenizer
        self._special_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._pieces = derive_pieces(tokenizer)
        self.generation_prompt = self._encode(self._pieces.generation_prompt)
        """Ids that open a reply."""
        self.assistant_close = self._closing(self._pieces.assistant_close)
        """Ids that follow a reply; the first is the end-of-turn token of most templates."""

    @property
    def supports_system(self) -> bool:
        """Whether a system text can be given."""
        return self._pieces.system_open is not None

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends a reply, where the template has a special one."""
        first = next(iter(self.assistant_close), None)
        return first if first in self._special_ids else None

    def system(self, text: str | None) -> Piece:
        """The opening of a conversation; text None: the template's own (BOS, default system prompt), no content.

        Raises:
            InputError: a text is given and the template has no system role.
        """
        if text is None:
            ids = self._encode(self._pieces.prefix)
            return Piece(ids, (len(ids), len(ids)))
        if self._pieces.system_open is None:
            raise InputError("this model's chat template has no system role; leave the system text out")
        return self._fill(self._pieces.system_open, text, self._pieces.system_close)

    def user(self, text: str, first: bool) -> Piece:
        """A user message; `first` = no user message stands before it."""
        opening = self._pieces.first_open if first else self._pieces.later_open
        return self._fill(opening, text, self._pieces.user_close)

    def assistant(self, text: str) -> Piece:
        """A reply that was not generated here: generation prompt, text, close."""
        pieces = self._pieces
        text = pieces.reply_lead + text
        body = self._content(pieces.generation_prompt, self.generation_prompt, text, pieces.assistant_close)
        return _join(self.generation_prompt, body, self.assistant_close)

    def message(self, role: str, text: str, first: bool) -> Piece:
        """A message of any role; `first` is for `user`. Errors as for `system`."""
        if role == "user":
            return self.user(text, first)
        return self.system(text) if role == "system" else self.assistant(text)

    def text(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream(self, said: Iterable[int] = ()) -> TextStream:
        """A decoder for one reply, of which `said` was given out already."""
        stream = TextStream(self)
        for token_id in said:
            stream.step(token_id)
        return stream

    def shown(self, ids: Sequence[int], content_span: tuple[int, int]) -> list[str]:
        """A text for each token of a message. Those of its content make up the content; others are shown as they are.

        A character of several tokens is shown with its last.
        """
        low, high = content_span
        texts = [str(self._tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in ids]
        stream = self.stream()
        texts[low:high] = [stream.step(token_id) for token_id in ids[low:high]]
        if high > low:
            texts[high - 1] += stream.flush()
        return texts

    def _fill(self, opening: str, text: str, closing: str) -> Piece:
        # A space that ends the opening ("[INST] ") belongs to the first token of the content.
        stem = opening.rstrip(" ")
        head = self._encode(stem)
        return _join(head, self._content(stem, head, opening[len(stem) :] + text, closing), self._closing(closing))

    def _content(self, opening: str, head: tuple[int, ...], text: str, closing: str) -> tuple[int, ...]:
        """Ids of `text` as it stands between `opening` (ids `head`) and `closing`; never special tokens."""
        tail = self._closing(closing)
        whole = self._encode(opening + text + closing)
        body = whole[len(head) : len(whole) - len(tail)]
        if head + body + tail == whole and self._special_ids.isdisjoint(body):
            return body
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _closing(self, closing: str) -> tuple[int, ...]:
        """Ids of `closing` after a word: some tokenizers put a space before what begins a text."""
        word = self._encode("x")
        whole = self._encode("x" + closing)
        return whole[len(word) :] if whole[: len(word)] == word else self._encode(closing)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of template text, in which special tokens are what they look like."""
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


class TextStream:
    """Text of a growing reply; a character is given out when its last byte has come."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._backend = template._tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty."""
        self._ids.append(token_id)
        text = self._decoder.step(self._backend, token_id) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """The rest at the reply's end: U+FFFD for a character that was cut."""
        rest = self._template.text(self._ids)[self._given :]
        self._given += len(rest)
        return rest


def derive_pieces(tokenizer: Any) -> Pieces:
    """Render conversations of sentinels and cut them into pieces.

    Raises:
        ModelError: the template fails, or leaves out or reorders what it is given.
    """
    marks = re.compile("|".join(sorted((re.escape(t) for t in tokenizer.get_added_vocab()), key=len, reverse=True)))
    prefix, asked = _gaps(tokenizer, [USER], generate=True)
    _, alone = _gaps(tokenizer, [USER])
    _, _, end = _gaps(tokenizer, [USER, REPLY])
    _, opened, between, _ = _gaps(tokenizer, [USER, REPLY, AGAIN])
    user_close = _common(marks, [asked, alone])
    assistant_close = _common(marks, [between, end])
    generation_prompt = asked[len(user_close) :]
    reply_lead = opened.removeprefix(user_close + generation_prompt)
    later_open = between[len(assistant_close) :]
    system_open, middle = _system_gaps(tokenizer)
    openings = [later_open, prefix] if system_open is None else [later_open, prefix, middle]
    first_open = _common(marks, openings, from_end=True)
    return Pieces(
        prefix=prefix.removesuffix(first_open),
        system_open=system_open,
        system_close=middle.removesuffix(first_open),
        first_open=first_open,
        later_open=later_open,
        user_close=user_close,
        generation_prompt=generation_prompt,
        reply_lead="" if reply_lead.strip(" ") else reply_lead,
        assistant_close=assistant_close,
    )


def _system_gaps(tokenizer: Any) -> tuple[str | None, str]:
    """What stands before the system text and between it and the first user text; None without a system role."""
    try:
        opening, middle, *_ = _gaps(tokenizer, [SYSTEM, USER, REPLY, AGAIN])
    except ModelError:
        return None, ""
    return opening, middle


def _gaps(tokenizer: Any, contents: list[str], generate: bool = False) -> list[str]:
    """The rendered text before, between and after `contents`."""
    messages = [{"role": ROLES[content], "content": content} for content in contents]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except jinja2.TemplateError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"this model's chat template fails on a plain conversation: {reason}") from None
    gaps = re.split("|".join(ROLES), text)
    if re.findall("|".join(ROLES), text) != contents:
        raise ModelError("this model's chat template leaves out or reorders messages; choose another chat model")
    return gaps


def _common(marks: re.Pattern[str], texts: Sequence[str], from_end: bool = False) -> str:
    """The longest common beginning (or end) of `texts` that cuts none of them inside a special token or plain run.

    The shortest text counts as a whole run where all others begin (end) with it.
    """
    shortest = min(texts, key=len)
    if all(text.endswith(shortest) if from_end else text.startswith(shortest) for text in texts):
        return shortest
    runs = [_runs(marks, text)[:: -1 if from_end else 1] for text in texts]
    common = [run[0] for run in itertools.takewhile(lambda run: len(set(run)) == 1, zip(*runs, strict=False))]
    return "".join(reversed(common) if from_end else common)


def _runs(marks: re.Pattern[str], text: str) -> list[str]:
    """`text` cut before and after each special token."""
    if not marks.pattern:
        return [text]
    return [run for run in re.split(f"({marks.pattern})", text) if run]


def _join(head: tuple[int, ...], body: tuple[int, ...], tail: tuple[int, ...]) -> Piece:
    return Piece(head + body + tail, (len(head), len(head) + len(body)))
