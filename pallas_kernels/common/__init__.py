"""What the ops share: arithmetic XLA cannot re-round, the tree, the choice of backend."""
