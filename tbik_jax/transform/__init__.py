"""Makes an existing function follow the contract, and tells what that replaces."""

from .interpreter import Entry, Report, Rule, invariant, report

__all__ = ["Entry", "Report", "Rule", "invariant", "report"]
