"""What a Flower error reply means, in a line that a user can act on."""

import re

from flwr.app import Error

from pilot_flwr.errors import RunError
from pilot_flwr.wording import headline

_DEAD_WORKER = re.compile(  # how Flower's simulation engine words its own exceptions
    r"<class 'ray\.exceptions\.(?:RayActorError|ActorDiedError|ActorUnavailableError|"
    r"WorkerCrashedError|NodeDiedError|OutOfMemoryError|LocalRayletDiedError)'>"
)

OWN_ERROR = 1001
"""Error code of a reply in which this app itself says, in plain words, what is wrong."""


def reason_of(error: Error) -> str:
    """Return the meaningful line of an error reply: our own words, or an exception's.

    Raises
    ------
    RunError
        The reply says that a Ray worker process died. Flower keeps handing messages to it, so
        the run cannot go on.
    """
    text = (error.reason or "").strip()
    if error.code != OWN_ERROR and _DEAD_WORKER.match(text):
        raise RunError(
            "A Ray worker process died while it ran a client (often: out of memory). Flower "
            "does not replace it, so the run stops here; the last complete round is in "
            f"checkpoint/. Ray says: {headline(text)}"
        )
    return text if error.code == OWN_ERROR else headline(text)
