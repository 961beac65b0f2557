"""Make this process end by SIGKILL at a given moment.

A moment is `claimed` (the work folder is there, and nothing in it), `solved` (that block is pruned,
nothing of it written), `written` (its weights are written, but not counted), `counted` (work.json
names it) or `renamed` (the output stands, the work folder too).
"""

from __future__ import annotations

import os
import signal
from typing import Any

from calmix.pruning import work
from calmix.pruning.engine import Run


def stop() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, number: int) -> None:
    """Patch the place where the process is to end."""
    if moment == "solved":
        block = Run.block

        def pruned(self: Run, index: int) -> None:
            block(self, index)
            if index == number:
                stop()

        Run.block = pruned  # type: ignore[method-assign]
    elif moment == "claimed":
        work.write_json = lambda *given: stop()
    elif moment in ("written", "counted"):
        write = work.write_json

        def counted(path: object, value: dict[str, Any]) -> None:
            due = value["kept"].get("done") == number + 1
            if due and moment == "written":
                stop()
            write(path, value)  # type: ignore[arg-type]
            if due:
                stop()

        work.write_json = counted  # type: ignore[assignment]
    else:
        work.WorkFolder.abandon = lambda self: stop()  # type: ignore[method-assign]
