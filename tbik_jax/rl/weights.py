"""Weights from the trainer's mesh to the rollout's, on the devices."""

from flax import nnx
from jax.sharding import Mesh

from ..loading import parameter_shardings
from ..mesh import resolve_mesh
from ..models.qwen3 import Qwen3
from ..reshard import reshard


def hand_over(model: Qwen3, mesh: Mesh | None = None) -> Qwen3:
    """A copy of the model on another mesh, as `generate` wants it there: from the trainer to the rollout.

    Parameters move from device to device; nothing passes through the host. The copy shares no buffer with the model, so
    a train step may donate those.

    Args:
        model: on any devices.
        mesh: of the rollout; None for the ambient mesh, else one device.

    Raises:
        ValueError: the model does not fit the mesh.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, reshard(state, parameter_shardings(state, resolve_mesh(mesh))))
