"""What is read off a compiled program's text."""

from benchmarks.hlo import launched, ordered_by_xla, rounded_by_xla

PROGRAM = """HloModule jit_f

%fused_add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %e = f32[4]{0} exponential(%p)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%t), index=1
  %k.1 = f32[4]{0} custom-call(%g), custom_call_target="mosaic_gpu_v2", metadata={op_name="f/norm_matmul/mpmd_map"}
  %c = f32[4]{0} copy(%k.1)
  %ags = ((u16[4]{0}), u16[32]{0}) all-gather-start(%c), dimensions={0}
  %agd = u16[32]{0} all-gather-done(%ags)
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %c)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused_add
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
  ROOT %k.2 = f32[4]{0} custom-call(%f), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/swiglu/mpmd_map"}
}
"""


def test_kernels_are_counted_by_name_and_the_rest_by_opcode():
    kernels, others = launched(PROGRAM)
    assert kernels == {"norm_matmul": 1, "swiglu": 1}
    assert others == {"copy": 1, "all-gather": 1, "fusion": 1}


def test_a_kernel_called_matmul_is_no_product_of_xla_and_a_librarys_is():
    assert ordered_by_xla(PROGRAM) == []
    for target in ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul", "__cudnn$fmhaSoftmax"):
        assert len(ordered_by_xla(f'%a = bf16[4]{{0}} custom-call(%x), custom_call_target="{target}"')) == 1


SCATTER = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8], i: s32[4,1], u: f32[4]) -> f32[8] {
  ROOT %s = f32[8]{0} scatter(%x, %i, %u), update_window_dims={}, index_vector_dim=1UNIQUE, to_apply=%add
}
"""


def test_a_scatter_orders_adds_where_its_places_may_meet():
    assert len(ordered_by_xla(SCATTER.replace("UNIQUE", ""))) == 1
    assert ordered_by_xla(SCATTER.replace("UNIQUE", ", unique_indices=true")) == []
    assert ordered_by_xla(SCATTER.replace("UNIQUE", "").replace("add(%a, %b)", "maximum(%a, %b)")) == []


def test_functions_with_several_versions_are_found_inside_fusions():
    assert len(rounded_by_xla(PROGRAM)) == 1
    assert rounded_by_xla("%m = f32[4]{0} multiply(%a, %b)\n%d = f32[4]{0} divide(%a, %b)") == []
