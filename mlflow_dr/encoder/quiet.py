"""transformers without its bars and tables."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_before: list[tuple[int, bool]] = []


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and its table of unused weights; threads may be here together."""
    from transformers.utils import logging as messages

    with _lock:  # a publisher's thread may be here beside the trainer's
        if not _before:
            _before.append((messages.get_verbosity(), messages.is_progress_bar_enabled()))
            messages.set_verbosity_error()
            messages.disable_progress_bar()
        else:
            _before.append(_before[0])
    try:
        yield
    finally:
        with _lock:
            level, bars = _before.pop()
            if not _before:
                messages.set_verbosity(level)
                if bars:
                    messages.enable_progress_bar()
