"""A packet on a site's socket arrives whole and unchanged, or not at all."""

import json
import os
import socket
import string

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot_flwr.errors import RunError
from pilot_flwr.site import transport
from pilot_flwr.site.transport import (
    SOCKET,
    HungUp,
    Memory,
    connect,
    listen,
    receive,
    send,
    send_message,
)

names = st.text(string.ascii_letters + ".-é ", min_size=1, max_size=9)
scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text()
)
numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
arrays = st.lists(st.floats(width=32, allow_nan=False), max_size=40).map(
    lambda values: Array(np.array(values, np.float32))
)
records = st.one_of(
    st.dictionaries(names, scalars, max_size=3).map(ConfigRecord),
    st.dictionaries(names, numbers, max_size=3).map(MetricRecord),
    st.dictionaries(names, arrays, max_size=3).map(ArrayRecord),
)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def post(connection, packet, content):
    with Memory() as memory:
        send_message(connection, packet, content, memory)


def seen(content):
    """Return a content's values, with the types of its records."""
    return {
        name: (
            type(record),
            {
                key: (v.dtype, v.shape, v.stype, bytes(v.data)) if isinstance(v, Array) else v
                for key, v in record.items()
            },
        )
        for name, record in content.items()
    }


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, records, max_size=4))
def test_a_message_arrives_as_it_was_sent(parts):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = seen(RecordDict(parts))
        post(ours, {"kind": "train", "long": "x" * 10**6}, RecordDict(parts))
        packet, content = receive(theirs)
    assert packet == {"kind": "train", "long": "x" * 10**6}
    assert seen(content) == before


def test_the_senders_arrays_are_released_and_a_shared_record_is_not_changed(pair):
    shared = ArrayRecord({"w": Array(np.zeros(5))})
    content = RecordDict({"lora": shared, "run": ConfigRecord({"name": "x"})})
    post(pair[0], {}, content)
    assert list(content) == ["run"] and list(shared) == ["w"]


def test_an_end_is_noticed_by_both_sides(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(HungUp):
        receive(ours)
    with pytest.raises(HungUp):
        send(ours, {})
    with pytest.raises(HungUp):
        post(ours, {}, RecordDict())


def test_a_reader_that_is_stopped_stops_no_log(pair):
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            send(pair[0], {"text": "x" * 1000}, wait=False)
    assert receive(pair[1])[0] == {"text": "x" * 1000}


def test_any_line_of_a_log_arrives(pair):
    for text in ("患" * 20_000, "\U0001f600" * 20_000, "\x00" * 20_000, "\ud800" * 20_000):
        send(pair[0], {"text": text[: transport.LONGEST_TEXT]})
        assert len(receive(pair[1])[0]["text"]) == transport.LONGEST_TEXT


def raw(data: bytes, *, seal: bool = True, index: list[int] | None = None):
    """Return a function that sends a memory file of these bytes and the offset of its index."""

    def do(connection):
        file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.write(file, data)
        if seal:
            transport.fcntl.fcntl(file, transport.fcntl.F_ADD_SEALS, transport.fcntl.F_SEAL_SHRINK)
        place = index if index is not None else [0, len(data)]
        socket.send_fds(connection, [json.dumps(place).encode()], [file])
        os.close(file)

    return do


EMPTY = {"packet": {}, "config": {}, "metrics": {}, "arrays": {}}
OUTSIDE = EMPTY | {"arrays": {"lora": {"w": ["f4", [1], "x", 10**9, 4]}}}
NEGATIVE = EMPTY | {"arrays": {"lora": {"w": ["f4", [1], "x", -4, 4]}}}
MALFORMED = {
    "no JSON": lambda c: c.send(b"{"),
    "no object": lambda c: c.send(b"[1]"),
    "too long": lambda c: c.send(b'{"x": "' + b"x" * transport.LONGEST_PACKET + b'"}'),
    "memory that may shrink": raw(json.dumps(EMPTY).encode(), seal=False),
    "an empty memory": raw(b""),
    "an index beyond its memory": raw(b"{}", index=[0, 10**12]),
    "half an index": raw(json.dumps(EMPTY).encode()[:-9]),
    "an index without parts": raw(b"{}"),
    "an array outside": raw(json.dumps(OUTSIDE).encode()),
    "an array before": raw(json.dumps(NEGATIVE).encode()),
    "no place": raw(json.dumps(EMPTY).encode(), index=[1]),
    "deep JSON": raw(b"[" * 100_000),
    "no UTF-8": raw(b"\xff\xfe"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_packet_is_refused_and_leaves_no_file_open(pair, what):
    before = len(os.listdir("/proc/self/fd"))
    MALFORMED[what](pair[0])
    with pytest.raises(RunError, match="cannot be read"):
        receive(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_socket_belongs_to_its_owner_alone_however_long_its_path(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert connect(folder) is None
    with listen(folder) as listener:
        assert (folder / SOCKET).stat().st_mode & 0o777 == 0o600
        with connect(folder) as one, listener.accept()[0] as other:
            send(one, {"hello": 1})
            assert receive(other)[0] == {"hello": 1}
    with pytest.raises(ConnectionRefusedError):  # a dead service's
        connect(folder)
    with listen(folder) as listener, connect(folder):
        pass


def test_another_users_process_is_refused_at_both_ends(tmp_path, monkeypatch):
    with listen(tmp_path) as listener:
        own = os.geteuid()
        with connect(tmp_path), listener.accept()[0] as other:
            monkeypatch.setattr(os, "geteuid", lambda: own + 1)
            with pytest.raises(RunError, match=f"as user {own} but must run as user {own + 1}"):
                transport.check_peer(other)
            with pytest.raises(RunError, match="run the SuperNode and"):
                connect(tmp_path)


def test_full_memory_is_an_error_of_the_message_and_leaves_the_connection_usable(pair, monkeypatch):
    """The limit on file sizes applies to memory files, too."""
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        content = RecordDict({"lora": ArrayRecord({"w": Array(np.zeros(1 << 20, np.uint8))})})
        with pytest.raises(OSError, match="File too large"):
            post(pair[0], {}, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    send(pair[0], {"next": 1})
    assert receive(pair[1])[0] == {"next": 1}
