"""Ray without its dashboard process, and without two that a run has no use for.

Why: with the dashboard switched off Ray 2.60 starts the process all the same, for its usage module alone. With usage reports
     switched off too, that asks metadata servers which cloud this is (169.254.169.254, metadata.google.internal) and, for a
     head made by `ray start`, reports to usage-stats.ray.io that reports are off. Nothing else of it is used here.
     The autoscaler's monitor asks no cloud for hosts here, and the log monitor sends logs to no driver: together they cost each
     start a second of CPU time.
Where: ray/_private/node.py (Node.start_api_server, start_monitor, start_log_monitor),
     ray/dashboard/modules/usage_stats/usage_stats_head.py (run).
Versions: ray 2.60.0.
Remove when: Ray's usage module stays silent under RAY_USAGE_STATS_ENABLED=0.

`python -m alphamed.cluster.quiet_ray <arguments of ray>` is Ray's command line with this applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray._private.node import Node


def apply() -> None:
    """From now on a head that this process starts has no dashboard process, and a host neither monitor."""
    from ray._private.node import Node

    for name in ("start_api_server", "start_monitor", "start_log_monitor"):
        assert hasattr(Node, name), f"another version of Ray: find what does the work of Node.{name}"
    Node.start_api_server = _start_no_api_server
    Node.start_monitor = Node.start_log_monitor = lambda self: None


def _start_no_api_server(self: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
    assert not include_dashboard, "this start of Ray wants a dashboard"
    self._webui_url = None


def main() -> None:
    from ray.scripts.scripts import main as ray

    apply()
    ray()


if __name__ == "__main__":
    main()
