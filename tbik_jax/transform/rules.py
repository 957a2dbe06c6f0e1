"""What a user tells `invariant`, and what `report` tells a user."""

import dataclasses
from typing import Literal

Kind = Literal["replaced", "exact", "excluded", "trusted", "uncovered"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What `invariant` does with the contractions and reductions that match.

    Attributes:
        pattern: of `fnmatch`, anywhere in "name stack, primitive, file:line:column (function)".
        leaves: of matching contractions, 1, 2, 4 or 8; None for 8.
        exclude: leave matching primitives as they are, in JAX's order; not kernels, which are trusted or refused.
        trust: leave a kernel (Pallas, Triton, a foreign function) as it is, because somebody knows that its bits do not
            depend on the batch. `pattern` is then of the kernel's whole name, and must name it: "flash_*", not "*".

    Raises:
        ValueError: a rule that asks for two things, leaves other than 1, 2, 4 or 8, or trust in everything.
    """

    pattern: str
    leaves: int | None = None
    exclude: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if (self.leaves is not None) + self.exclude + self.trust > 1:
            raise ValueError(f"{self} asks for two things; use a rule each for leaves, exclude and trust")
        if self.leaves not in (None, 1, 2, 4, 8):
            raise ValueError(f"leaves={self.leaves} is not supported; use 1, 2, 4 or 8")
        if self.trust and not self.pattern.strip("*?"):
            raise ValueError(
                f"trust in kernels named {self.pattern!r} is trust in all of them; name the kernel"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What becomes of one primitive of a function.

    Attributes:
        primitive: its name.
        kind: "replaced" by a step of the contract, "exact" as it stands, "excluded" by a rule, "trusted" (a kernel of
            this package, or of a rule), or "uncovered".
        source: file, line and function.
        reason: why it is uncovered, or what is to be known of it.
    """

    primitive: str
    kind: Kind
    source: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `invariant` would do.

    Attributes:
        entries: one a primitive of the function, in the order of its first use.
        unused_rules: rules that match nothing.
    """

    entries: tuple[Entry, ...]
    unused_rules: tuple[Rule, ...]

    def of(self, kind: Kind) -> tuple[Entry, ...]:
        """The entries of one kind."""
        return tuple(e for e in self.entries if e.kind == kind)

    def __str__(self) -> str:
        lines = [f"{e.kind:9} {e.primitive:20} {e.source} {e.reason}".rstrip() for e in self.entries]
        return "\n".join([*lines, *(f"unused rule {rule}" for rule in self.unused_rules)])
