"""What is wrong with an installation, from its facts alone, and what to do about it."""

import dataclasses

from ..pallas_kernels.common.backend import TRITON_VERSIONS
from ..versions import SUPPORTED, version_problem
from .facts import Device, Facts

#: The least driver (major version) for each CUDA plugin: those of CUDA 12.0 and 13.0 on Linux.
_LEAST_DRIVER = {"12": 525, "13": 580}
#: Pairs in `nvidia-smi topo -m` that are no NVLink.
_SLOW_LINKS = ("PIX", "PXB", "PHB", "NODE", "SYS")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that a user may want to change.

    Attributes:
        text: what is so.
        remedy: what to do.
        wrong: the installation does not do what it was made for; otherwise it works, and should be known.
    """

    text: str
    remedy: str
    wrong: bool = True


def problems(facts: Facts) -> list[Problem]:
    """All problems, the wrong ones first."""
    found = [*_versions(facts), *_plugin(facts), *_no_gpu(facts), *_devices(facts), *_links(facts)]
    return sorted(found, key=lambda problem: not problem.wrong)


def _versions(facts: Facts) -> list[Problem]:
    found = []
    for package in SUPPORTED:
        text = version_problem(package, facts.versions.get(package))
        if text:
            what, _, remedy = text.partition("; run: ")
            found.append(Problem(what, remedy))
    jax, jaxlib = facts.versions.get("jax"), facts.versions.get("jaxlib")
    if jax != jaxlib:
        found.append(Problem(f"jax is {jax} and jaxlib {jaxlib}", f"pip install jaxlib=={jax}"))
    if "XLA_FLAGS" in facts.variables:
        found.append(
            Problem(
                f"XLA_FLAGS={facts.variables['XLA_FLAGS']!r} is set and may change the bits",
                "compare only runs with the same flags, or unset it",
                wrong=False,
            )
        )
    return found


def _cuda_plugins(facts: Facts) -> dict[str, str]:
    """Version of the plugin by major version of CUDA."""
    named = {cuda: facts.versions.get(f"jax-cuda{cuda}-plugin") for cuda in _LEAST_DRIVER}
    return {cuda: version for cuda, version in named.items() if version is not None}


def _plugin(facts: Facts) -> list[Problem]:
    plugins, jaxlib = _cuda_plugins(facts), facts.versions.get("jaxlib")
    if len(plugins) > 1:
        names = " and ".join(f"jax-cuda{cuda}-plugin {version}" for cuda, version in plugins.items())
        remedy = "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt"
        return [Problem(f"two CUDA plugins are installed: {names}", remedy)]
    found = []
    for cuda, version in plugins.items():
        remedy = f"pip install 'jax[cuda{cuda}]=={facts.versions.get('jax')}'"
        pjrt = facts.versions.get(f"jax-cuda{cuda}-pjrt")
        for name, installed in ((f"jax-cuda{cuda}-plugin", version), (f"jax-cuda{cuda}-pjrt", pjrt)):
            if installed != jaxlib:
                found.append(
                    Problem(f"{name} is {installed} and jaxlib {jaxlib}: JAX does not use it", remedy)
                )
        least = _LEAST_DRIVER[cuda]
        if facts.driver is not None and int(facts.driver.split(".")[0]) < least:
            other = (
                "pip install 'jax[cuda12]' instead, or update the driver"
                if cuda == "13"
                else "update the driver"
            )
            text = f"the NVIDIA driver {facts.driver} is older than CUDA {cuda} needs ({least})"
            found.append(Problem(text, other))
    return found


def _no_gpu(facts: Facts) -> list[Problem]:
    if any(device.platform == "gpu" for device in facts.devices):
        return []
    said = "".join(f"; JAX says: {message[:300]}" for message in facts.messages[:1])
    if not facts.gpus:
        text = "no NVIDIA GPU is to be seen (nvidia-smi lists none): the references run on the CPU, slowly"
        return [Problem(text + said, "for GPUs install the NVIDIA driver, then run this again", wrong=False)]
    install = f"pip install 'jax[cuda13]=={facts.versions.get('jax')}'"
    what = f"{len(facts.gpus)} x {facts.gpus[0]} is here and JAX runs on the CPU"
    if not _cuda_plugins(facts):
        return [Problem(f"{what}: JAX has no CUDA plugin", install)]
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        if name in facts.variables:
            return [Problem(f"{what}: {name}={facts.variables[name]!r} is set", f"unset {name}", wrong=False)]
    return [Problem(what + said, f"{install} --force-reinstall, and look at the driver")]


def _devices(facts: Facts) -> list[Problem]:
    kinds = sorted({device.kind for device in facts.devices})
    found = []
    if len(kinds) > 1:
        remedy = "choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
        found.append(
            Problem(f"devices of several kinds ({', '.join(kinds)}): bits are equal on one kind", remedy)
        )
    gpus = [device for device in facts.devices if device.platform == "gpu"]
    platforms = facts.variables.get("JAX_PLATFORMS", "")
    if gpus and platforms and "cpu" not in platforms:
        text = f"JAX_PLATFORMS={platforms!r} leaves out the CPU, with which kernels are compared"
        found.append(Problem(text, f"unset JAX_PLATFORMS, or set it to {platforms},cpu"))
    return found + (_capability(gpus[0], facts) if gpus else [])


def _capability(device: Device, facts: Facts) -> list[Problem]:
    """Which kernels a GPU has."""
    major = (device.capability or "").split(".")[0]
    if major == "9":
        return []
    what = f"{device.kind} has compute capability {device.capability}"
    if major == "8":
        missing = [
            f"{name}=={version}"
            for name, version in TRITON_VERSIONS.items()
            if facts.versions.get(name) != version
        ]
        if missing:
            return [
                Problem(
                    f"{what}, whose matmul needs {' and '.join(missing)}", "pip install 'tbik-jax[triton]'"
                )
            ]
        return [
            Problem(
                f"{what}: the matmul has a kernel, the rest runs references", "expect it slow", wrong=False
            )
        ]
    return [
        Problem(
            f"{what}: no kernel is made for it, references run",
            "expect it slow; use Hopper (9.x)",
            wrong=False,
        )
    ]


def _links(facts: Facts) -> list[Problem]:
    slow = {pair: link for pair, link in facts.links.items() if link in _SLOW_LINKS}
    if not slow:
        return []
    pair, link = next(iter(slow.items()))
    text = f"{len(slow)} of {len(facts.links)} pairs of GPUs have no NVLink ({pair}: {link})"
    return [Problem(text, "prefer data over tp across such pairs; bits are the same", wrong=False)]
