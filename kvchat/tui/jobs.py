"""What the chat screen gives to the engine: one job at a time, and readings that keep nobody waiting beside it.

An error ends its job and becomes a line in the transcript.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from kvchat.errors import InputError, KVChatError

if TYPE_CHECKING:
    from kvchat.tui.session_screen import SessionScreen


class Jobs:
    """The work of one chat screen."""

    def __init__(self, screen: SessionScreen) -> None:
        self.screen = screen
        self.busy = False
        """A job runs, or is about to; another one has to wait."""
        self.answering = False
        """The job is a turn, which can be stopped."""
        self.told = ""
        """What the status line says while nothing is counted."""

    def begin(self, words: str, job: Coroutine[Any, Any, None]) -> None:
        """Start the one job, which is called `words` in the status line.

        Raises:
            InputError: another one runs.
        """
        if self.busy:
            job.close()
            raise InputError(f"{words} has to wait until the model is idle; Escape stops an answer")
        self.busy = True
        self.screen.status.tell("")
        self.say(f"{words}…")
        self.screen.run_worker(self._finish(job, f"{words}…"), exit_on_error=False)

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that keeps nobody waiting: reading numbers, asking the user."""
        self.screen.run_worker(self._guard(work), exit_on_error=False)

    def say(self, words: str) -> None:
        """Show `words` in the status line, and again whenever counting ends."""
        self.told = words
        self.screen.status.say(words)

    async def _finish(self, job: Coroutine[Any, Any, None], words: str) -> None:
        is_done = await self._guard(job)
        self.busy = self.answering = False
        self.screen.drain()
        if self.told in (words, "stopping…") or not is_done:
            self.say("")
        self.screen.after_job(is_done)

    async def _guard(self, job: Coroutine[Any, Any, None]) -> bool:
        """Run `job`; an error becomes a line in the transcript. This is the edge of the program: nothing may escape."""
        try:
            await job
        except KVChatError as error:
            self.screen.note(str(error), "-error")
        except OSError as error:
            self.screen.note(f"{error.filename or 'the system'}: {error.strerror or error}", "-error")
        except Exception as error:
            self.screen.note(f"internal error: {type(error).__name__}: {error}", "-error")
        else:
            return True
        return False
