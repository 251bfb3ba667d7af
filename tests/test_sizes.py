"""Sizes: everything people write, and everything that is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userswap.errors import BadSize, UserswapError
from userswap.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("1", 1),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512Mi", 512 << 20),
        ("512MB", 512 << 20),
        ("512mb", 512 << 20),
        ("2G", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("0.5K", 512),
        ("1.G", 1 << 30),
        (" 64 K ", 64 << 10),
        ("+8k", 8 << 10),
        ("100B", 100),
        ("3T", 3 << 40),
        ("1P", 1 << 50),
        ("7.5E", 15 << 59),
        ("1.0001K", 1024),
        (4096, 4096),
    ],
)
def test_sizes_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "K", "M512", "512Q", "512MM", "1e9", "0x10", "1,5G", "1 2", "1_000",
        "½G", "٣", "nan", "inf",
        "1..5G",
        "--", "12K3", "5 %", "5%", "None", "\x00", "1" * 31, "9" * 5000,
    ],
)  # fmt: skip
def test_junk_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadSize, match=r"^--ram.* write for example 512M, 2GiB or 65536 \(bytes\)\.$") as caught:
        parse_size(text, "--ram")
    assert isinstance(caught.value, UserswapError)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["-1", "-512M", "-0", -1, "\N{MINUS SIGN}5"])
def test_negative(text: str | int) -> None:
    with pytest.raises(BadSize, match="negative"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0.0", "0G", "0.4", 0])
def test_less_than_a_byte(text: str | int) -> None:
    with pytest.raises(BadSize, match="less than a byte"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8E", "9" * 30, "9999999P", 2**63, pytest.param(10**5000, id="thousands of digits")])
def test_overflow(text: str | int) -> None:
    with pytest.raises(BadSize, match="8 EiB"):
        parse_size(text)


@pytest.mark.parametrize("value", [True, 2e9, None, b"512M", [1]])
def test_what_is_neither_text_nor_integer(value: object) -> None:
    with pytest.raises(BadSize, match="is not a size"):
        parse_size(value)  # type: ignore[arg-type]


def test_numpy_integers_count_as_integers() -> None:
    import numpy as np

    assert parse_size(np.int64(1 << 20)) == 1 << 20


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (512 << 20, "512 MiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 63) - 1, "8 EiB"),
        (1 << 80, "1048576 EiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(min_value=1, max_value=2**62))
def test_what_is_formatted_reads_back_as_nearly_the_same(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= max(size / 20, 1)
    assert parse_size(str(size)) == parse_size(size) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_plain_refusal(text: str) -> None:
    try:
        assert 0 < parse_size(text) < 2**63
    except BadSize as error:
        assert str(error).endswith(".")
