"""Causal grouped-query attention over a KV cache, in fixed blocks from position 0."""
