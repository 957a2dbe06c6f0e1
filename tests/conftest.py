"""Eight virtual CPU devices, so that every mesh and collective runs on one machine."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
