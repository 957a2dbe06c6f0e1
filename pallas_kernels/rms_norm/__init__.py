"""Root-mean-square normalisation with one order of adds per row length."""
