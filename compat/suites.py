"""Which suites there are, in which slices they are run, and what is known to differ and why.

A slice is run by one process, so a crash names its slice; a slice of some thousand tests takes a few minutes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KNOWN", "SUITES", "Known", "Slice", "Suite"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Tests that one process runs: `kind` is "pytest" or "unittest", `arguments` are its own, `ram` the budget."""

    name: str
    kind: str
    arguments: tuple[str, ...]
    # Little more than the least that there is (11M, under which a few tests take minutes).
    ram: str = "16M"


@dataclass(frozen=True, slots=True)
class Suite:
    """A library's tests. `note` says what of it uses swapped memory."""

    name: str
    distribution: str
    slices: tuple[Slice, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Known:
    """Tests (a pattern of fnmatch) that rightly differ, and the reason. A crash is never known."""

    suite: str
    pattern: str
    reason: str


def pytest_slices(package: str, parts: tuple[str, ...], *options: str, ram: str = "16M") -> tuple[Slice, ...]:
    """Return a slice for each part of a package, all with the same options.

    A part is one or several places below the package, parted by blanks; what is in an earlier part is left out.
    """
    slices: list[Slice] = []
    before: list[str] = []
    for part in parts:
        places = [f"{package}.{place}" for place in part.split()]
        inner = [one for one in before if one.startswith(tuple(f"{place}." for place in places))]
        ignored = [f"--ignore-glob=/*/{one.replace('.', '/')}{end}" for one in inner for end in (".py", "/*")]
        slices.append(Slice(part.split()[0], "pytest", (*options, *ignored, "--pyargs", *places), ram))
        before += places
    return tuple(slices)


QUICK = ("-m", "not slow")
EVERY_LARGE = "all arrays of 4 KiB and more, and whatever else is allocated from 64 KiB on"

NUMPY = Suite(
    "numpy",
    "numpy",
    pytest_slices(
        "numpy",
        (
            "_core.tests.test_multiarray",
            "_core.tests.test_umath _core.tests.test_umath_complex _core.tests.test_umath_accuracy",
            "_core.tests.test_ufunc _core.tests.test_half _core.tests.test_conversion_utils _core.tests.test_simd",
            "_core.tests.test_numeric _core.tests.test_nditer _core.tests.test_regression _core.tests.test_indexing",
            "_core.tests.test_mem_overlap _core.tests.test_mem_policy _core.tests.test_multithreading "
            "_core.tests.test_memmap _core.tests.test_einsum _core.tests.test_dtype _core.tests.test_longdouble",
            "_core",
            "lib",
            "linalg",
            "fft",
            "random",
            "ma",
            "polynomial",
            "matrixlib testing typing tests ctypeslib",
            "f2py",
        ),
        *QUICK,
    ),
    EVERY_LARGE,
)

CPYTHON = Suite(
    "cpython",
    "",
    (
        Slice("array", "unittest", ("test.test_array", "test.test_memoryview", "test.test_buffer")),
        Slice("bytes", "unittest", ("test.test_bytes",)),
        Slice("bigmem", "unittest", ("test.test_bigmem",)),
        Slice("packing", "unittest", ("test.test_zlib", "test.test_bz2", "test.test_lzma", "test.test_hashlib")),
        Slice("io", "unittest", ("test.test_io", "test.test_memoryio", "test.test_pickle", "test.test_marshal")),
        Slice("mmap", "unittest", ("test.test_mmap",)),
        Slice("ctypes", "unittest", ("test.test_ctypes" if sys.version_info >= (3, 12) else "ctypes.test",)),
        *(
            Slice(f"multiprocessing_{way}", "unittest", (f"test_multiprocessing_{way}",))
            for way in ("fork", "forkserver", "spawn")
        ),
    ),
    "what Python itself allocates from 64 KiB on: large `bytes`, `bytearray`, strings, lists, tuples, `array.array`, "
    "ctypes' arrays. Its tests of gigabytes are run with 300,007 items. Most other tests make nothing so large: there "
    "it is wrapped system calls, forks, signals and the handler that are shown to disturb nothing",
)

SCIPY = Suite(
    "scipy",
    "scipy",
    pytest_slices(
        "scipy",
        ("sparse.tests.test_base", "sparse.csgraph sparse.linalg", "sparse.tests", "linalg", "fft fftpack", "ndimage"),
        *QUICK,
        # One of its tests solves with a matrix of 20 MB again and again, column by column: docs/compatibility.md.
        ram="32M",
    ),
    EVERY_LARGE,
)

PANDAS = Suite(
    "pandas",
    "pandas",
    pytest_slices(
        "pandas.tests",
        ("frame.methods frame.indexing", "frame", "groupby", "reshape", "io.parser", "io.test_parquet"),
        "-m",
        "not slow and not network and not db and not single_cpu",
    ),
    f"{EVERY_LARGE} (what fails in both ways reads files that the wheel leaves out)",
)

PYARROW = Suite(
    "pyarrow",
    "pyarrow",
    pytest_slices(
        "pyarrow.tests",
        (
            "test_array test_convert_builtin test_scalars",
            "test_pandas test_table test_compute",
            "test_io test_ipc test_csv test_feather test_memory parquet",
        ),
    ),
    "arrays of 4 KiB and more that NumPy and pandas hand it, and its own buffers from 64 KiB on: `userswap run` tells "
    "it to take them from the system's allocator",
)

H5PY = Suite(
    "h5py",
    "h5py",
    (Slice("all", "pytest", ("--pyargs", "h5py.tests")),),
    f"{EVERY_LARGE}: HDF5 reads and writes them with system calls",
)

SKLEARN = Suite(
    "scikit-learn",
    "scikit-learn",
    pytest_slices("sklearn", ("cluster", "decomposition preprocessing", "ensemble neighbors")),
    EVERY_LARGE,
)

# Its wheel brings no tests, but the table of operators that its own are made from.
TORCH_TESTS = Path(__file__).resolve().parent / "pytorch"
TORCH = Suite(
    "pytorch",
    "torch",
    tuple(
        Slice(part, "pytest", ("--rootdir", str(TORCH_TESTS), str(TORCH_TESTS / f"test_{part}.py")))
        for part in ("tensors", "operators")
    ),
    "tensors from 64 KiB on. The tests are ours: every elementwise operator of PyTorch's own table on a large tensor, "
    "beside small pieces of it (those that fail in both ways are random, divide by zero, or need a GPU); autograd, "
    "layers, optimizers, files, `DataLoader` workers, shared memory, threads",
)

SUITES = (NUMPY, CPYTHON, SCIPY, PANDAS, PYARROW, H5PY, SKLEARN, TORCH)

KNOWN: tuple[Known, ...] = ()
