"""The line chat: commands as other programs have them, and nothing that a screen reader stumbles over."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvchat.cli import plain
from kvchat.cli.app import main
from kvchat.cli.line_chat import LineChat
from kvchat.cli.line_commands import ALSO, COMMANDS, help_text, parse
from kvchat.errors import InputError, KVChatError
from kvchat.events import Notice, Progress
from tests.fake_worker import FakeWorker


class Typed(io.StringIO):
    """A terminal that lines are typed on, or text is printed on."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def worker() -> Any:
    return FakeWorker()


@pytest.fixture
def lines(worker: Any) -> LineChat:
    return LineChat(worker, worker.open("trip"), plain.Status(lines=True))


@pytest.fixture
def answer(lines: LineChat, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a line brings, on stdout and stderr together."""

    def answer(line: str) -> str:
        lines.answer(line)
        return "".join(capsys.readouterr())

    return answer


def test_every_command_is_explained_and_there() -> None:
    assert {name for name in COMMANDS if not hasattr(LineChat, f"_{name}")} == set()
    assert set(ALSO.values()) <= set(COMMANDS)
    assert all(f"/{name}" in help_text() for name in COMMANDS)
    assert max(map(len, help_text().splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("Hi", None),
        ("/tmp/x is a file", None),
        ("//help is no command", None),
        ("/", None),
        ("/undo 2", ("rewind", "2")),
        ("/fork  a name ", ("fork", "a name")),
        ("/title", ("title", "")),
    ],
)
def test_lines_are_messages_or_commands(line: str, command: tuple[str, str] | None) -> None:
    assert parse(line) == command


@pytest.mark.parametrize("line", ["/reboot", "/resume", "/help me", "/search", "/quit now", "/attach"])
def test_what_is_no_command_line_says_how_it_is_written(line: str) -> None:
    with pytest.raises(InputError, match=r"unknown command /reboot|usage: /"):
        parse(line)


def test_two_slashes_send_one(answer: Any, worker: Any) -> None:
    assert answer("//quit is how you leave").startswith("/QUIT IS")
    assert worker.heard == ["/quit is how you leave"]


def test_sessions_are_listed_opened_begun_and_copied(lines: LineChat, answer: Any, worker: Any) -> None:
    assert answer("/sessions") == "trip: 3 turns, open here; Rome by night #italy\n"
    assert answer("/resume oslo") == "now in oslo\n" and lines.session.name == "oslo"
    assert worker.opened[-1] == ("oslo", {"create": False})
    assert answer("/resume oslo") == ""
    assert re.fullmatch(r"now in \d{4}-\d\d-\d\d-\d{6}\n", answer("/new"))
    assert answer("/new bern") == "now in bern\n"
    with pytest.raises(KVChatError, match="/resume trip goes on with it"):
        lines.answer("/new trip")
    assert answer("/fork rome") == "now in rome\n"
    assert answer("/fork 2 early rome") == "now in early rome\n"
    assert answer("/fork 2026") == "now in 2026\n"
    assert [given for kind, given in worker.asked if kind == "fork"] == [None, 2, None]


def test_the_session_left_is_closed_and_the_last_one_too(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr("tests.fake_worker.FakeSession.close", lambda self: closed.append(self.name))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/resume oslo\n"))
    from kvchat.cli.line_chat import chat

    chat(worker, worker.open("trip"), plain.Status())
    assert closed == ["trip", "oslo"]


def test_names_titles_and_tags_can_be_shown_and_changed(answer: Any, worker: Any) -> None:
    assert answer("/title") == "title: Rome by night\n"
    assert answer("/title Three days") == "title: Three days\n"
    assert answer('/title ""') == "title: none\n"
    assert answer("/tag +work -italy late") == "tags: late work\n"
    assert answer("/tag") == "tags: late work\n"
    assert answer("/rename rome") == "this is rome now\n" and worker.asked[-1] == ("rename", ("trip", "rome"))
    assert answer("/search bike") == "trip, turn 2, user: a bike there\n"
    assert answer("/search nothing") == "nothing is found\n"


def test_turns_can_be_changed(answer: Any, worker: Any) -> None:
    assert answer("one").startswith("ONE\n") and answer("two").startswith("TWO\n")
    assert "TWO" in answer("/retry") and "AND SO ON" in answer("/continue")
    assert answer("/rewind") == "took back: and so on\n"
    assert "ANOTHER ONE" in answer("/edit 1 another one") and worker.asked[-1] == ("edit", 1)
    assert "THE LAST" in answer("/edit the last") and worker.asked[-1] == ("edit", 3)
    for line in ("/edit 9 x", "/rewind none", "/rewind 0"):
        with pytest.raises(InputError):
            answer(line)


def test_edit_without_text_asks_for_it(answer: Any, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer("Where is Rme?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nWhere is Rome?\n"))
    told = answer("/edit")
    assert "turn 1 is: Where is Rme?\n" in told and "WHERE IS ROME?" in told


def test_branches_are_told_by_their_ends(answer: Any, worker: Any) -> None:
    assert answer("/branches").splitlines() == [
        "1. to turn 2, another way from turn 2: user: And Oslo?",
        "2. here, turn 2: In Switzerland.",
    ]
    assert answer("/switch 1") == "now at turn 2: In Norway.\n" and worker.asked[-1] == ("switch", "m4")
    for wrong in ("/switch 3", "/switch x", "/switch 0"):
        with pytest.raises(InputError, match="1 to 2"):
            answer(wrong)


def test_what_the_model_has_can_be_shown_and_changed(answer: Any, worker: Any, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("text")
    assert "attached, 12 tokens, 4 computed" in answer(f"/attach {tmp_path}/a b.txt")
    assert answer("/model") == "tiny, a window of 100 tokens\n"
    assert "48 of 96 KV pairs held" in answer("/stats")
    assert "turn 1 ████" in (drawn := answer("/map")) and "\x1b" not in drawn
    assert answer("/set generate.top_k=3") == "no settings of its own\n"
    assert worker.asked[-1] == ("configure", {"generate.top_k": "3"})
    answer("/set generate.top_k=")
    assert worker.asked[-1] == ("configure", {"generate.top_k": None})
    worker.infos[0].settings = {"generate.top_k": 3}
    assert answer("/set") == "generate.top_k=3\n"
    answer("/keep 0.2")
    assert worker.asked[-1] == ("configure", {"compress.keep_ratio": "0.2"})


def test_a_system_prompt_is_for_a_session_that_is_empty(answer: Any, worker: Any) -> None:
    assert answer("/system") == "system prompt: none\n"
    answer("/system Be brief.")
    assert worker.heard == ["Be brief."]
    with pytest.raises(InputError, match="/new begins one"):
        answer("/system Be kind.")


@pytest.mark.parametrize("suffix", ["md", "json", "jsonl", "html"])
def test_a_conversation_is_written_to_a_file(suffix: str, answer: Any, tmp_path: Path) -> None:
    answer("Hi")
    file = tmp_path / f"trip.{suffix}"
    assert answer(f"/export {file}") == f"{file} is written\n" and "Hi" in file.read_text()
    with pytest.raises(InputError, match="is there already"):
        answer(f"/export {file}")
    with pytest.raises(InputError, match="must end in"):
        answer(f"/export {tmp_path}/trip.doc")


CODE = "Two.\n\n```python\none = 1\ntwo = 2\n```"


def says(lines: LineChat, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last answer is `text`."""
    monkeypatch.setattr(lines.session, "messages", lambda: [SimpleNamespace(role="assistant", content=text)])


@pytest.mark.parametrize(
    ("line", "copied", "told"),
    [
        ("/copy", CODE, "the last answer is given to the terminal's clipboard, 6 lines: Two. ```python one = 1"),
        ("/copy code", "one = 1\ntwo = 2", "code block 1 of the last answer is given to the terminal's clipboard, 2 l"),
    ],
)
def test_the_answer_is_given_to_the_clipboard_of_a_terminal(
    line: str,
    copied: str,
    told: str,
    lines: LineChat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    says(lines, CODE, monkeypatch)
    terminal = Typed()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        lines.answer(line)
        patched.setenv("TERM", "dumb")
        with pytest.raises(InputError, match="no terminal with a clipboard"):
            lines.answer(line)
    assert told in capsys.readouterr().err
    begin, _, rest = terminal.getvalue().partition("52;c;")
    assert begin == "\x1b]" and base64.b64decode(rest.removesuffix("\a")).decode() == copied


@pytest.mark.parametrize(
    ("said", "line", "problem"),
    [
        ("", "/copy", "no answer to copy"),
        ("Hi", "/copy code", "no block of code"),
        ("Hi", "/copy all", "usage: /copy"),
        ("Hi", "/copy", "no terminal with a clipboard"),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    said: str, line: str, problem: str, lines: LineChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(lines, said, monkeypatch)
    with pytest.raises(InputError, match=problem):
        lines.answer(line)


def test_typed_lines_survive_an_error(worker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, stream in {
        "stdin": Typed("full\n/export /no/such/folder/x.md\nHi\n/quit\n"),
        "stdout": Typed(),
        "stderr": Typed(),
    }.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["chat", "trip", "--plain", "--store", str(tmp_path / "none.db")], worker) == 0
    told = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "kvchat: the window has no room" in told and "/no/such/folder" in told
    assert "HI\n" in sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert not re.search(r"[\x1b\r\b]", told + sys.stdout.getvalue())  # type: ignore[attr-defined]


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Typed())
    now = 0.0
    status = plain.Status(lines=True, clock=lambda: now)
    for done in range(1, 1200):
        now += 0.01
        status(Progress("prefill", done, 5000))
    status(Progress("prefill", 5000, 5000))
    now += 100
    status(Progress("load", 10_000_000, 100_000_000))
    status(Notice("one\x1b[2J segment"))
    assert sys.stderr.getvalue() == (  # type: ignore[attr-defined]
        "Reading: 502/5000 tokens\nReading: 1003/5000 tokens\none␛[2J segment\n"
    )


def test_a_simple_terminal_gets_lines_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Typed())
    now = iter([0.0, 6.0])
    status = plain.Status(clock=lambda: next(now))
    status(Progress("seal", 0, 0))
    status(Progress("seal", 0, 0))
    assert sys.stderr.getvalue() == "Sealing\n"  # type: ignore[attr-defined]


def test_a_notice_waits_while_a_line_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Typed())
    status = plain.Status(lines=True)
    with status.typing():
        status(Notice("sealed"))
        status(Progress("seal", 1, 2))
        assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    assert sys.stderr.getvalue() == "sealed\n"  # type: ignore[attr-defined]


# -- ask ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(worker: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def ask(*words: str, stdin: str = "", typed: bool = False, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", Typed(stdin) if typed else io.StringIO(stdin))
        assert main(["ask", "--store", str(tmp_path / "none.db"), *words], worker) == code
        return capsys.readouterr()

    return ask


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trip", "Where is it?"), "Where is it?"),
        (("trip", "Where", "is", "it?"), "Where is it?"),
        (("trip", "-"), "from stdin\n  more"),
        (("trip",), "from stdin\n  more"),
        (("trip", "Explain this:", "-"), "Explain this:\n\nfrom stdin\n  more"),
        (("trip", "-", "Explain", "that"), "from stdin\n  more\n\nExplain that"),
        (("trip", "what is 5", "-", "3?"), "what is 5 - 3?"),
        (("-c", "Where", "is it?"), "Where is it?"),
        (("--continue", "-"), "from stdin\n  more"),
        (("-c",), "from stdin\n  more"),
    ],
)
def test_a_message_is_made_of_words_and_stdin(words: tuple[str, ...], message: str, ask: Any, worker: Any) -> None:
    ask(*words, stdin="from stdin\n  more\n")
    assert worker.heard == [message]
    assert worker.opened[0][0] == (None if words[0].startswith("-") else "trip")


