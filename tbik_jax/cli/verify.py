EXAMPLE="x"
def verify():
    pass
