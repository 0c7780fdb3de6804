"""The program that `tests/test_branching.py` kills in the middle of an answer, with a draft typed meanwhile."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from kvchat.config import Config
from kvchat.events import Delta
from kvchat.worker import Worker
from tests.tiny import make_model

SETTINGS = {"generate.temperature": 0, "compress.keep_ratio": 1, "codec.name": "raw"}
QUESTION, DRAFT = "Where did we stay in Rome?", "And what did it\ncost?"
LONGEST_S = 60


def start(store: Path) -> Worker:
    """A worker on `store` with the tiny model; every process computes the same with it."""
    return Worker(Config.load(overrides={"store.path": str(store), **SETTINGS}), None, lambda *_: make_model())


def main() -> None:
    """Answer without end; say `kept` when some of the answer must be in the store."""
    signal.alarm(LONGEST_S)
    worker = start(Path(sys.argv[1]))
    session = worker.open("trip")
    store, number = session._conversation.store, session._conversation.info.id
    told = False
    for event in session.send(QUESTION, max_new_tokens=3000):
        if isinstance(event, Delta) and not told:
            session.set_draft(DRAFT)
            found = worker.jobs.call(lambda: store.unfinished(number), aside=True)
            if told := bool(found and len(found[1]) >= 3):
                print("kept", flush=True)
                signal.pause()


if __name__ == "__main__":
    main()
