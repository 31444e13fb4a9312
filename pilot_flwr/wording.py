"""Words for people: the line of an error that matters, durations, sizes, counts."""


def headline(reason: str) -> str:
    """Return the one line of an error reply that says what went wrong.

    Of a traceback this is the last exception that is not Flower's or Ray's wrapper around the
    client's own; of anything else the first line.
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
    """Return `text` without terminal colours."""
    first, *rest = text.split("\x1b[")
    return first + "".join(part[part.find("m") + 1 :] for part in rest)


def human_seconds(seconds: float) -> str:
    """Word a duration: ``3.1 s``, ``2 min 5 s``, ``1 h 3 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def human_bytes(size: float) -> str:
    """Word a number of bytes in steps of 1,000: ``640 B``, ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count(number: int, what: str) -> str:
    """Word a number of things: ``1 client``, ``9 clients``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _is_exception(line: str) -> bool:
    name, _, message = line.partition(":")
    kind = name.rsplit(".", 1)[-1]
    if not name.replace(".", "_").isidentifier() or kind == "ClientAppException":
        return False
    return kind[:1].isupper() and (bool(message.strip()) or kind.endswith("Error"))
