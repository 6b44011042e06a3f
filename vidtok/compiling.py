"""torch.compile, on a machine that may have nothing to compile with."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Run what may compile `what`, a name for the sentence; raises ValueError where torch.compile fails, as without a C++ compiler."""
    # Imported late: it takes a second, and most commands compile nothing.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"this machine cannot compile the {what} ({reason}): leave compile out") from error
