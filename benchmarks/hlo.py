"""What a compiled program consists of, and what of it is left to XLA's choice."""

import collections
import re

FLOAT = r"(?:f16|bf16|f32|f64)\["
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$", re.M)
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
#: What takes no time on a device, or what another instruction has begun.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
}


def ordered_by_xla(hlo: str) -> list[str]:
    """Lines of a program whose order of adds XLA chose: float dots, float sums and products, float all-reduces.

    A scatter counts where it adds or multiplies and its places may meet.
    """
    adds = set()
    for _, name, body in _COMPUTATION.findall(hlo):
        if re.search(rf"= {FLOAT}\]\S* (?:add|multiply)\(", body):
            adds.add(name)
    found = []
    for line in hlo.splitlines():
        result = line.partition(" = ")[2]
        kind = re.search(
            r" (dot|ragged-dot|convolution|triangular-solve|fft|reduce-scatter|all-reduce|reduce|reduce-window"
            r"|select-and-scatter|scatter)(?:-start)?\(",
            result,
        )
        if kind and re.search(FLOAT, result[: kind.start()]):
            region = re.search(r"(?:to_apply|scatter)=%?([\w.\-]+)", line)
            if kind[1] in ("reduce", "reduce-window", "scatter", "select-and-scatter"):
                orders = bool(region and region[1] in adds)
            else:
                orders = True
            if orders and not (kind[1] == "scatter" and "unique_indices=true" in line):
                found.append(line)
        target = re.search(r'custom_call_target="([^"]*)"', line)
        if target and re.search(r"matmul|gemm|dot|onednn|cublas|cudnn|cub\$DeviceScan", target[1]):
            found.append(line)
    return found


def rounded_by_xla(hlo: str) -> list[str]:
    """Lines of float functions of which a backend has several versions, or which it may approximate."""
    functions = (
        "exponential|exponential-minus-one|log|log-plus-one|rsqrt|tanh|logistic|power"
        "|sine|cosine|tan|atan2|erf|cbrt"
    )
    return [line for line in hlo.splitlines() if re.search(rf" = {FLOAT}[^=]* (?:{functions})\(", line)]


def launched(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """How often a program's text has each Mosaic kernel, by name, and each of XLA's instructions, by opcode.

    What stands in a loop counts once; what XLA has fused counts as "fusion".
    """
    inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", hlo))
    kernels: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for _, name, body in _COMPUTATION.findall(hlo):
        if name in inner:
            continue
        for line in _INSTRUCTION.findall(body):
            opcode = _OPCODE.search(" " + line)
            if not opcode or opcode[1] in _FREE or opcode[1].endswith("-done"):
                continue
            kernel = re.search(
                r'custom_call_target="mosaic_gpu[^"]*".*?op_name="[^"]*?([\w.\-]+)/[^/"]*"', line
            )
            if kernel:
                kernels[kernel[1]] += 1
            else:
                others[opcode[1].removesuffix("-start")] += 1
    return dict(kernels), dict(others)
