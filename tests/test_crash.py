"""A process that is killed at any moment has lost nothing that it had said, and the conversation goes on.

`KVCHAT_CRASH_ROUNDS=25` kills 25 times in each phase instead of twice. Phase and number of a kill draw its moment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvchat.events import Notice, Progress, TurnDone
from kvchat.fingerprint import fingerprint_id
from kvchat.handle import Session
from kvchat.store.store import Store
from tests.crash_child import DRAFT, QUESTIONS, start

ROUNDS = int(os.environ.get("KVCHAT_CRASH_ROUNDS", "2"))
PHASES = ("open", "prefill", "decode", "seal", "commit")
LONGEST_DELAY_S = 0.02
ROOT = Path(__file__).resolve().parent.parent


class Program:
    """The running `tests.crash_child`, and what one of its conversations is when nothing disturbs it."""

    def __init__(self, process: subprocess.Popen[str], store: Path) -> None:
        self._process = process
        self.steps = self.run(store, "played", 1, 0.0)
        self.said = contents(store)

    def run(self, store: Path, step: str, number: int, delay_s: float, how: str = "") -> list[str]:
        """Hold the conversation, and kill it `delay_s` after the `number`th `step`; all the steps that it said."""
        process, steps = self._process, []
        assert process.stdin and process.stdout
        process.stdin.write(f"{how}{store}\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        for line in process.stdout:
            if line.startswith("end"):
                assert int(line.removeprefix("end")) == -signal.SIGKILL
                break
            steps.append(line.strip())
            if steps[-1] == step and steps.count(step) == number:
                time.sleep(delay_s)  # the moment of death is the point
                os.kill(pid, signal.SIGKILL)
        return steps


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    command = [sys.executable, "-m", "tests.crash_child"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdin=-1, stdout=-1
    ) as process:
        yield Program(process, tmp_path_factory.mktemp("undisturbed") / "s.db")


def contents(path: Path) -> list[str]:
    """All messages of the only session, oldest first; none if there is no session yet."""
    store = Store(path)
    assert store.verify() == []
    last = store.last_session()
    said = [message.content for message in store.path(last.tip)] if last else []
    store.close()
    return said


def tokens_saved(path: Path) -> int:
    """Tokens of which the only session has KV in the store; none if there is no session yet."""
    store = Store(path)
    last = store.last_session()
    ids = [message.id for message in store.path(last.tip)] if last else []
    cover = store.cover(ids, fingerprint_id(last.fingerprint)) if last else []
    found = max((record.end for record, used in cover if used == len(record.messages)), default=0)
    store.close()
    return found


def go_on(session: Session) -> list[TurnDone]:
    """Answer what waits for an answer, then ask what has not been asked."""
    num_messages = len(session.messages())
    replies = [list(session.resend())[-1]] if num_messages % 2 else []
    replies += [session.ask(question) for question in QUESTIONS[(num_messages + 1) // 2 :]]
    assert all(isinstance(reply, TurnDone) for reply in replies)
    return replies  # type: ignore[return-value]


def test_the_undisturbed_conversation_passes_every_phase(program: Program) -> None:
    assert set(PHASES) <= set(program.steps)
    assert program.said[::2] == QUESTIONS


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_process_loses_nothing_that_it_had_said(
    program: Program, tmp_path: Path, phase: str, number: int
) -> None:
    draw = random.Random(f"{phase} {number}")
    place = 1 if phase == "open" else draw.randint(1, program.steps.count(phase))
    # Most strike soon, while the phase lasts.
    steps = program.run(tmp_path / "s.db", phase, place, LONGEST_DELAY_S * draw.random() ** 3)
    asked, answered = steps.count("asked"), steps.count("done")

    saved = contents(tmp_path / "s.db")
    assert saved == program.said[: len(saved)]
    assert len(saved) >= asked + answered

    covered = tokens_saved(tmp_path / "s.db")
    told: list[Progress | Notice] = []
    worker = start(tmp_path / "s.db", told.append)
    session = worker.open("trip")
    tokens = [len(message.token_ids) for message in session.messages()]
    replies = go_on(session)
    assert [message.content for message in session.messages()] == program.said
    # What was saved is not computed again; of sealed turns the newest may not have been written yet.
    assert not replies or replies[0].usage.cached_tokens >= covered
    assert covered <= sum(tokens)
    assert not any(isinstance(event, Notice) for event in told)
    worker.close()
    assert contents(tmp_path / "s.db") == program.said


def test_half_an_answer_and_a_draft_are_there_after_a_kill(program: Program, tmp_path: Path) -> None:
    program.run(tmp_path / "s.db", "kept", 1, 0.0, how="half ")
    worker = start(tmp_path / "s.db")
    session = worker.open("trip")
    assert session.draft == DRAFT
    question, answer = session.messages()[-2:]
    assert (question.content, answer.finish_reason) == (QUESTIONS[0], "interrupted")
    low, high = answer.content_span
    assert high - low >= 3
    undisturbed = start(tmp_path / "whole.db")
    whole = undisturbed.open("trip").ask(QUESTIONS[0], max_new_tokens=high - low + 9).text
    undisturbed.close()
    *_, done = session.go_on(max_new_tokens=9)
    assert isinstance(done, TurnDone) and done.text == whole
    worker.close()
    assert contents(tmp_path / "s.db") == [QUESTIONS[0], whole]
