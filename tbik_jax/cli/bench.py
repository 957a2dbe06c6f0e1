EXAMPLE = "x"


def bench():
    pass
