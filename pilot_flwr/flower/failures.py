"""Error replies: what a client tells the server of one, and what the server reads in it.

A client's log has the whole error; its reply leaves out where things are on its disk. To keep
more to the site, change `reply_text`, the one place through which an error leaves a client.
"""

import os
import re
from collections.abc import Mapping

from flwr.app import Error

from pilot_flwr.errors import PilotError, WorkerDied
from pilot_flwr.formatting import bounded, headline, one_line

_DEAD_WORKER = re.compile(  # how Flower's simulation engine words its own exceptions
    r"<class 'ray\.exceptions\.(?:RayActorError|ActorDiedError|ActorUnavailableError|"
    r"WorkerCrashedError|NodeDiedError|OutOfMemoryError|LocalRayletDiedError)'>"
)

_URL = r"(?P<url>https?://[^\s'\"<>]+)"
_ABSOLUTE = r"(?<![\w/>.~])(?:file:)?~?/+[\w.~-][^\s'\"`,;:()\[\]{}<>]*"
_QUOTED = r"(?P<quote>['\"`])(?:file:)?~?/+[\w.~-](?:(?!(?P=quote)).)*(?P=quote)"

OWN_ERROR = 1001
"""Error code of a reply in which this app itself says, in plain words, what is wrong."""


def reply_text(error: Exception, private: Mapping[str, str] | None) -> str:
    """Return what the server gets to read of a client's error.

    A typed error says it in its own words, without paths. Of any other exception, whose text may
    quote anything, a site sends the type alone, and the system's reason if it has one.

    Parameters
    ----------
    error : Exception
        What was raised.
    private : mapping or None
        The site's paths and what to write instead; None if the server is on this machine, so
        that there is nothing to keep from it.
    """
    kind = type(error).__name__
    if private is None:
        return str(error) if isinstance(error, PilotError) else f"{kind}: {headline(str(error))}"
    if isinstance(error, PilotError):
        return without_paths(str(error), private)
    number = error.errno if isinstance(error, OSError) else None
    reason = f" ({os.strerror(number)})" if number else ""
    return f"{kind}{reason}; what happened is in the client's own log."


def without_paths(text: str, private: Mapping[str, str]) -> str:
    """Replace paths: each of `private` by what it says, any other absolute one by ``<path>``.

    Of a path that is neither among `private` nor in quotes, what follows a blank stays.

    Parameters
    ----------
    text : str
        Of an error.
    private : mapping
        Path → what to write instead.
    """
    spelled = {
        form: key
        for path, key in private.items()
        for form in (path, repr(path)[1:-1], ascii(path)[1:-1])
    }
    longest_first = sorted(spelled, key=len, reverse=True)
    known = "|".join(map(re.escape, longest_first)) or r"(?!)"
    known = rf"(?:{known})(?![\w-])"
    pattern = rf"{_URL}|(?P<known>{known})|(?!.{known}){_QUOTED}|{_ABSOLUTE}"

    def instead(match: re.Match[str]) -> str:
        if match["url"]:
            return match["url"]
        quote = match["quote"] or ""
        return spelled[match["known"]] if match["known"] else f"{quote}<path>{quote}"

    return re.sub(pattern, instead, text)


def reason_of(error: Error, *, simulated: bool) -> str:
    """Return the meaningful line of an error reply: our own words, or an exception's.

    Parameters
    ----------
    error : Error
        Of a reply. All of it is what the other end chose to send, its code included.
    simulated : bool
        Whether the run is a simulation, so that error replies are Flower's own and our own.

    Raises
    ------
    WorkerDied
        A simulation's reply says that a Ray worker process died. Flower keeps handing messages
        to it, so the run cannot go on. At real sites there is no Ray, and whoever says so lies.
    """
    text = bounded((error.reason or "").strip())
    if simulated and error.code != OWN_ERROR and _DEAD_WORKER.match(text):
        raise WorkerDied(
            "A Ray worker process died while it ran a client (often: out of memory). Flower "
            "does not replace it, so the run stops here; the last complete round is in "
            f"checkpoint/. Ray says: {headline(text)}"
        )
    return one_line(text if error.code == OWN_ERROR else headline(text))
