"""Which vocabularies the Hopper kernel takes."""

LEAST = 128  # columns: one for each thread of a warpgroup


def kernel_refusal(size: int) -> str | None:
    """Why the kernel does not take `size` columns, or None if it does."""
    return None if size >= LEAST else f"{size} columns of logits are less than {LEAST}"
