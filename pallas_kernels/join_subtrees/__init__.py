"""The last adds of a sum whose subtrees lie apart."""
