"""Sizes that get compiled: few, so that prompts of other lengths find their program compiled already.

A program is compiled for one chunk width, one cache capacity and one output length, each rounded up to a bucket.
Buckets never change a bit: what lies past a prompt's length is padding, which no row looks at.
"""


def bucket(value: int, least: int = 16) -> int:
    """The smallest of 2**n and 1.5 * 2**n, from `least` (a power of two) on, that is not below `value`.

    At most a third of it is padding, from `least` on.
    """
    power = least
    while power < value:
        if power * 3 // 2 >= value:
            return power * 3 // 2
        power *= 2
    return power


def capacity_bucket(positions: int) -> int:
    """Positions of a cache for `positions`: a bucket that is a whole number of attention blocks of 64 or 128 keys."""
    return bucket(positions, 256) if positions > 128 else 128


def capacity_that_fits(positions: int) -> int:
    """The largest capacity that is a bucket and not above `positions`; 0 if none is."""
    largest = 0
    while (size := capacity_bucket(largest + 1)) <= positions:
        largest = size
    return largest
