"""Products of the few rows of a decoding step, with the norm before them and the sum of their leaves behind."""
