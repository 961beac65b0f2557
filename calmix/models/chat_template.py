"""Render a model's chat template: a stranger's program, run in Jinja's sandbox with bounds."""

from __future__ import annotations

import faulthandler
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from unittest.mock import patch

import psutil
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from calmix.errors import ModelError

SECONDS, TEMPLATE_MEMORY = (
    20.0,
    2**30,
)  # that rendering a chat may take, and bytes above those in use
STUCK = 3  # times SECONDS, after which the process ends: a comparison of lists takes no signals
LARGEST_FACTOR = 2**64  # factors from which a product is refused


class _OneDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _OneDay:
        return cls(2025, 1, 1, tzinfo=tz)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses arithmetic on long integers, which no signal interrupts."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or any(
            isinstance(n, int) and abs(n) >= LARGEST_FACTOR for n in (left, right)
        ):
            raise SecurityError("it computes with very large numbers")
        return super().call_binop(context, operator, left, right)


def templated(tokenizer: Any, chat: Sequence[Mapping[str, Any]], **how: Any) -> str:
    """Return a chat in the model's template: without thinking before the answer, unless `how` has
    `enable_thinking`, and the same on any day. Raises ModelError for a template that takes too much
    time or memory."""
    from transformers.utils import chat_template_utils

    with (
        patch.object(chat_template_utils, "datetime", _OneDay),
        patch.object(chat_template_utils, "ImmutableSandboxedEnvironment", _Sandbox),
        _bounded(),
    ):
        return str(
            tokenizer.apply_chat_template(
                list(chat),
                tokenize=False,
                **{"enable_thinking": False, "date_string": "1 Jan 2025"} | how,
            )
        )


@contextmanager
def _bounded() -> Iterator[None]:
    """Bound time and memory of the body; only the main thread has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise ModelError(f"the model's chat template takes more than {SECONDS:g} s for one chat")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + TEMPLATE_MEMORY
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(STUCK * SECONDS, exit=True, file=2)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
        yield
    except MemoryError:
        raise ModelError("the model's chat template takes more than 1 GiB for one chat") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
