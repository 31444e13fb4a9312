"""Rows read by number equal `json.load` of the whole file; broken rows are located."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.data import json_rows as rows
from pilot_flwr.data.json_rows import RowFile, open_rows
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
        ('[{"a": 1}, 5]', r"row 2 .* at byte 11 \(not a JSON object\)"),
        ('[{"a": 1},]', r"row 2 .* at byte 10 \(a comma, but no row\)"),
        ('[{"a": 1}', r"row 2 .* at byte 9 \(the file ends without a '\]'\)"),
        ('[{"a": 1}, {"a": "tex', r"row 2 .* at byte 17 \(Unterminated string"),
        ("[", r"row 1 .* at byte 1 "),
        ('[{"a": 1}] x', "continues after its array, at byte 11"),
        ("[" + '{"a":' * 100_000, r"row 1 .* \(too deeply nested\)"),
        ('[{"a": ' + "1" * 5000 + "}]", r"row 1 .* \(a number too long\)"),
        ("", "is empty but must be a JSON array"),
        (" \n", "is empty but must be a JSON array"),
        ('"text"', "begins with something else but must be"),
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
    read = rows._Cursor.read
    monkeypatch.setattr(rows._Cursor, "read", lambda walk: reads.append(1) or read(walk))
    with pytest.raises(DataError, match="row 1 is broken"):
        RowFile(path, chunk=64)
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a" 1}', "is broken JSON"),
        (b"", "is broken JSON"),
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


def test_a_row_that_is_not_utf8_in_an_array_is_its_own_error(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xff"}, {"a": "x"}]')
    found = RowFile(path)
    assert found[1] == {"a": "x"}
    with pytest.raises(DataError, match="row 1 is not UTF-8"):
        found[0]


def test_a_row_longer_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST_ROW", 100)
    long = json.dumps({"a": "x" * 500})
    with pytest.raises(DataError, match="row 1 is broken JSON"):
        RowFile(written(tmp_path / "a.json", f"[{long}]"), chunk=10)
    with pytest.raises(DataError, match="row 1 has more than 100 bytes"):
        RowFile(written(tmp_path / "a.jsonl", long))[0]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
def test_a_line_is_read_in_pieces_and_is_one_row(tmp_path, monkeypatch, end):
    """Lines longer than a piece, equal to one, and one byte longer; none is read at once."""
    monkeypatch.setattr(rows, "LARGEST_ROW", 20)
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
        with pytest.raises(DataError, match=f"^{name} (cannot be opened|is not a file)"):
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
