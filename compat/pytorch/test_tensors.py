"""Tensors of PyTorch's: made, changed, saved, shared, sent to other processes and threads, learned with.

PyTorch's wheel does not bring its own tests. All tensors here are as large as `userswap run` takes (64 KiB and more).
"""

import copy
import hashlib
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip
METHODS = ("fork", "forkserver", "spawn")
MANY = 300_007


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, count)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


@pytest.fixture(autouse=True)
def always_the_same() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_come_back(dtype: torch.dtype) -> None:
    values = numbers(MANY) % 100
    tensors = [torch.from_numpy(values + step).to(dtype) for step in range(8)]
    for step, tensor in enumerate(tensors):
        if dtype != torch.bool:
            assert np.array_equal(tensor.to(torch.complex128).real.numpy(), values + step)
        else:
            assert np.array_equal(tensor.numpy(), values + step != 0)
        assert torch.equal(tensor.clone(), tensor)
        assert torch.equal(copy.deepcopy(tensor).flip(0).flip(0), tensor)


def test_zeros_are_zero_after_others_used_the_memory() -> None:
    for round_ in range(30):
        used = [torch.full((MANY + 1000 * round_,), 255, dtype=torch.uint8) for _ in range(10)]
        del used
        assert not torch.zeros(MANY + 1000 * round_, dtype=torch.uint8).any()


def test_from_numpy_shares_memory() -> None:
    array = numbers(MANY)
    tensor = torch.from_numpy(array)
    array[::1000] = 77
    assert (tensor[::1000] == 77).all()
    tensor[1::1000] = 78
    assert (array[1::1000] == 78).all()
    assert np.shares_memory(torch.from_dlpack(array).numpy(), array)
    kept = tensor[5:].numpy()
    del array, tensor
    assert kept[995] == 77
    assert kept[996] == 78


def test_resize_keeps_what_was_there() -> None:
    tensor = torch.arange(MANY)
    for size in (2 * MANY, 20, 5 * MANY):
        tensor.resize_(size)
        assert torch.equal(tensor[:20], torch.arange(20))
    storage = torch.arange(MANY).untyped_storage()
    storage.resize_(MANY * 80)
    assert torch.equal(torch.empty(0, dtype=torch.int64).set_(storage)[:MANY], torch.arange(MANY))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_views_and_permuted_copies(axis: int) -> None:
    tensor = torch.from_numpy(numbers(64 * 65 * 66)).reshape(64, 65, 66)
    array = tensor.numpy()
    assert np.array_equal(tensor.transpose(0, axis).contiguous().numpy(), np.swapaxes(array, 0, axis))
    assert np.array_equal(tensor.sum(axis).numpy(), array.sum(axis))
    assert np.array_equal(tensor.cumsum(axis).numpy(), array.cumsum(axis))
    assert np.array_equal(tensor.roll(7, axis).numpy(), np.roll(array, 7, axis))
    assert np.array_equal(tensor.sort(axis).values.numpy(), np.sort(array, axis))


