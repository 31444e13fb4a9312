"""Compress the change of an upload to 8 or 4 bits per parameter, with error feedback.

A client uploads the quantised change since the tensors that it received, and keeps the part that
was rounded away for its next upload. For one tensor, received as S, trained to Θ, with the error e
of the previous upload::

    x = Θ - S + e                                        what the server should receive
    q = round(x / s),   s = max |x| / L in each block    L: 127 (8 bits), 7 (4 bits)
    U = S + s q                                          what the server restores
    e' = x - (U - S)                                     kept by the client, never sent

``|x - s q| <= s / 2`` for every element, so ``|e'|`` is at most half a scale plus the rounding of U
to the dtype of S: errors do not accumulate over exchanges.

Source of error feedback: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014;
Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019
(arXiv 1901.09847). Block-wise absolute maxima: Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", ICLR 2022 (arXiv 2110.02861).

To add a width, add it to `LEVELS` and to the choices of `model.sent_dtype`.
"""

import torch
from torch import Tensor

from pilot_flwr.errors import UpdateError
from pilot_flwr.protocol import State

BLOCK = 256
"""Consecutive elements of a tensor that share a scale."""

LEVELS = {8: 127, 4: 7}
"""Bits per element → L; codes are whole numbers in [-L, L]."""

_CODES, _SCALES = ":codes", ":scales"


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor block by block.

    Parameters
    ----------
    values : Tensor
        n elements, finite.
    bits : int
        A key of `LEVELS`.

    Returns
    -------
    codes : Tensor
        For 8 bits int8, shape (n,); for 4 bits uint8, shape (ceil(n / 2),), the first code of a
        pair in the low half, each plus 8.
    scales : Tensor
        float32, shape (ceil(n / `BLOCK`),).
    """
    flat, level = values.detach().float().flatten(), LEVELS[bits]
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1) / level
    # A subnormal maximum may give a scale of 0; its block is rounded to 0.
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    inverse = inverse.nan_to_num(posinf=0.0)
    rounded = (blocks * inverse[:, None]).round().clamp(-level, level).to(torch.int8)
    codes = rounded.flatten()[: len(flat)]
    if bits == 8:
        return codes, scales
    shifted = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2).to(torch.uint8) + 8
    return (shifted[:, 0] & 15) | (shifted[:, 1] << 4), scales


def dequantize(codes: Tensor, scales: Tensor, shape: torch.Size, bits: int) -> Tensor:
    """Invert `quantize`, up to the rounding.

    Returns
    -------
    Tensor
        float32, of `shape`.

    Raises
    ------
    UpdateError
        Codes or scales have another dtype or number of elements than a tensor of `shape` needs, a
        code is outside [-L, L], or a scale is negative or not finite.
    """
    number, level = shape.numel(), LEVELS[bits]
    expected = {
        "codes": (codes, torch.int8 if bits == 8 else torch.uint8, -(-number * bits // 8)),
        "scales": (scales, torch.float32, -(-number // BLOCK)),
    }
    for what, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise UpdateError(
                f"its {what} are {tensor.dtype} {tuple(tensor.shape)} but must be {dtype} ({size},)"
            )
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise UpdateError("its scales must be finite and not negative")
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten().to(torch.int8) - 8
        if bool(codes[number:].any()):
            raise UpdateError("its last code is padding but not 0")
        codes = codes[:number]
    if number and not -level <= int(codes.min()) <= int(codes.max()) <= level:
        raise UpdateError(f"its codes must be from {-level} to {level}")
    padded = torch.nn.functional.pad(codes.float(), (0, -number % BLOCK)).view(-1, BLOCK)
    return (padded * scales[:, None]).flatten()[:number].view(shape)


def compress(trained: State, received: State, error: State, bits: int) -> tuple[State, State]:
    """Compress an upload; return it with the error to keep.

    Parameters
    ----------
    trained : State
        Θ, on the CPU.
    received : State
        S, with the names and shapes of `trained`, in the dtype that the server aggregates.
    error : State
        e of the previous upload; tensors that it lacks are zero.
    bits : int
        A key of `LEVELS`.

    Returns
    -------
    State, State
        Codes and scales of every tensor, under the names that `restore` expects, and e' in the
        dtype of `received`.
    """
    sent: State = {}
    left: State = {}
    for name, tensor in trained.items():
        start = received[name].float()
        change = tensor.float() - start
        if name in error:
            change += error[name].float()
        codes, scales = quantize(change, bits)
        sent[name + _CODES], sent[name + _SCALES] = codes, scales
        restored = _restored(received[name], dequantize(codes, scales, tensor.shape, bits))
        left[name] = (change - (restored.float() - start)).to(restored.dtype)
    return sent, left


def restore(compressed: State, received: State, bits: int) -> State:
    """Restore an upload from what the client was sent.

    Parameters
    ----------
    compressed : State
        From `compress`, or foreign input.
    received : State
        S.
    bits : int
        A key of `LEVELS`.

    Returns
    -------
    State
        U, in the layout of `received`.

    Raises
    ------
    UpdateError
        The names are not those of `received`, or as in `dequantize`; it names the tensor.
    """
    expected = {name + suffix for name in received for suffix in (_CODES, _SCALES)}
    if odd := expected ^ compressed.keys():
        raise UpdateError(
            f"its compressed tensors differ from those sent: missing or unexpected are "
            f"{sorted(odd)[:4]} ({len(odd)} in all)"
        )
    restored: State = {}
    for name, start in received.items():
        codes, scales = compressed[name + _CODES], compressed[name + _SCALES]
        try:
            change = dequantize(codes, scales, start.shape, bits)
        except UpdateError as error:
            raise UpdateError(f"compressed tensor `{name}`: {error}") from None
        restored[name] = _restored(start, change)
    return restored


def compressed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Return the bytes of a compressed tensor: its codes and its float32 scales."""
    number = torch.Size(shape).numel()
    return -(-number * bits // 8) - 4 * (-number // BLOCK)


def _restored(received: Tensor, change: Tensor) -> Tensor:
    return (received.float() + change).to(received.dtype)
