"""Eight virtual CPU devices, so that every mesh and collective runs on one machine."""

import atexit
import os
import shutil
import tempfile

# Threads of XLA's CPU pool, by default as many as there are CPUs. The interpreter of Mosaic GPU kernels blocks one for
# every kernel thread that waits at a barrier: on 2 CPUs 2 CTAs of 3 warpgroups wait for each other forever. It is read
# when the first CPU client starts. Processes that a test starts inherit it.
os.environ.setdefault("PJRT_NPROC", "32")

# What one test has compiled serves the others of this run, in other workers and in the processes they start, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tbik_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax

jax.config.update("jax_num_cpu_devices", 8)
