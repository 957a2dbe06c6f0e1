"""Sampling: the argmax of logits with Gumbel noise."""
