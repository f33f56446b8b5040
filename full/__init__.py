"""What full scale needs around the method. Commands import it before torch, whose import takes seconds."""

import os
import sys

def _hook(kind, error, trace, others=sys.excepthook):
    """Ctrl-C while nobody waits for it yet ends in one sentence."""
    if kind is not KeyboardInterrupt:
        return others(kind, error, trace)
    print("stopped before anything was begun", file=sys.stderr)

if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) in ("sample.py", "train.py"):
    sys.excepthook = _hook
