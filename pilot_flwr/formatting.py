"""Format text for users: an error's decisive line, durations, sizes, counts."""

import re

LONGEST_REASON = 2000
"""In characters."""

_TERMINAL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI, 7-bit and 8-bit: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS …
    r"|\x1b[ -/]+[0-~]|\x1b[0-Z\\^-~]"  # other escape sequences, such as charset selection
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # the rest, but tab and newline
)


def headline(reason: str) -> str:
    """Return the decisive line of an error reply.

    This is a traceback's last exception other than Flower's and Ray's wrappers, or the first line
    of any other text.
    """
    text = plain(reason).strip()
    if text.startswith("<class '") and ">:<" in text:  # Flower's `<class 'E'>:<'message'>`
        text = text.split(">:<", 1)[1].removesuffix(">").strip("'\"")
    lines = [line for line in text.splitlines() if line.strip()]
    if 'File "' in text:
        raised = [line for line in lines if _is_exception(line)]
        lines = raised[-1:] or lines[-1:]
    return lines[0].strip() if lines else "no reason given"


def plain(text: str) -> str:
    """Remove terminal control sequences, and all control characters but tab and newline."""
    return _TERMINAL.sub("", text)


def one_line(text: str) -> str:
    """Return untrusted text as one printable line, shortened to about `LONGEST_REASON`."""
    half = LONGEST_REASON // 2
    line = " ".join(plain(bounded(text)).split())
    line = "".join(character for character in line if character.isprintable())
    if len(line) <= LONGEST_REASON:
        return line
    return f"{line[:half]} […] {line[-half:]}"


def bounded(text: str) -> str:
    """Return `text`, shortened to its beginning and end if it is very long."""
    half = 5 * LONGEST_REASON
    return text if len(text) <= 2 * half else f"{text[:half]}\n{text[-half:]}"


def human_seconds(seconds: float) -> str:
    """Format a duration: ``3.1 s``, ``2 min 5 s``, ``1 h 3 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def human_bytes(size: float) -> str:
    """Format a number of bytes, in powers of 1,000: ``640 B``, ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count(number: int, noun: str) -> str:
    """Format a count with its noun: ``1 client``, ``9 clients``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_exception(line: str) -> bool:
    name, _, message = line.partition(":")
    kind = name.rsplit(".", 1)[-1]
    if not name.replace(".", "_").isidentifier() or kind == "ClientAppException":
        return False
    return kind[:1].isupper() and (bool(message.strip()) or kind.endswith("Error"))
