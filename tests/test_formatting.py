"""A client's words on the user's terminal: text stays, whatever a terminal obeys goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.formatting import headline, plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[92mb\x1b[0mc", "abc"),
        ("\x1b[2Kloss 1.0 comes", "loss 1.0 comes"),
        ("\x1b[1;31mred\x1b[m \x1b[?25lhidden\x1b[10;20Hmoved", "red hiddenmoved"),
        ("\x1b[38:2::255:0:0mcolon\x1b[1 qcursor", "coloncursor"),
        ("\x9b2Kold form", "old form"),
        ("\x1b]0;window title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;Y2xpcGJvYXJk\x9crest", "rest"),
        ("\x1bPdevice string\x1b\\rest\x1b_application\x07!", "rest!"),
        ("\x1b(Bascii\x1b7saved\x1bc", "asciisaved"),
        ("\x1b]0;never ended", "]0;never ended"),
        ("\x1b[31", "[31"),
        ("\x1b", ""),
        ("bell\x07, back\x08, null\x00, delete\x7f, next\x85", "bell, back, null, delete, next"),
        ("line\r\n\tindented", "line\n\tindented"),
        ("[92m is no escape; ü ✓ 数", "[92m is no escape; ü ✓ 数"),
        ("", ""),
    ],
)
def test_plain(text, expected):
    assert plain(text) == expected


@given(st.text(st.sampled_from("\x1b\x9b\x9d\x9c\x07\\[]P;0mK(a \n\t\r"), max_size=30))
def test_no_control_character_is_left(text):
    left = plain(text)
    assert all(c in "\n\t" or c.isprintable() for c in left)
    assert plain(left) == left


def test_a_reason_cannot_write_to_the_terminal():
    assert headline("\x1b]0;owned\x07\x1b[2J\x1b[HValueError: bad row") == "ValueError: bad row"
