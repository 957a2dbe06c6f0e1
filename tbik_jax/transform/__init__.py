"""Makes an existing function follow the contract, and tells what that replaces."""

from .interpreter import invariant, report
from .rules import Entry, Report, Rule

__all__ = ["Entry", "Report", "Rule", "invariant", "report"]