def test_nobody_is_kept_waiting_for_a_message_that_is_not_piped_in(ask: Any, worker: Any) -> None:
    assert ask("trip", typed=True, code=2)[1].startswith("kvchat: Missing argument 'TEXT'")
    assert ask(code=2)[1].startswith("kvchat: Missing argument 'NAME'")
    assert ask("trip", "-", "Hi", "-", code=2)[1] == "kvchat: stdin can be read once; leave one - out\n"
    assert worker.opened == []


def test_stdout_is_the_answer_alone(ask: Any) -> None:
    out, err = ask("trip", "Hi")
    assert out == "HI\n" and "one segment was rebuilt" in err and "tokens cached" in err


def test_json_of_an_answer_is_harmless(ask: Any) -> None:
    out, _ = ask("trip", "a\x9b2Jb\u202e", "--json")
    assert json.loads(out)["text"] == "A\x9b2JB\u202e" and "\x9b" not in out and "\u202e" not in out


@pytest.mark.parametrize("kind", ["file", "pipe", "empty pipe"])
def test_stdin_that_is_not_read_is_said(kind: str, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    if kind == "file":
        handle = os.open(tmp_path / "file", os.O_RDONLY)
    else:
        handle, end = os.pipe()
        os.write(end, b"text" if kind == "pipe" else b"")
        os.close(end)
    with os.fdopen(handle) as stream:
        monkeypatch.setattr(io, "StringIO", lambda _: stream)
        _, err = ask("trip", "Explain this")
    assert ("what was piped in was not read" in err) == (kind != "empty pipe")


@pytest.mark.parametrize("words", [["-c"], ["chat", "-c"], ["chat", "--continue", "--plain"], []])
def test_continue_opens_the_last_session(
    words: list[str], worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert main(["--store", str(tmp_path / "none.db"), *words], worker) == 0
    assert worker.opened[0][0] is None and worker.heard == ["Hi"]
