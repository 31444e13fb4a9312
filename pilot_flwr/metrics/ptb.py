"""Penn Treebank tokens of captions, which BLEU, ROUGE-L and CIDEr-D are computed on.

The standard is the tokenizer of Stanford CoreNLP 3.4.1, a Java program that the package
pycocoevalcap brings along (``pip install 'pilot-flwr[captions]'``). Without it or without Java,
`approximate_tokens` stands in, and `why_approximate` says so.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pilot_flwr.errors import DataError

JAR = "stanford-corenlp-3.4.1.jar"

REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that the captions' metrics leave out. (Brackets stay: the official list has them in
capitals, but the tokenizer writes small letters.)"""

PROBE_SECONDS, ALL_SECONDS = 60.0, 1800.0
"""How long the program may take to show that it runs, and for a split's captions."""

_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_SPLIT = {
    **{f"{a}{b}": f"{a} {b}" for a, b in [("can", "not"), ("gon", "na"), ("wan", "na")]},
    **{f"{a}{b}": f"{a} {b}" for a, b in [("got", "ta"), ("gim", "me"), ("lem", "me")]},
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SUFFIX = r"'(?:s|m|d|ll|re|ve)\b"
_TOKEN = re.compile(
    rf"""
      {_SUFFIX}
    | (?:[a-z]\.){{2,}}                                  # p.m.
    | (?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|inc|co|ave)\.   # abbreviations
    | n't\b
    | \d+(?:[.,:/]\d+)+                                  # 10:30
    | \w+?(?=n't\b)                                      # the "is" of isn't
    | \w+(?:[-/]\w+)*(?:'(?!(?:s|m|d|ll|re|ve)\b)\w+)*   # mother-in-law, o'clock
    | \.{{3,}} | -{{2,}} | [!?]+
    | \S
    """,
    re.VERBOSE,
)


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each caption, by the standard tokenizer where it is to be had.

    Raises
    ------
    DataError
        The Java program failed, or did not answer line by line.
    """
    if why_approximate():
        return [approximate_tokens(caption) for caption in captions]
    jar = _jar()
    assert jar is not None
    return _java_tokens(captions, jar, ALL_SECONDS)


def why_approximate() -> str:
    """Return why `tokenize` does not use the standard tokenizer, or an empty text if it does."""
    jar = _jar()
    if jar is None:
        return "PTB tokenizer not installed: pip install 'pilot-flwr[captions]'"
    if shutil.which("java") is None:
        return "PTB tokenizer needs Java"
    return _trouble_with(jar)


def approximate_tokens(caption: str) -> list[str]:
    """Return the tokens that the standard tokenizer would give most captions.

    Words with hyphens, slashes and inner apostrophes, numbers and common abbreviations are one
    token; ``n't`` and ``'s`` and the like are tokens of their own. Web addresses, currencies in
    words and rarer abbreviations are not known to it.
    """
    text = caption.lower().translate(_PLAIN)
    tokens = []
    for token in _TOKEN.findall(text):
        if token.startswith("..."):
            token = "..."  # nosec B105  # a word, no password
        tokens += _SPLIT.get(token, _BRACKETS.get(token, token)).split()
    return [token for token in tokens if token not in (*REMOVED, '"')]


def _jar() -> Path | None:
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in (found.submodule_search_locations or []) if found else []:
        jar = Path(folder) / "tokenizer" / JAR
        if jar.is_file():
            return jar
    return None


@lru_cache(maxsize=1)
def _trouble_with(jar: Path) -> str:
    """Return why the program does not run, found out once per process."""
    try:
        worked = _java_tokens(["A man's hat."], jar, PROBE_SECONDS) == [["a", "man", "'s", "hat"]]
    except (DataError, OSError):
        worked = False
    return "" if worked else "PTB tokenizer needs a Java that runs"


def _java_tokens(captions: Sequence[str], jar: Path, seconds: float) -> list[list[str]]:
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    # The program answers line by line, and for it other characters than "\n" end a line as well.
    lines = [" ".join(caption.split()) for caption in captions]
    text = "".join(f"{line}\n" for line in lines)
    try:
        run = subprocess.run(  # nosec B603  # no shell; the captions are its input, not arguments
            command, input=text, capture_output=True, encoding="utf-8", check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"The PTB tokenizer did not answer within {seconds} seconds.") from None
    answer = run.stdout.split("\n")[: len(lines)]
    if run.returncode or len(answer) != len(lines):
        raise DataError(
            f"The PTB tokenizer gave {len(answer)} lines for {len(lines)} captions (exit code "
            f"{run.returncode}): {run.stderr.strip()[-300:]}"
        )
    return [[token for token in line.split() if token not in REMOVED] for line in answer]