def test_sorting_choosing_and_counting() -> None:
    values = numbers(MANY)
    tensor = torch.from_numpy(values)
    assert np.array_equal(tensor.argsort(stable=True).numpy(), np.argsort(values, kind="stable"))
    assert np.array_equal(tensor.topk(5000).values.numpy(), np.sort(values)[::-1][:5000])
    assert np.array_equal(tensor.unique().numpy(), np.unique(values))
    assert np.array_equal((tensor + 1000).bincount().numpy(), np.bincount(values + 1000))
    order = np.random.default_rng(1).permutation(MANY)
    assert np.array_equal(tensor[torch.from_numpy(order)].numpy(), values[order])
    sums = torch.zeros(2000, dtype=torch.int64).scatter_add_(0, tensor + 1000, tensor)
    assert np.array_equal(sums.numpy(), np.bincount(values + 1000, minlength=2000) * (np.arange(2000) - 1000))
    assert np.array_equal(tensor[tensor > 500].numpy(), values[values > 500])
    assert torch.equal(torch.where(tensor > 0, tensor, -tensor), tensor.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_linear_algebra(dtype: torch.dtype) -> None:
    a, b = torch.randn(400, 400, dtype=dtype), torch.randn(400, 300, dtype=dtype)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(torch.from_numpy(a.numpy() @ b.numpy()), a @ b, **close)
    torch.testing.assert_close(a @ torch.linalg.solve(a, b), b, **close)
    u, s, v = torch.linalg.svd(a)
    torch.testing.assert_close(u @ torch.diag(s).to(dtype) @ v, a, **close)
    q, r = torch.linalg.qr(b)
    torch.testing.assert_close(q @ r, b, **close)
    positive = a @ a.mH + 400 * torch.eye(400, dtype=dtype)
    lower = torch.linalg.cholesky(positive)
    torch.testing.assert_close(lower @ lower.mH, positive, **close)
    torch.testing.assert_close(torch.fft.ifft2(torch.fft.fft2(a)).to(dtype) if dtype.is_complex else
                               torch.fft.irfft2(torch.fft.rfft2(a), s=a.shape), a, **close)  # fmt: skip
    torch.testing.assert_close(torch.einsum("ij,kj->ik", a, a), a @ a.mT, **close)


def test_sparse_is_dense() -> None:
    dense = torch.randn(700, 600, dtype=torch.float64) * (torch.rand(700, 600) < 0.1)
    other = torch.randn(600, 200, dtype=torch.float64)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        assert torch.equal(sparse.to_dense(), dense)
        torch.testing.assert_close(sparse @ other, dense @ other)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients(layout: torch.memory_format, stride: int) -> None:
    images = torch.randn(8, 16, 40, 40, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    kernel = torch.randn(24, 16, 3, 3, dtype=torch.float64).requires_grad_()
    out = nn.functional.conv2d(images, kernel, stride=stride)
    out.square().sum().backward()
    columns = nn.functional.unfold(images.detach(), 3, stride=stride)
    flat = kernel.detach().flatten(1)
    again = (flat @ columns).unflatten(-1, out.shape[-2:])
    torch.testing.assert_close(out.detach(), again)
    upwards = 2 * again.flatten(2)
    torch.testing.assert_close(kernel.grad.flatten(1), (upwards @ columns.mT).sum(0))
    folded = nn.functional.fold(flat.T @ upwards, (40, 40), 3, stride=stride)
    torch.testing.assert_close(images.grad, folded)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(300, 300), (200, 300)),
    "convolution": (lambda: nn.Conv2d(3, 20, 5, padding=2), (16, 3, 32, 32)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 4, stride=2), (8, 8, 24, 24)),
    "normalized": (lambda: nn.BatchNorm2d(16), (16, 16, 20, 20)),
    "layers": (lambda: nn.LayerNorm(500), (100, 500)),
    "pooled": (lambda: nn.MaxPool2d(3, stride=2), (16, 8, 40, 40)),
    "lstm": (lambda: nn.LSTM(64, 128, 2, batch_first=True), (32, 20, 64)),
    "transformer": (lambda: nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True), (16, 40, 128)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_a_batch_is_that_of_its_halves(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double().eval()
    whole = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    halves = [half.detach().clone().requires_grad_() for half in whole.chunk(2)]
    outs = [layer(one) for one in (whole, *halves)]
    first, *rest = [out[0] if isinstance(out, tuple) else out for out in outs]
    torch.testing.assert_close(first, torch.cat(rest))
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(first.square().sum(), [whole, *parameters])
    parts = [torch.autograd.grad(out.square().sum(), [half, *parameters])
             for out, half in zip(rest, halves, strict=True)]  # fmt: skip
    torch.testing.assert_close(wanted[0], torch.cat([part[0] for part in parts]))
    for both, one, two in zip(wanted[1:], parts[0][1:], parts[1][1:], strict=True):
        torch.testing.assert_close(both, one + two)


def test_a_checkpointed_gradient_is_the_same() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(6)]).double()
    start = torch.randn(300, 256, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layers(start).sum(), [start, *layers.parameters()])
    value = start
    for layer in layers:
        value = checkpoint(layer, value, use_reentrant=False)
    for one, other in zip(plain, torch.autograd.grad(value.sum(), [start, *layers.parameters()]), strict=True):
        assert torch.equal(one, other)


