"""What a compiled program leaves to XLA's choice."""

import re

FLOAT = r"(?:f16|bf16|f32|f64)\["


def ordered_by_xla(hlo: str) -> list[str]:
    """Lines of a program whose order of adds XLA chose: float dots, float sums and products, float all-reduces."""
    adds = set()
    for name, body in re.findall(r"^%?([\w.\-]+)[^\n]*\{\n(.*?)^\}", hlo, re.M | re.S):
        if re.search(rf"= {FLOAT}\]\S* (?:add|multiply)\(", body):
            adds.add(name)
    found = []
    for line in hlo.splitlines():
        result = line.partition(" = ")[2]
        kind = re.search(
            r" (dot|convolution|reduce-scatter|all-reduce|reduce|reduce-window)(?:-start)?\(", result
        )
        if kind and re.search(FLOAT, result[: kind.start()]):
            region = re.search(r"to_apply=%?([\w.\-]+)", line)
            if (
                not kind[1].startswith("reduce")
                or kind[1] == "reduce-scatter"
                or (region and region[1] in adds)
            ):
                found.append(line)
        if "custom_call_target" in line and re.search(r"matmul|gemm|dot|onednn|cublas", line):
            found.append(line)
    return found
