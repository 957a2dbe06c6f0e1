"""What is wrong with an installation, told from its facts, each with what to do."""

import dataclasses

import pytest

from tbik_jax.verify import Facts, collect_facts, problems
from tbik_jax.verify.facts import Device, parse_links

CPU = Device(kind="cpu", platform="cpu", capability=None, memory_gib=None)
H200 = Device(kind="NVIDIA H200", platform="gpu", capability="9.0", memory_gib=105.0)
VERSIONS = {"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.10"}
CUDA13 = {"jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.11.2"}

SOUND = Facts(
    python="3.12.1",
    machine="x86_64",
    versions=VERSIONS | CUDA13,
    variables={},
    gpus=("NVIDIA H200",) * 2,
    driver="580.159.04",
    devices=(H200, H200),
    messages=(),
    links={"GPU0-GPU1": "NV18"},
)


def facts(**changes):
    return dataclasses.replace(SOUND, **changes)


def test_a_sound_installation_has_no_problem():
    assert problems(SOUND) == []


ON_CPU = {"devices": (CPU,)}
WRONG = {
    "wrong JAX": (
        {"versions": VERSIONS | CUDA13 | {"jax": "0.10.0", "jaxlib": "0.10.0"}},
        "0.10.0 is installed",
        "pip install 'jax>=0.11.2,<0.12'",
    ),
    "jaxlib": (
        {"versions": VERSIONS | CUDA13 | {"jaxlib": "0.11.1"}},
        "jax is 0.11.2 and jaxlib 0.11.1",
        "pip install jaxlib==0.11.2",
    ),
    "no plugin": (
        ON_CPU | {"versions": VERSIONS},
        "2 x NVIDIA H200 is here and JAX runs on the CPU: JAX has no CUDA plugin",
        "pip install 'jax[cuda13]==0.11.2'",
    ),
    "wrong plugin": (
        ON_CPU | {"versions": VERSIONS | CUDA13 | {"jax-cuda13-plugin": "0.11.0"}},
        "jax-cuda13-plugin is 0.11.0 and jaxlib 0.11.2: JAX does not use it",
        "pip install 'jax[cuda13]==0.11.2'",
    ),
    "no pjrt": (
        {"versions": VERSIONS | {"jax-cuda13-plugin": "0.11.2"}},
        "jax-cuda13-pjrt is None and jaxlib 0.11.2",
        "pip install 'jax[cuda13]==0.11.2'",
    ),
    "two plugins": (
        {"versions": VERSIONS | CUDA13 | {"jax-cuda12-plugin": "0.11.2"}},
        "two CUDA plugins are installed",
        "pip uninstall jax-cuda12-plugin",
    ),
    "old driver": (
        {"driver": "550.54.15"},
        "the NVIDIA driver 550.54.15 is older than CUDA 13 needs (580)",
        "pip install 'jax[cuda12]' instead, or update the driver",
    ),
    "plugin fails": (
        ON_CPU | {"messages": ("CUDA backend failed to initialize: cuSPARSE library was not found.",)},
        "JAX says: CUDA backend failed to initialize: cuSPARSE library was not found.",
        "--force-reinstall",
    ),
    "several kinds": (
        {"devices": (H200, dataclasses.replace(H200, kind="NVIDIA H100"))},
        "devices of several kinds (NVIDIA H100, NVIDIA H200)",
        "CUDA_VISIBLE_DEVICES",
    ),
    "no triton": (
        {"devices": (dataclasses.replace(H200, kind="NVIDIA A100", capability="8.0"),)},
        "compute capability 8.0, whose matmul needs triton==3.6.0 and jax-triton==0.3.1",
        "pip install 'tbik-jax[triton]'",
    ),
    "no CPU": ({"variables": {"JAX_PLATFORMS": "cuda"}}, "leaves out the CPU", "set it to cuda,cpu"),
}
NOTES = {
    "no GPU": (
        ON_CPU | {"gpus": (), "driver": None, "versions": VERSIONS},
        "no NVIDIA GPU is to be seen",
        "install the NVIDIA driver",
    ),
    "asked for CPU": (
        ON_CPU | {"variables": {"JAX_PLATFORMS": "cpu"}},
        "JAX_PLATFORMS='cpu' is set",
        "unset JAX_PLATFORMS",
    ),
    "hidden": (
        ON_CPU | {"variables": {"CUDA_VISIBLE_DEVICES": ""}},
        "CUDA_VISIBLE_DEVICES='' is set",
        "unset",
    ),
    "Blackwell": (
        {"devices": (dataclasses.replace(H200, kind="NVIDIA B200", capability="10.0"),)},
        "no kernel is made for it",
        "use Hopper",
    ),
    "flags": ({"variables": {"XLA_FLAGS": "--x"}}, "XLA_FLAGS='--x' is set and may change the bits", "unset"),
    "no NVLink": (
        {"links": {"GPU0-GPU1": "SYS"}},
        "1 of 1 pairs of GPUs have no NVLink",
        "prefer data over tp",
    ),
}


@pytest.mark.parametrize(("changes", "text", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong(changes, text, remedy):
    found = problems(facts(**changes))
    assert found[0].wrong and any(text in each.text and remedy in each.remedy for each in found), found


@pytest.mark.parametrize(("changes", "text", "remedy"), NOTES.values(), ids=NOTES.keys())
def test_what_is_worth_a_note(changes, text, remedy):
    (found,) = problems(facts(**changes))
    assert not found.wrong and text in found.text and remedy in found.remedy


MATRIX = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0
GPU1\tNV18\t X \tNV18\tSYS\t0-47\t0
GPU2\tSYS\tNV18\t X \tSYS\t48-95\t1
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""


def test_links_are_read_from_the_drivers_matrix():
    assert parse_links(MATRIX) == {"GPU0-GPU1": "NV18", "GPU0-GPU2": "SYS", "GPU1-GPU2": "NV18"}
    assert parse_links("") == {}


def test_facts_of_a_machine_with_two_gpus():
    asked = []

    def ask(command):
        asked.append(command[1])
        return MATRIX if command[1] == "topo" else "NVIDIA H200, 580.159.04\nNVIDIA H200, 580.159.04\n"

    found = collect_facts(ask)
    assert found.gpus == ("NVIDIA H200", "NVIDIA H200") and found.driver == "580.159.04"
    assert found.links["GPU0-GPU2"] == "SYS" and found.versions["jax"] == "0.11.2"
    assert [device.platform for device in found.devices] == ["cpu"] * 8
    assert collect_facts(lambda command: None).gpus == ()
