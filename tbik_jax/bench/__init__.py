"""Timing on this machine: the clocks, the environment of a result, and the compact tables of `tbik-jax bench`."""
