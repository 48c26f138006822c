"""What stands between the verbs and Ray: the cluster and its nodes, the plan of a run, how data reach workers."""

import atexit
import gc
import sys

_ray = sys.modules.get("ray")
if _ray is not None and _ray._private.worker.global_worker.mode == _ray.WORKER_MODE:
    # In a process that Ray started for us: importing torch and transformers makes half a million objects and no
    # garbage. Looking for it as often as Python does by default, and once more at the end, takes two of six seconds.
    gc.set_threshold(10_000, 10, 10)
    atexit.register(gc.freeze)
