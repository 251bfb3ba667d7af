"""Every elementwise operator in PyTorch's own table: of a large tensor, it is what it is of small pieces.

Pieces are less than what `userswap run` takes, so they are plain memory in both ways: what they say is the truth.
"""

from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import binary_ufuncs, unary_ufuncs

LENGTH = 131_072
PIECE = 4096
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.complex(*torch.empty((2, LENGTH)).uniform_(-2, 2, generator=chance).unbind()).to(dtype)
    if dtype.is_floating_point:
        return torch.empty(LENGTH).uniform_(-3, 3, generator=chance).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 20, (LENGTH,), generator=chance).to(dtype)


def of_all_dtypes(operators: list[Any]) -> list[Any]:
    return [
        pytest.param(operator, dtype, id=f"{operator.formatted_name}-{str(dtype).removeprefix('torch.')}")
        for operator in operators
        for dtype in DTYPES
        if dtype in operator.dtypes
    ]


def same(whole: torch.Tensor, pieces: list[torch.Tensor]) -> None:
    # Vectors are computed by other instructions than what is left at a piece's end.
    close = {"rtol": 1e-2, "atol": 1e-2} if whole.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(whole, torch.cat(pieces), equal_nan=True, **close)


@pytest.mark.parametrize(("operator", "dtype"), of_all_dtypes(unary_ufuncs))
def test_unary(operator: Any, dtype: torch.dtype) -> None:
    x = values(dtype, 1)
    named, _ = operator.sample_kwargs("cpu", dtype, x)
    if not isinstance(whole := operator(x, **named), torch.Tensor):
        pytest.skip("several results")
    same(whole, [operator(piece.clone(), **named) for piece in x.split(PIECE)])


@pytest.mark.parametrize(("operator", "dtype"), of_all_dtypes(binary_ufuncs))
def test_binary(operator: Any, dtype: torch.dtype) -> None:
    x, y = values(dtype, 2), values(dtype, 3)
    if not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        y = y.clamp(1, 5)  # integers are not divided by 0
    whole = operator(x, y)
    same(whole, [operator(one.clone(), two.clone()) for one, two in zip(x.split(PIECE), y.split(PIECE), strict=True)])


@pytest.mark.parametrize(
    "operator", [one for one in unary_ufuncs if one.supports_autograd and torch.float64 in one.dtypes],
    ids=lambda one: one.formatted_name,
)  # fmt: skip
def test_gradient(operator: Any) -> None:
    x = values(torch.float64, 4).requires_grad_()
    named, _ = operator.sample_kwargs("cpu", x.dtype, x)
    if not isinstance(whole := operator(x, **named), torch.Tensor) or not whole.dtype.is_floating_point:
        pytest.skip("nothing to differentiate")
    whole.sum().backward()
    gradients = []
    for piece in x.detach().split(PIECE):
        part = piece.clone().requires_grad_()
        operator(part, **named).sum().backward()
        assert part.grad is not None
        gradients.append(part.grad)
    assert x.grad is not None
    same(x.grad, gradients)
