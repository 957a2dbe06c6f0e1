"""The table of matmuls that speed is measured on."""

from benchmarks.matmul_shapes import MS, Layer, layers


def test_there_is_every_layer_of_every_model_at_every_tp():
    found = layers()
    assert len(found) == 4 * 3 * 4 + 4
    assert len({(x.layer, x.model, x.tp) for x in found}) == len(found)
    assert MS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def test_local_sizes_are_those_of_the_models():
    found = {(x.layer, x.model, x.tp): x for x in layers()}
    assert found["o_proj", "8B", 1] == Layer(layer="o_proj", model="8B", tp=1, k=4096, n=4096, leaves=8)
    assert found["o_proj", "32B", 8] == Layer(layer="o_proj", model="32B", tp=8, k=1024, n=5120, leaves=1)
    assert found["down_proj", "1.7B", 4] == Layer(
        layer="down_proj", model="1.7B", tp=4, k=1536, n=2048, leaves=2
    )
    assert found["qkv", "1.7B", 2] == Layer(
        layer="qkv", model="1.7B", tp=2, k=2048, n=2048, leaves=1, transpose_rhs=True
    )
    assert found["gate_up", "32B", 8] == Layer(
        layer="gate_up", model="32B", tp=8, k=5120, n=6400, leaves=1, transpose_rhs=True
    )
    assert found["lm_head", "8B", 8] == Layer(
        layer="lm_head", model="8B", tp=8, k=4096, n=18992, leaves=1, transpose_rhs=True
    )


def test_tp_cuts_k_and_leaves_of_row_parallel_layers_and_n_of_the_others():
    whole = {(x.layer, x.model): x for x in layers(tps=(1,))}
    for x in layers():
        one = whole[x.layer, x.model]
        if x.row_parallel:
            assert (x.k * x.tp, x.n, x.leaves * x.tp) == (one.k, one.n, 8)
        else:
            assert (x.k, x.n * x.tp, x.leaves) == (one.k, one.n, one.leaves)
        assert x.k % (16 * x.leaves) == 0 and x.n % 16 == 0


def test_weights_are_stored_nk_where_every_rank_has_the_whole_of_k():
    assert all(x.transpose_rhs is not x.row_parallel for x in layers())
    assert {x.layer for x in layers() if x.transpose_rhs} == {"qkv", "gate_up", "lm_head"}


def test_a_choice_of_layers_and_models():
    assert [(x.layer, x.model) for x in layers(("qkv", "lm_head"), ("1.7B", "8B"), (2,))] == [
        ("qkv", "1.7B"),
        ("qkv", "8B"),
        ("lm_head", "8B"),
    ]
