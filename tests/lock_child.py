"""The processes of `tests/test_locks.py`: for each line on stdin, "REQUESTS ANSWERS STORE SESSION", a fork of it.

A fork reads requests from one pipe and answers each with one line on the other: `open`, `close`, or else a question.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kvchat.errors import KVChatError
from tests.crash_child import LONGEST_S, start


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # A fork costs milliseconds, an interpreter with torch seconds.
    for line in sys.stdin:
        if os.fork() == 0:
            requests, answers, store, name = line.split()
            serve(requests, answers, Path(store), name)
            return


def serve(requests: str, answers: str, store: Path, name: str) -> None:
    """Do what is asked until the pipe ends, or it is killed."""
    signal.alarm(LONGEST_S)
    with open(answers, "w", buffering=1) as out, open(requests) as lines:
        print(os.getpid(), file=out)
        worker = start(store)
        for line in lines:
            try:
                if line == "open\n":
                    session = worker.open(name)
                    print("opened", file=out)
                elif line == "close\n":
                    session.close()
                    print("closed", file=out)
                else:
                    print("answered", session.ask(line.strip()).usage.completion_tokens, file=out)
            except KVChatError as error:
                print(type(error).__name__, error, file=out)


if __name__ == "__main__":
    main()
