"""The checks behind `tbik-jax verify` notice an op or a collective that adds in another order."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.verify import Broken, Check, meshes, ops, run_checks
from tbik_jax.verify.checks import device_key, differs, expected_fingerprints, same
from tbik_jax.verify.keep import keep


def test_same_sees_one_bit_and_says_where():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y = x.copy()
    same(x, y, "equal")
    y[1, 2] = np.nextafter(y[1, 2], np.float32(9))
    with pytest.raises(Broken, match=r"rows: 1 of 6 elements differ, the first at \(1, 2\)"):
        same(x, y, "rows")
    with pytest.raises(Broken, match="zero: 1 of 1"):
        same(np.float32([0.0]), np.float32([-0.0]), "zero")
    with pytest.raises(Broken, match="this check could not fail"):
        differs(x, x.copy(), "twin")


def one(value=0, error=None):
    def run():
        if error is not None:
            raise error
        return np.asarray(value)

    return [Check("an op", "something", run)]


def test_results():
    (good,) = run_checks(one(), limit=9, kept={})
    assert good.ok and good.detail == "" and good.fingerprint
    (kept,) = run_checks(one(), limit=9, kept={"an op": good.fingerprint})
    assert kept.ok and kept.detail == "the bits that are kept"
    (other,) = run_checks(one(1), limit=9, kept={"an op": good.fingerprint})
    assert other.ok is False and "other bits than those kept for cpu" in other.detail
    (broken,) = run_checks(one(error=Broken("row 3")), limit=9, kept={})
    assert broken.ok is False and broken.detail == "row 3" and broken.fingerprint is None
    (failed,) = run_checks(one(error=RuntimeError("no\nptxas")), limit=9, kept={})
    assert failed.ok is False and failed.detail == "RuntimeError: no ptxas"
    (late,) = run_checks(one(), limit=-1, kept={})
    assert late.ok is None and "not reached" in late.detail


def test_a_product_whose_leaves_follow_the_rows_is_noticed(monkeypatch):
    def follows(x, w, leaves, **options):
        return right(x, w, leaves if len(x) > 1 else max(1, leaves // 2), **options)

    right = ops.tree_matmul
    monkeypatch.setattr(ops, "tree_matmul", follows)
    with pytest.raises(Broken, match="row 0 alone: "):
        ops._matmul(jnp.bfloat16)


def test_a_product_that_is_wrong_is_noticed(monkeypatch):
    right = ops.tree_matmul
    monkeypatch.setattr(ops, "tree_matmul", lambda x, w, **options: right(x.at[0, 7].add(1), w, **options))
    with pytest.raises(Broken, match=r"against exact arithmetic: [1-9]"):
        ops._exact_matmul()


def test_a_sum_in_another_order_is_noticed(monkeypatch):
    monkeypatch.setattr(
        meshes, "tree_psum", lambda x, axis, transport: functools.reduce(jnp.add, jax.lax.all_gather(x, axis))
    )
    with pytest.raises(Broken, match="tree_psum by choice over 4"):
        meshes._collectives(4)


def test_keeping_fingerprints(tmp_path):
    file, result = tmp_path / "expected.json", tmp_path / "result.json"
    file.write_text('{"another": {"op": "1"}}')
    check = {"name": "op", "ok": True, "fingerprint": "2"}
    result.write_text(json.dumps({"device": "mine", "checks": [check]}))
    keep([result], file)
    assert json.loads(file.read_text()) == {"another": {"op": "1"}, "mine": {"op": "2"}}
    result.write_text(json.dumps({"device": "mine", "checks": [check | {"ok": False, "fingerprint": None}]}))
    with pytest.raises(ValueError, match="op did not hold; nothing is kept"):
        keep([result], file)


def test_every_check_of_a_cpu_has_its_bits_kept():
    """They are compared where docs/cli.md is tried; another machine than x86-64 has none yet."""
    names = {check.name for check in [*ops.op_checks(), *meshes.mesh_checks()]}
    assert "x86_64" not in device_key() or set(expected_fingerprints()) == names
