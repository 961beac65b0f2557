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

    def counts(path, value):
        return value["kept"].get("done") == number + 1

    place, name, due, after = {
        "claimed": (work, "write_json", None, False),
        "solved": (Run, "block", lambda self, index: index == number, True),
        "written": (work, "write_json", counts, False),
        "counted": (work, "write_json", counts, True),
        "scored": (work.WorkFolder, "keep", lambda self, **facts: "dropped" in facts, True),
        "outside": (Run, "outside", None, False),
        "renamed": (work.WorkFolder, "abandon", None, False),
    }[moment]
    act = getattr(place, name)

    def acting(*given, **more):
        ends = due is None or due(*given, **more)
        if ends and not after:
            stop()
        act(*given, **more)
        if ends:
            stop()

    setattr(place, name, acting)


def interrupting(block):
    """Return a `Run.block` that prunes the first block and raises an interrupt at the second."""

    def until(run, index):
        if index:
            raise KeyboardInterrupt
        block(run, index)

    return until
