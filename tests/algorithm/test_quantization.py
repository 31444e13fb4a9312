"""Compressed changes against a loop over blocks in numpy, and what error feedback promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot_flwr.algorithm.quantization import (
    BLOCK,
    LEVELS,
    compress,
    compressed_bytes,
    dequantize,
    quantize,
    restore,
)
from pilot_flwr.errors import UpdateError

sizes = st.sampled_from([1, 2, 255, 256, 257, 1000])
widths = st.sampled_from(sorted(LEVELS))


def draw(size, seed, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def naive(values, bits):
    """Every block on its own: its scale, and its values as whole multiples of it."""
    level, result = LEVELS[bits], []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        scale = np.abs(block).max() / level
        result += list(np.round(block / scale) * scale if scale else block * 0)
    return np.array(result)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), widths, st.sampled_from([1e-30, 1e-4, 1.0, 1e30]))
def test_a_change_comes_back_as_a_loop_over_blocks_computes_it(size, seed, bits, scale):
    values = draw(size, seed, scale)
    codes, scales = quantize(values, bits)
    found = dequantize(codes, scales, values.shape, bits).double()
    steps = np.repeat(scales.double().numpy(), BLOCK)[:size]
    # Half a step, and float32's rounding of up to L steps.
    assert np.all(np.abs((found - values.double()).numpy()) <= steps * (0.5 + LEVELS[bits] * 2e-7))
    # A value within float32's rounding of a half may be rounded the other way.
    halves = np.abs(np.abs(values.double().numpy() / steps) % 1 - 0.5) < 1e-4
    expected = naive(values.numpy(), bits)
    np.testing.assert_allclose(found.numpy()[~halves], expected[~halves], rtol=1e-6)
    assert codes.nbytes + scales.nbytes == compressed_bytes(tuple(values.shape), bits)


@pytest.mark.parametrize("bits", LEVELS)
def test_zeros_stay_zeros_and_subnormal_changes_do_no_harm(bits):
    for values in (torch.zeros(300), torch.full((300,), 1e-45), torch.zeros(0)):
        codes, scales = quantize(values, bits)
        found = dequantize(codes, scales, values.shape, bits)
        assert found.shape == values.shape and bool((found.abs() <= 1e-38).all())


@settings(max_examples=30, deadline=None)
@given(widths, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_errors_do_not_accumulate(bits, seed, dtype):
    """What the server has received in all is what was trained in all, up to the last error."""
    start = draw((3, 200), seed).to(dtype)
    received, error, trained_in_all = {"w": start}, {}, start.double()
    for step in range(1, 9):
        change = draw((3, 200), seed + 1000 * step, 1e-2)
        trained = {"w": received["w"].float() + change}
        trained_in_all = trained_in_all + (trained["w"].double() - received["w"].double())
        sent, error = compress(trained, received, error, bits)
        received = restore(sent, received, bits)
        missing = trained_in_all - received["w"].double()
        # A loop without feedback would be off by the sum of all errors.
        assert torch.allclose(missing, error["w"].double(), atol=1e-2 * 2**-7 * step)
    largest = 0.05 / LEVELS[bits] + float(start.abs().max() + 1) * torch.finfo(dtype).eps
    assert float(error["w"].double().abs().max()) <= largest


@pytest.mark.parametrize("bits", LEVELS)
def test_without_feedback_a_small_change_would_be_lost(bits):
    """One large value sets the scale: the small ones arrive by feedback alone."""
    received, error = {"w": torch.zeros(BLOCK)}, {}
    change = torch.full((BLOCK,), 0.1 / LEVELS[bits])
    change[0] = 1.0
    lost = {"w": torch.zeros(BLOCK)}
    for _ in range(20):
        sent, error = compress({"w": received["w"] + change}, received, error, bits)
        received = restore(sent, received, bits)
        lost = restore(compress({"w": lost["w"] + change}, lost, {}, bits)[0], lost, bits)
    assert float(lost["w"][1:].abs().max()) == 0
    torch.testing.assert_close(received["w"][1:], 20 * change[1:], rtol=0.6, atol=0)


@pytest.fixture(params=sorted(LEVELS))
def upload(request):
    """A compressed upload of two tensors, what it changes, and its bits."""
    received = {"a": draw((5, 100), 1).bfloat16(), "b": draw(3, 2).bfloat16()}
    trained = {name: t.float() + 0.01 for name, t in received.items()}
    return compress(trained, received, {}, request.param)[0], received, request.param


def test_restored_tensors_have_the_layout_of_those_sent(upload):
    compressed, received, bits = upload
    restored = restore(compressed, received, bits)
    assert {n: (t.dtype, t.shape) for n, t in restored.items()} == {
        n: (t.dtype, t.shape) for n, t in received.items()
    }


def scales_with(value):
    def spoil(upload):
        upload["a:scales"][1] = value

    return spoil


def without(name):
    return lambda upload: upload.pop(name)


def replaced(name, make):
    def spoil(upload):
        upload[name] = make(upload[name])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (scales_with(math.nan), "`a`: its scales must be finite"),
        (scales_with(math.inf), "`a`: its scales must be finite"),
        (scales_with(-1.0), "`a`: its scales must be finite and not negative"),
        (without("b:scales"), r"missing or unexpected are \['b:scales'\]"),
        (lambda upload: upload.update(a=torch.ones(5, 100)), r"unexpected are \['a'\]"),
        (replaced("a:codes", lambda t: t[:-1]), r"`a`: its codes are .* but must be"),
        (replaced("a:codes", lambda t: t.float()), r"`a`: its codes are torch.float32"),
        (replaced("a:codes", lambda t: t[None]), r"`a`: its codes are .*\(1, "),
        (replaced("b:scales", lambda t: t.repeat(2)), r"`b`: its scales are .*\(2,\)"),
        (replaced("b:scales", lambda t: t.double()), r"`b`: its scales are torch.float64"),
    ],
)
def test_a_defect_is_named(upload, spoil, reason):
    compressed, received, bits = upload
    spoil(compressed)
    with pytest.raises(UpdateError, match=reason):
        restore(compressed, received, bits)


@pytest.mark.parametrize(("bits", "code"), [(8, -128), (4, 0x80), (4, 0x08)])
def test_a_code_out_of_range_is_named(bits, code):
    """4 bits: the low and the high half of a byte; 0 would be -8."""
    received = {"b": draw(4, 2)}
    compressed = compress({"b": received["b"] + 1}, received, {}, bits)[0]
    compressed["b:codes"][0] = code
    with pytest.raises(UpdateError, match=f"`b`: its codes must be from -{LEVELS[bits]} to"):
        restore(compressed, received, bits)


def test_padding_that_is_not_zero_is_named():
    received = {"b": draw(3, 2)}
    compressed = compress({"b": received["b"] + 1}, received, {}, 4)[0]
    compressed["b:codes"][1] = 0x18 | 0xF0
    with pytest.raises(UpdateError, match="padding"):
        restore(compressed, received, 4)
