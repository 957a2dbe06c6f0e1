EXAMPLE = "x"


def export():
    pass
