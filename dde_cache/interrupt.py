"""Ctrl-C, and the SIGTERM of a scheduler, at a moment of our choosing: between two steps, when files are whole."""

import signal
import threading
from types import FrameType


class FinishStep:
    """Lets the running step finish on Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "FinishStep":
        if self._main:
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        # Schedulers and launchers send SIGTERM again, to the group and to each of its processes.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Stop here where it was asked for.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_error: object) -> None:
        if self._main:
            for number, before in self._before.items():
                signal.signal(number, before)
