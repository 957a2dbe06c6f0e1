"""Log-softmax over a vocabulary, as a tree of leaves."""
