"""Ray without its dashboard process.

Why: with the dashboard switched off Ray 2.60 starts the process all the same, for its usage module alone. With usage reports
     switched off too, that asks metadata servers which cloud this is (169.254.169.254, metadata.google.internal) and, for a
     head made by `ray start`, reports to usage-stats.ray.io that reports are off. Nothing else of it is used here.
Where: ray/_private/node.py (Node.start_api_server), ray/dashboard/modules/usage_stats/usage_stats_head.py (run).
Versions: ray 2.60.0.
Remove when: Ray's usage module stays silent under RAY_USAGE_STATS_ENABLED=0.

`python -m alphamed.cluster.quiet_ray <arguments of ray>` is Ray's command line with this applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray._private.node import Node


def apply() -> None:
    """From now on a head that this process starts has no dashboard process."""
    from ray._private.node import Node

    assert hasattr(Node, "start_api_server"), "another version of Ray: find how it starts its dashboard"
    Node.start_api_server = _start_no_api_server


def _start_no_api_server(self: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
    assert not include_dashboard, "this start of Ray wants a dashboard"
    self._webui_url = None


def main() -> None:
    from ray.scripts.scripts import main as ray

    apply()
    ray()


if __name__ == "__main__":
    main()
