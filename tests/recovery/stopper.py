"""Make this process end by SIGKILL at a given moment.

A moment is `written` (all that that block or step takes is on the disk, but not counted), `counted`
(the record tells of it) or `renamed` (the output stands, the work folder too).
"""

from __future__ import annotations

import os
import signal
from typing import Any

from calmix.pruning.work import WorkFolder
from calmix.recovery import distill


def stop() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, number: int) -> None:
    """Patch the place where the process is to end; a distillation keeps every state."""
    distill.SAVING = 0
    if moment == "renamed":
        WorkFolder.abandon = lambda self: stop()  # type: ignore[method-assign]
        return
    keep = WorkFolder.keep

    def kept(self: WorkFolder, **facts: Any) -> None:
        due = "rows_at_once" in facts and facts["done"] >= number  # a recovery's
        if due and moment == "written":
            stop()
        keep(self, **facts)
        if due:
            stop()

    WorkFolder.keep = kept  # type: ignore[method-assign]
