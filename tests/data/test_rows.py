"""Rows read by number equal `json.load` of the whole file; broken rows are located."""

import gzip
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.data import json_rows, json_text
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.data.row_files import open_rows
from pilot_flwr.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5)
HARD = [{"a": 'é\u2028\U0001f600 "]}, [{ \\'}, {}, {"b": {"c": [1, -2.5e3, None, True]}}]


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@given(ROWS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_an_array_has_the_rows_that_json_reads(tmp_path_factory, expected, indent, ascii, chunk):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    written(path, f" {json.dumps(expected, indent=indent, ensure_ascii=ascii)}\n")
    found = RowFile(path, chunk=chunk)
    assert [found[n] for n in range(len(found))] == list(found) == expected


@given(ROWS.filter(bool), st.booleans())
def test_lines_are_the_rows_that_json_reads(tmp_path_factory, expected, ascii):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    expected = [{}, *expected]  # an object alone in its file may be more than a row
    written(path, "\r\n".join(json.dumps(row, ensure_ascii=ascii) for row in expected) + "\n\n \n")
    found = RowFile(path)
    assert not found.is_array
    assert [found[n] for n in range(len(found))] == list(found) == expected


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_hard_characters_and_a_byte_order_mark(tmp_path, chunk):
    path = written(tmp_path / "a.json", "\ufeff" + json.dumps(HARD, ensure_ascii=False))
    found = RowFile(path, chunk=chunk)
    assert found[-3:] == HARD and found[-1] == HARD[-1]
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a" 2}]', r"row 2 is broken JSON at byte 16 \(Expecting ':' delimiter\)"),
        ('[{"a": 1} {"a": 2}]', r"row 2 .* at byte 10 \(no comma before it\)"),
        ('[{"a": 1},]', r"row 2 .* at byte 10 \(a trailing comma; remove it\)"),
        ('[{"a": 1}', r"row 2 .* at byte 9 \(the file ends without a '\]'\)"),
        ('[{"a": 1}, {"a": "tex', r"row 2 .* at byte 17 \(Unterminated string"),
        ("[", r"row 1 .* at byte 1 "),
        ('[{"a": 1}] x', "continues after its array, at byte 11"),
        ("[" + '{"a":' * 100_000, r"row 1 .* \(too deeply nested\)"),
        ('[{"a": ' + "1" * 5000 + "}]", r"row 1 .* \(a number too long\)"),
        ("", "is empty; it must be JSON"),
        (" \n", "has only white space; it must be JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_a_broken_array_names_row_and_byte(tmp_path, text, message, chunk):
    path = written(tmp_path / "bad.json", text)
    with pytest.raises(DataError, match=f"^bad.json.* ?{message}"):
        RowFile(path, chunk=chunk)


def test_a_broken_array_is_not_read_to_its_end(tmp_path, monkeypatch):
    """An error in the middle of a row is known at once; only a string may just be cut."""
    path = written(tmp_path / "bad.json", '[{"a" 1}, ' + " " * 10_000 + "]")
    reads = []
    read = json_text.Cursor.read
    monkeypatch.setattr(json_text.Cursor, "read", lambda walk: reads.append(1) or read(walk))
    with pytest.raises(DataError, match="row 1 is broken"):
        RowFile(path, chunk=64)
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a" 1}', "is broken JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"a": 1} {"b": 2}', "has more than one JSON value on its line"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a":' * 100_000, r"is broken JSON \(too deeply nested\)"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"is broken JSON \(a number too long\)"),
    ],
)
def test_a_broken_line_leaves_the_others_readable(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}')
    found = RowFile(path)
    assert len(found) == 3 and found[0] == {"a": 1} and found[2] == {"a": 3}
    with pytest.raises(DataError, match=f"^rows.jsonl, row 2 {message}") as error:
        found[1]
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"a": "\xff"}', "is not UTF-8; if its file is in Latin-1 or Windows-1252, convert it"),
        (b"5", "is not a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "has the key 'c' twice"),
    ],
)
def test_a_row_of_an_array_that_cannot_be_used_is_its_own_error(tmp_path, row, message):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + row + b', {"a": "x"}]')
    found = RowFile(path)
    assert found[1] == {"a": "x"}
    with pytest.raises(DataError, match=f"row 1 {message}"):
        found[0]


