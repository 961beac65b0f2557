"""Make this process end by SIGKILL at a given moment.

A moment is `claimed` (the work folder is there, and nothing in it), `solved` (that block is pruned,
nothing of it written), `written` (its weights are written, but not counted), `counted` (work.json
names it), `scored` (the experts' scores are kept), `outside` (all blocks are done, embeddings are
not) or `renamed` (the output stands, the work folder too).
"""

import os
import signal

from calmix.pruning import work
from calmix.pruning.engine import Run


def stop():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, number):
    """Patch the place where the process is to end."""
    if moment == "solved":
        block = Run.block

        def pruned(self, index):
            block(self, index)
            if index == number:
                stop()

        Run.block = pruned
    elif moment == "outside":
        Run.outside = lambda self: stop()
    elif moment == "scored":
        keep = work.WorkFolder.keep

        def kept(self, **facts):
            keep(self, **facts)
            if "dropped" in facts:
                stop()

        work.WorkFolder.keep = kept
    elif moment == "claimed":
        work.write_json = lambda *given: stop()
    elif moment in ("written", "counted"):
        write = work.write_json

        def counted(path, value):
            due = value["kept"].get("done") == number + 1
            if due and moment == "written":
                stop()
            write(path, value)
            if due:
                stop()

        work.write_json = counted
    else:
        work.WorkFolder.abandon = lambda self: stop()
