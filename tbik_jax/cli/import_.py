EXAMPLE = "x"


def import_():
    pass