def test_a_row_longer_than_the_bound_is_refused(tmp_path, monkeypatch):
    for module in (json_rows, json_text):
        monkeypatch.setattr(module, "LARGEST_VALUE", 100)
    long = json.dumps({"a": "x" * 500})
    with pytest.raises(DataError, match="row 1 is broken JSON"):
        RowFile(written(tmp_path / "a.json", f"[{long}]"), chunk=10)
    with pytest.raises(DataError, match="row 1 has more than 100 bytes"):
        RowFile(written(tmp_path / "a.jsonl", long))[0]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
def test_a_line_is_read_in_pieces_and_is_one_row(tmp_path, monkeypatch, end):
    """Lines longer than a piece, equal to one, and one byte longer; none is read at once."""
    monkeypatch.setattr(json_rows, "LARGEST_VALUE", 20)
    lines = [json.dumps({"a": "x" * n}) for n in (1, 11, 12, 13, 32, 100)]
    assert [len(line) for line in lines] == [10, 20, 21, 22, 41, 109]
    path = written(tmp_path / "a.jsonl", "\n".join([*lines, lines[0]]) + end)
    sizes = []

    class Bounded(io.BufferedReader):
        def readline(self, size=-1):
            sizes.append(size)
            return super().readline(size)

        def __next__(self):
            raise AssertionError("a line was read whole")

    monkeypatch.setattr(Path, "open", lambda self, mode: Bounded(io.FileIO(self)))
    found = RowFile(path)
    assert len(found) == 7 and found[0] == found[6] == {"a": "x"}
    assert set(sizes) == {20}
    with pytest.raises(DataError, match="row 6 has more than 20 bytes"):
        found[5]


def test_a_file_that_changes_is_an_error_not_other_rows(tmp_path):
    path = written(tmp_path / "rows.json", '[{"a": 1}]')
    found = RowFile(path)
    written(path, '[{"abc": 1}]')
    with pytest.raises(DataError, match=r"rows.json has changed"):
        found[0]
    with pytest.raises(DataError, match=r"rows.json has changed"):
        list(found)


def test_a_file_is_walked_through_once_a_process_until_it_changes(tmp_path):
    path = written(tmp_path / "rows.json", '[{"a": 1}]')
    assert open_rows(path) is open_rows(path)
    written(path, '[{"a": 1}, {"a": 2}]')
    assert len(open_rows(path)) == 2


@pytest.mark.parametrize("name", ["absent.json", "folder"])
def test_what_is_no_file_is_refused_without_its_folder(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for read in (open_rows, RowFile):
        with pytest.raises(DataError, match=f"^{name} (cannot be opened|is a folder, but)"):
            read(tmp_path / name)


@pytest.mark.slow
def test_memory_of_a_large_array_is_bounded(tmp_path):
    """100,000 rows of 2 kB, 200 MB: the process grows by less than a tenth of the file."""
    path = tmp_path / "large.json"
    row = json.dumps({"id": "x", "conversations": [{"from": "human", "value": "w " * 1000}]})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 1000))
        for _ in range(99):
            file.write(",\n" + ",\n".join([row] * 1000))
        file.write("]")
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from pilot_flwr.data.json_rows import RowFile\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); rows = RowFile(Path(sys.argv[1])); n = sum(1 for _ in rows)\n"
        "print(n, peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 100_000
    assert path.stat().st_size > 2e8 and grown < 3e7


