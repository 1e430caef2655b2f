"""Ray on a further host: waits for the head, then runs Ray's command line.

`python -m alphamed.cluster.join_ray ADDRESS PORT <arguments of ray>`. The head comes up when rank 0 has built its policy,
which can take minutes; whoever started this ends it when the run ends first.
"""

from __future__ import annotations

import socket
import sys
import time

RETRY_S = 0.5


def wait_for(address: str, port: int) -> None:
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            time.sleep(RETRY_S)


def main() -> None:
    wait_for(sys.argv[1], int(sys.argv[2]))
    from alphamed.cluster import quiet_ray

    del sys.argv[1:3]
    quiet_ray.main()


if __name__ == "__main__":
    main()
