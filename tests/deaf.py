"""``python deaf.py VERB ...``: a command of ser-ray whose first Ray tells it of no actor, as one that lost a message.

Ray's own means for its tests holds back every answer to a process that asks for messages. The Ray that is joined after
that one is whole.
"""

from __future__ import annotations

import os
import sys

HELD_BACK = {
    "RAY_testing_asio_delay_us": "ControlPlanePubSubGcsService.grpc_server.GcsSubscriberPoll=3600000000:3600000000"
}


def main(arguments: list[str]) -> int:
    from ser_ray.__main__ import main as command
    from ser_ray.runtime import cluster, contact

    leave = cluster.leave

    def leave_and_hear() -> bool:
        left = leave()
        for name in HELD_BACK:
            os.environ.pop(name, None)
        return left

    os.environ.update(HELD_BACK)
    contact.EVERY_S, contact.LOOK_S = 2.0, 0.5
    cluster.leave = leave_and_hear
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