def test_adam_is_what_its_formula_says() -> None:
    parameter = nn.Parameter(torch.randn(MANY, dtype=torch.float64))
    value, first, second = parameter.detach().clone(), torch.zeros(MANY).double(), torch.zeros(MANY).double()
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for step in range(1, 9):
        optimizer.zero_grad()
        (parameter**4).sum().backward()
        optimizer.step()
        gradient = 4 * value**3
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("mapped", [False, True])
def test_saved_and_loaded(tmp_path: Path, mapped: bool) -> None:
    kept = {f"part {i}": torch.from_numpy(numbers(MANY, i)) for i in range(6)}
    kept["a view"] = kept["part 0"][1000:2000]
    torch.save(kept, tmp_path / "kept.pt")
    loaded = torch.load(tmp_path / "kept.pt", mmap=mapped)
    assert {name: digest(one) for name, one in loaded.items()} == {name: digest(one) for name, one in kept.items()}
    loaded["part 0"][1000] = 5
    assert loaded["a view"][0] == 5
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    buffer.seek(0)
    assert digest(torch.load(buffer)["part 3"]) == digest(kept["part 3"])
    assert digest(pickle.loads(pickle.dumps(kept["part 2"]))) == digest(kept["part 2"])


def test_a_network_is_saved_with_its_optimizer(tmp_path: Path) -> None:
    def learn(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for step in range(4):
            given = torch.randn(200, 300, generator=torch.Generator().manual_seed(seed + step))
            optimizer.zero_grad()
            network(given).square().mean().backward()
            optimizer.step()

    networks = [nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(network.parameters()) for network in networks]
    learn(networks[0], optimizers[0], 1)
    torch.save([networks[0].state_dict(), optimizers[0].state_dict()], tmp_path / "state.pt")
    for target, state in zip((networks[1], optimizers[1]), torch.load(tmp_path / "state.pt"), strict=True):
        target.load_state_dict(state)
    for network, optimizer in zip(networks, optimizers, strict=True):
        learn(network, optimizer, 20)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_files_read_and_mapped(tmp_path: Path) -> None:
    tensor = torch.from_numpy(numbers(MANY))
    tensor.numpy().tofile(tmp_path / "numbers")
    mapped = torch.from_file(str(tmp_path / "numbers"), shared=True, size=MANY, dtype=torch.int64)
    assert torch.equal(mapped, tensor)
    mapped += 1
    assert np.array_equal(np.fromfile(tmp_path / "numbers", dtype=np.int64), tensor.numpy() + 1)
    buffer = bytearray((tmp_path / "numbers").read_bytes())
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.int64), tensor + 1)


class Rows:
    """A dataset: rows of a large tensor, or large items made of a number."""

    def __init__(self, rows: int) -> None:
        self.rows = torch.arange(rows * 4096).reshape(rows, 4096)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[index], torch.full((20_000,), index)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("persistent", [False, True])
def test_loaded_by_workers(method: str, persistent: bool) -> None:
    rows = Rows(100)
    loader = DataLoader(
        rows, 9, shuffle=True, num_workers=2, persistent_workers=persistent, multiprocessing_context=method
    )
    for _ in range(2):
        seen = []
        for batch, made in loader:
            indices = batch[:, 0] // 4096
            assert torch.equal(batch, rows.rows[indices])
            assert (made == indices[:, None]).all()
            seen += indices.tolist()
        assert sorted(seen) == list(range(100))