PLAIN = [{"id": "1", "a": "é"}, {"id": "2", "a": "\U0001f600"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in PLAIN)
TURNS = '"conversations": [{"from": "human", "value": "q"}]'


@pytest.mark.parametrize("text", [json.dumps(PLAIN), json.dumps(PLAIN, indent=1), LINES])
@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_gzip_and_line_ends_are_read(tmp_path, text, encoding, pack, end):
    path = tmp_path / "rows.json"
    path.write_bytes(pack(text.replace("\n", end).encode(encoding)))
    found = RowFile(path)
    assert list(found) == [row for row in found.scan()] == PLAIN
    written(path, "[]")
    with pytest.raises(DataError, match="has changed"):
        found[0]


def test_blank_lines_are_skipped_and_rows_keep_their_line_numbers(tmp_path):
    path = written(tmp_path / "a.jsonl", '\n \n{"a": 1}\r\n\r\n\t\n\ufeff{"a": 2}\n\n{"a" 3}\n\n')
    found = RowFile(path)
    assert len(found) == 3 and found[0] == {"a": 1} and found[-2] == {"a": 2}
    assert [found.row_number(n) for n in range(3)] == [3, 6, 8]
    with pytest.raises(DataError, match="a.jsonl, row 8 is broken"):
        found[2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"[]", mtime=0)[:12], "is a gzip file that is truncated or damaged"),
        (gzip.compress(b"PK\x03\x04", mtime=0), "is a zip archive, not JSON: unpack it"),
        (b"a.json".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive, not JSON: unpack it"),
        (pickle.dumps([{"a": 1}]), "is a Python pickle, which is never loaded, not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer.* `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html>", "is an HTML page, not JSON: download"),
        (b"<html><body>404", "is an HTML page"),
        (b"<?xml version='1.0'?>", "is XML"),
        ("[1".encode("utf-16")[:-1], "is binary data or broken UTF-16, not JSON"),
        (b"\x01\x02\x03\x04\x05\0\0\0", "is binary data"),
        (b"\x1aE\xdf\xa3abc", "is binary data"),
        (b'\x04"M\x18abc', "is compressed with lz4, not JSON: unpack it"),
        (b"// rows\n[]", "begins with a comment, not JSON: remove"),
        (b"# rows\n[]", "begins with a comment"),
        (b"id,image,question\n1,a.png,q\n", r"is a table in text form \(CSV\)"),
        (b'"id"\t"image"\n', r"is a table in text form \(CSV\)"),
        (b"- id: 1\n", "is YAML"),
        (b"var rows = [", "is JavaScript"),
        (b"('id', 1)", "is Python's notation"),
        (b'"[{}]"', "is a JSON string, perhaps rows encoded twice"),
        (b"null", "must be JSON, but begins with neither"),
        (b"[{'id': 1}]", "row 1 .*a single quote, as Python prints strings"),
        (b'[{"id": True}]', "row 1 .*Python's notation"),
        (b'[{"id": 1} // one\n]', "continues|no comma"),
        (b'[{"id": 1, // one\n"a": 2}]', "row 1 .*a comment, which JSON does not allow"),
        (b'[{"id": 1,}]', "row 1 .*a comma before the closing bracket"),
        (b'[{"id": "a\nb"}]', "row 1 .*a line break or other control character"),
        ("[{“id”: 1}]".encode(), "row 1 .*a typographic quotation mark"),
        (b"[{}]\n[{}]", "continues after its array, at byte 5; put all into one array"),
        (b'{"data": [{"id": 1}]}', "is one object around the list of rows, `data`: save the list"),
        (b'{\n"train": [{"id": 1}],\n"test": [{"id": 1}]}', "list of rows, `train`, `test`"),
        (b'{"rows": [\n' + b'{"id": "xxxxxxxx"},\n' * 3 + b"oops", "list of rows, `rows`"),
        (b'{"0": {"id": 1}, "1": {"id": 2}}', "is one object with a row for each key"),
        (b'{"id": {"0": 1}, "a": {"0": 2}}', 'has columns instead of rows.*orient="records"'),
        (b'{"id": [1, 2], "a": [3, 4]}', "has columns instead of rows"),
        (b'{"columns": ["id"], "index": [0], "data": [[1]]}', "has columns instead of rows"),
        (f'{{\n"id": 1,\n{TURNS}\n}}\n{{"id": 2}}'.encode(), "has rows on several lines"),
        (f'{{\n"id": 1,\n{TURNS}\n}}'.encode(), "has rows on several lines"),
        (b'{\n"id": 1,\n"a": }\n', "has rows on several lines"),
    ],
)
def test_what_else_a_file_is_is_said_in_words(tmp_path, data, message):
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(DataError, match=f"^rows.json.* ?{message}"):
        RowFile(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'id': 1}", "a single quote"),
        ('{"id": None}', "Python's notation"),
        ('{"id": 1},', "a comma after it on its line"),
        ('{"id": 1, "id": 2}', "the key 'id' twice"),
        ('{"id": "1', "Unterminated string"),
    ],
)
def test_a_line_that_is_no_row_says_why(tmp_path, line, message):
    found = RowFile(written(tmp_path / "a.jsonl", f'{line}\n{{"id": 2}}\n'))
    assert found[1] == {"id": 2}
    with pytest.raises(DataError, match=rf"a\.jsonl, row 1 .*{message}"):
        found[0]


def test_one_row_may_stand_alone_in_its_file(tmp_path):
    assert len(RowFile(written(tmp_path / "a.jsonl", f'{{"id": 1, {TURNS}}}'))) == 1


def test_an_empty_array_is_no_file_of_rows(tmp_path):
    with pytest.raises(DataError, match="^a.json has no rows"):
        open_rows(written(tmp_path / "a.json", "[]"))
