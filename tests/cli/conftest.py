"""The command line in this process, with a model small enough that programs compile in a second or two."""

import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from typer.testing import CliRunner, Result

from tbik_jax import synthetic
from tbik_jax.bench import tables
from tbik_jax.cli import app, compare, model
from tbik_jax.models import Qwen3Config

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def quick_compiler() -> Iterator[None]:
    """Half of the time would go into LLVM's optimisation, which changes no invariant bit: `verify` runs so too."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic model, the prompts that compare has (of a token each: nothing to prefill), and what is timed."""
    monkeypatch.setattr(compare, "EXAMPLES", ("a", "b", "c"))
    monkeypatch.setattr(model, "SYNTHETIC", SMALL)
    sizes = tables.Sizes(
        config=Qwen3Config.from_dict(synthetic.small_config(**SMALL)),
        rows=(3,),
        caches=((2, 128),),
        prompts=(),
        batches=(2,),
        context=4,
        steps=2,
    )
    monkeypatch.setattr(tables.Sizes, "for_cpu", classmethod(lambda cls: sizes))


@pytest.fixture
def run(small_sizes: None) -> Run:
    """Runs a command line, e.g. run("generate synthetic a --json")."""

    def invoke(line: str, **options: Any) -> Result:
        return CliRunner().invoke(app, shlex.split(line), **options)

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[[str], Any]:
    """Runs a command line with --json: all of stdout is one JSON value."""

    def invoke(line: str, status: int = 0) -> Any:
        result = run(f"{line} --json")
        assert result.exit_code == status, result.stderr
        return json.loads(result.stdout)

    return invoke
