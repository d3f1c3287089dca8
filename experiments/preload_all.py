"""What pieces of several experiments need, imported once by the server that their processes are forked from."""

from contextlib import suppress

with suppress(Unavailable):  # a method that needs one of these says so itself
    detectors()
with suppress(ImportError):
    pass
with suppress(ImportError):
    pass
with suppress(ImportError):
    pass

__all__: list[str] = []
