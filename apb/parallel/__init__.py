"""The group of hosts: one interface, and three kinds of host behind it.

`host.py` is the interface; `threads.py`, `simulated.py` and `process_group.py` implement it, and `lone.py` plays one
member of a group that nobody has started. Threads meet in `meeting.py`; `launch.py` starts processes; `heartbeat.py`
finds out which of them died.
"""

from apb.parallel.host import Counters, Handle, Host, HostError, HostFailed, PlanMismatch
from apb.parallel.launch import host_from_env, run_processes
from apb.parallel.lone import LoneHost
from apb.parallel.process_group import ProcessGroupHost
from apb.parallel.simulated import SimulatedHost, run_simulated
from apb.parallel.threads import ThreadHost, run_threads

__all__ = [
    "Counters",
    "Handle",
    "Host",
    "HostError",
    "HostFailed",
    "LoneHost",
    "PlanMismatch",
    "ProcessGroupHost",
    "SimulatedHost",
    "ThreadHost",
    "host_from_env",
    "run_processes",
    "run_simulated",
    "run_threads",
]
