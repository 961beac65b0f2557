"""Make this process end by SIGKILL at a given moment.

A moment is `written` (all that that block or step takes is on the disk, but not counted), `counted`
(progress tells of it) or `renamed` (the output stands, the work folder too).
"""

from __future__ import annotations

import os
import signal
from typing import Any

from calmix.recovery import distilling
from calmix.recovery.work import RecoveryFolder


def stop() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, number: int) -> None:
    """Patch the place where the process is to end; a distillation keeps every state."""
    distilling.SAVING = 0
    if moment == "renamed":
        RecoveryFolder.abandon = lambda self: stop()  # type: ignore[method-assign]
        return
    count = RecoveryFolder.count

    def counted(self: RecoveryFolder, progress: dict[str, Any]) -> None:
        due = progress["done"] >= number
        if due and moment == "written":
            stop()
        count(self, progress)
        if due:
            stop()

    RecoveryFolder.count = counted  # type: ignore[method-assign]
