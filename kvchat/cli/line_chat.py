"""Chat line by line, for screen readers, simple terminals and pipes: nothing moves the cursor, nothing is drawn twice.

A line is a message, or a command that begins with a slash. Typed lines survive an error, piped ones do not.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.cli.flags import assignment
from kvchat.cli.line_commands import WIDEST, ends, ends_told, help_text, parse, spoken, turn_and_rest
from kvchat.cli.plain import Status, format_stats, interruptible, say, show_turn, summary, to_clipboard
from kvchat.errors import InputError, KVChatError, SessionExists
from kvchat.events import Event
from kvchat.terminal import neutralise, on_a_row

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.store.store import SessionInfo
    from kvchat.worker import Worker


def chat(worker: Worker, session: Session, status: Status) -> None:
    """Read lines and answer them until /quit or the end of input, then wait until all is saved."""
    lines = LineChat(worker, session, status)
    lines.run()
    lines.session.settle()
    lines.session.close()


class LineChat:
    """Answers lines, and runs commands: one method for each, named after it, which takes the argument."""

    def __init__(self, worker: Worker, session: Session, status: Status) -> None:
        self.worker, self.session, self.status = worker, session, status

    def run(self) -> None:
        """Until /quit or the end of input. Raises KVChatError for a line that nobody typed."""
        say(f"{self.session.name}: {self.session.model}. /help lists commands, /quit leaves.")
        while True:
            try:
                self.answer(self._line("> "))
            except EOFError:
                return
            except (KVChatError, OSError) as error:
                self.status.clear()
                if not sys.stdin.isatty():
                    raise
                say(f"kvchat: {_told(error)}")

    def answer(self, line: str) -> None:
        """Do what `line` says; /quit is an EOFError."""
        if command := parse(line):
            getattr(self, f"_{command[0]}")(command[1])
        else:
            self._turn(self.session.send(line[1:] if line.startswith("//") else line))

    # -- sessions ----------------------------------------------------------------------------------------------------

    def _new(self, name: str) -> None:
        fresh = name or f"{datetime.now():%Y-%m-%d-%H%M%S}"
        if any(info.name == fresh for info in self.worker.sessions()):
            raise SessionExists(f"a session named {fresh!r} is there already; /resume {fresh} goes on with it")
        self._go_to(self.worker.open(fresh))

    def _resume(self, name: str) -> None:
        if name != self.session.name:
            self._go_to(self.worker.open(name, create=False))

    def _fork(self, argument: str) -> None:
        turn, name = turn_and_rest(argument)
        if turn is None or not name:  # without a turn, or a name of digits alone
            self._go_to(self.session.fork(argument))
        else:
            self._go_to(self.session.fork(name, turn))

    def _go_to(self, session: Session) -> None:
        before, self.session = self.session, session
        before.close()
        self.status.clear()
        say(f"now in {session.name}")

    def _sessions(self, _: str) -> None:
        for info in self.worker.sessions():
            tags = "".join(f" #{tag}" for tag in info.tags)
            here = ", open here" if info.name == self.session.name else ""
            say(f"{on_a_row(info.name, WIDEST)}: {info.num_turns} turns{here}; {on_a_row(info.title, WIDEST)}{tags}")

    def _search(self, words: str) -> None:
        hits = self.worker.search(words)
        for hit in hits:
            turn = "on another branch" if hit.turn is None else f"turn {hit.turn}"
            say(f"{on_a_row(hit.session, WIDEST)}, {turn}, {hit.role}: {on_a_row(hit.snippet, 2 * WIDEST)}")
        if not hits:
            say("nothing is found")

    def _rename(self, new: str) -> None:
        self.worker.rename(self.session.name, new)
        say(f"this is {new} now")

    def _title(self, text: str) -> None:
        if text:
            self.worker.retitle(self.session.name, text.strip('"'))
        say(f"title: {on_a_row(self._info().title, 2 * WIDEST) or 'none'}")

    def _tag(self, argument: str) -> None:
        if argument:
            tags = set(self._info().tags)
            for word in argument.split():
                tags = tags - {word[1:]} if word.startswith("-") else tags | {word.removeprefix("+")}
            self.worker.tag(self.session.name, sorted(tags))
        say(f"tags: {' '.join(self._info().tags) or 'none'}")

    def _info(self) -> SessionInfo:
        return next(info for info in self.worker.sessions() if info.name == self.session.name)

    # -- turns -------------------------------------------------------------------------------------------------------

    def _rewind(self, argument: str) -> None:
        if argument and not (argument.isdecimal() and int(argument) > 0):
            raise InputError(f"/rewind takes a number of turns, got {argument!r}")
        say(f"took back: {self.session.rewind(int(argument or 1))}")

    def _retry(self, _: str) -> None:
        self._turn(self.session.resend())

    def _continue(self, _: str) -> None:
        self._turn(self.session.go_on())

    def _edit(self, argument: str) -> None:
        turn, text = turn_and_rest(argument)
        asked = [message.content for message in self.session.messages() if message.role == "user"]
        turn = len(asked) if turn is None else turn
        if not 1 <= turn <= len(asked):
            raise InputError(f"there is no turn {turn} to edit; this session has {len(asked)} turns")
        if not text:
            say(f"turn {turn} is: {asked[turn - 1]}")
            text = self._line("new text> ")
        self._turn(self.session.edit(turn, text))

    def _branches(self, _: str) -> None:
        nodes = self.session.tree()
        for number, line in enumerate(ends_told(nodes), 1):
            say(f"{number}. {line}")

    def _switch(self, argument: str) -> None:
        places = ends(self.session.tree())
        if not argument.isdecimal() or not 1 <= int(argument) <= len(places):
            raise InputError(f"/switch takes a number of /branches, 1 to {len(places)}, got {argument!r}")
        end = places[int(argument) - 1]
        self.session.switch(end.id)
        say(f"now at turn {end.turn}: {on_a_row(end.text, WIDEST)}")

    def _turn(self, events: Iterable[Event]) -> None:
        with interruptible(self.session):
            done = show_turn(events, self.status)
        say(summary(done))

    # -- what the model has ------------------------------------------------------------------------------------------

    def _attach(self, argument: str) -> None:
        from kvchat.documents import read_document

        file = Path(argument).expanduser()
        attached = self.session.attach(file.name, read_document(file))
        self.status.clear()
        say(f"attached, {attached.tokens} tokens, {attached.computed} computed")

    def _system(self, text: str) -> None:
        said = self.session.messages()
        if text:
            if any(message.role != "system" for message in said):
                raise InputError("this session has begun; /new begins one, and /system then gives it another prompt")
            self.session.append([{"role": "system", "content": text}])
            said = self.session.messages()
        self.status.clear()
        say(f"system prompt: {next((one.content for one in said if one.role == 'system'), '') or 'none'}")

    def _set(self, argument: str) -> None:
        if argument:
            key, value = assignment(argument)
            self.session.configure({key: None if value == "" else value})
        own = self._info().settings
        say("\n".join(f"{key}={value}" for key, value in sorted(own.items())) or "no settings of its own")

    def _keep(self, argument: str) -> None:
        self.session.configure({"compress.keep_ratio": argument or None})
        say(format_stats(self.session.stats()).splitlines()[2])

    def _model(self, _: str) -> None:
        say(f"{self.session.model}, a window of {self.session.context_window} tokens")

    def _stats(self, _: str) -> None:
        say(format_stats(self.session.stats()))

    def _map(self, _: str) -> None:
        from kvchat.segment_map import draw, heading, to_text

        stats, width = self.session.stats(), shutil.get_terminal_size((80, 24)).columns
        lines = [*heading(stats, width), *draw(stats, self.session.episodes(), width)]
        say(to_text(lines, encoding=sys.stderr.encoding or "utf-8"))

    def _copy(self, what: str) -> None:
        from kvchat.tui.splitting import code_blocks

        if what not in ("", "code"):
            raise InputError(f"usage: /copy [code]; got {what!r}")
        answers = (one.content for one in reversed(self.session.messages()) if one.role == "assistant")
        text = neutralise(next((answer for answer in answers if answer), ""))
        if not text:
            raise InputError("there is no answer to copy")
        blocks = code_blocks(text) if what else [text]
        if not blocks:
            raise InputError("the last answer has no block of code")
        to_clipboard(blocks[-1])
        lines = len(blocks[-1].splitlines())
        which = f"code block {len(blocks)} of the last answer" if what else "the last answer"
        begins = on_a_row(blocks[-1], WIDEST)
        say(f"{which} is given to the terminal's clipboard, {lines} line{'s' * (lines != 1)}: {begins}")

    def _export(self, argument: str) -> None:
        from kvchat.files import written
        from kvchat.transcript_page import text_of

        file = Path(argument).expanduser()
        format = file.suffix.removeprefix(".")
        if format not in ("md", "json", "jsonl", "html"):
            raise InputError(f"{file}: the name says the form, and must end in .md, .json, .jsonl or .html")
        with written(file, force=False) as stream:
            stream.write(text_of(spoken(self.session.messages()), format, self.session.name).encode())
        say(f"{file} is written")

    def _help(self, _: str) -> None:
        say(help_text())

    def _quit(self, _: str) -> None:
        raise EOFError

    def _line(self, prompt: str) -> str:
        """The next line that is not blank; the prompt appears only if someone types."""
        typed = sys.stdin.isatty() and sys.stdout.isatty()
        if typed:
            _prepare_editing()
        with self.status.typing():
            while not (line := input(prompt if typed else "").strip()):
                pass
        return line


def _prepare_editing() -> None:
    """A history for input(), and no sequences around what is pasted."""
    with suppress(ImportError):  # there is none on Windows
        import readline

        readline.parse_and_bind("set enable-bracketed-paste off")


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return str(error)
