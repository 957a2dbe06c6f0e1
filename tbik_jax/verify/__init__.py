"""What `tbik-jax verify` asks: what is installed and wrong with it, and whether every kernel gives the expected bits.

`collect_facts` and `problems` look at versions, driver, devices and links; `op_checks` and `mesh_checks` run each op
that a model would use on this device, and the collectives. `run_checks` runs them one by one, and compares fingerprints
with those that are kept for this kind of device (`expected.json`).
"""

from .checks import Broken, Check, Result, run_checks
from .facts import Facts, collect_facts
from .meshes import mesh_checks
from .ops import op_checks
from .problems import Problem, problems

__all__ = [
    "Broken",
    "Check",
    "Facts",
    "Problem",
    "Result",
    "collect_facts",
    "mesh_checks",
    "op_checks",
    "problems",
    "run_checks",
]