def send(tensors: Any, answers: Any) -> None:
    """A child that changes shared tensors and makes some of its own."""
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and are waited for: that hangs plain, too
    tensors[0].add_(tensors[1])
    answers.put([tensors[0].sum().item(), tensors[1].to(torch.float64).flip(0)])
    # A tensor in shared memory is the sender's until it is taken.
    answers.join()


@pytest.mark.parametrize("method", METHODS)
def test_shared_with_and_sent_by_a_process(method: str) -> None:
    context = torch.multiprocessing.get_context(method)
    shared, plain = torch.from_numpy(numbers(MANY)).clone().share_memory_(), torch.from_numpy(numbers(MANY, 1))
    wanted = shared + plain
    answers = context.JoinableQueue()
    child = context.Process(target=send, args=([shared, plain], answers))
    child.start()
    total, flipped = answers.get(timeout=300)
    assert torch.equal(flipped.flip(0).to(torch.int64), plain)
    assert total == wanted.sum().item()
    del flipped
    answers.task_done()
    child.join(300)
    assert child.exitcode == 0
    assert torch.equal(shared, wanted)


def change(tensor: torch.Tensor, pipe: Any) -> None:
    """A forked child: what it changes in a tensor that is not shared is its own."""
    torch.set_num_threads(1)
    tensor.mul_(-1)
    pipe.send(int(tensor.sum()))
    pipe.close()


def test_a_forked_child_has_a_copy() -> None:
    context = torch.multiprocessing.get_context("fork")
    tensor = torch.from_numpy(numbers(MANY))
    before = digest(tensor)
    children = []
    for _ in range(3):
        total = int(tensor.sum())
        mine, its = context.Pipe()
        child = context.Process(target=change, args=(tensor, its))
        child.start()
        children.append(child)
        tensor.add_(1)
        assert mine.recv() == -total
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    assert digest(tensor - 3) == before


def test_threads_compute_what_one_does() -> None:
    given = [torch.randn(300, 300, dtype=torch.float64) for _ in range(8)]
    wanted = [(one @ one).relu().sum(0) for one in given]
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(40):
            i = int(chance.integers(len(given)))
            if not torch.allclose((given[i] @ given[i]).relu().sum(0), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_learn_together_without_locks() -> None:
    network = nn.Linear(512, 512, bias=False).double()
    with torch.no_grad():
        network.weight.zero_()

    def work() -> None:
        # Each adds 1 to rows of its own.
        row = rows.pop()
        for _ in range(50):
            with torch.no_grad():
                network.weight[row::4] += 1

    rows = list(range(4))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (network.weight == 50).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_by_threads_of_its_own(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = numbers(20 * MANY)
        tensor = torch.from_numpy(values)
        assert tensor.sum().item() == values.sum()
        assert np.array_equal((tensor * 3 + 1).numpy(), values * 3 + 1)
        assert np.array_equal(tensor.view(20, MANY).amax(1).numpy(), values.reshape(20, MANY).max(1))
    finally:
        torch.set_num_threads(before)


def test_traced_and_scripted() -> None:
    network = nn.Sequential(nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 200)).eval()
    given = torch.randn(400, 300)
    wanted = network(given)
    traced = torch.jit.trace(network, given)
    assert torch.equal(traced(given), wanted)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(given), wanted)


def test_quantized_is_near() -> None:
    values = torch.linspace(-4, 4, MANY)
    quantized = torch.quantize_per_tensor(values, 8 / 255, 0, torch.qint8)
    assert (quantized.dequantize() - values).abs().max() < 8 / 255
    assert torch.equal(quantized.int_repr(), (values / (8 / 255)).round().clamp(-128, 127).to(torch.int8))


def test_random_numbers_are_those_of_the_seed() -> None:
    wholes = []
    for _ in range(2):
        torch.manual_seed(5)
        wholes.append([torch.rand(MANY), torch.randn(MANY), torch.randperm(MANY), torch.randint(0, 9, (MANY,))])
    for one, other in zip(*wholes, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(wholes[0][2].sort().values, torch.arange(MANY))
