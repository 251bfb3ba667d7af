"""A small network learns to tell shapes apart: PyTorch on the processor, images brought by two DataLoader workers.

The workers are forked, so they have the images that the parent made; batches come back through shared memory.
One thread computes (OMP_NUM_THREADS=1): floating sums depend on how they are split.
"""

import hashlib
from argparse import ArgumentParser

import torch
from torch import nn
from torch.utils.data import DataLoader

SIDE = 64
KINDS = 4
WORKERS = 2


class Shapes:
    """Images of noisy rings, discs, bars and crosses, all in one tensor."""

    def __init__(self, count: int) -> None:
        chance = torch.Generator().manual_seed(7)
        self.images = torch.empty((count, 1, SIDE, SIDE))
        self.kinds = torch.randint(0, KINDS, (count,), generator=chance)
        rows, columns = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.int16)] * 2, indexing="ij")
        for begin in range(0, count, 256):
            piece = self.images[begin : begin + 256, 0]
            kinds = self.kinds[begin : begin + 256]
            y, x = torch.randint(20, SIDE - 20, (2, len(piece), 1, 1), generator=chance, dtype=torch.int16)
            size = torch.randint(6, 16, (len(piece), 1, 1), generator=chance)
            down, right = (rows - y).abs(), (columns - x).abs()
            far = down**2 + right**2
            disc = far < size**2
            ring = disc & (far > (size - 4) ** 2)
            bar = (down < 4) & (right < size)
            cross = bar | ((right < 4) & (down < size))
            shapes = torch.stack([ring, disc, bar, cross])
            shape = shapes[kinds, torch.arange(len(piece))]
            noise = torch.randint(0, 160, piece.shape, generator=chance, dtype=torch.uint8)
            # As a camera gives them: 256 steps.
            piece[:] = (shape * 90 + noise) / 256

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return (image.flip(-1) if index % 2 else image), self.kinds[index]


def digest(tensors: list[torch.Tensor]) -> str:
    """Return a checksum of tensors."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(tensor.detach().numpy().data)
    return result.hexdigest()[:16]


def main() -> None:
    """Print what came out, step by step."""
    parser = ArgumentParser()
    parser.add_argument("--images", type=int, default=80_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(8)
    shapes = Shapes(options.images)
    print(f"{len(shapes):,} images: {digest([shapes.images])}", flush=True)

    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(256, KINDS),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    loader = DataLoader(shapes, 128, shuffle=True, num_workers=WORKERS, multiprocessing_context="fork")
    total, right = 0.0, 0
    every = max(len(loader) // 4, 1)
    for step, (images, kinds) in enumerate(loader, 1):
        optimizer.zero_grad()
        guessed = network(images)
        loss = nn.functional.cross_entropy(guessed, kinds)
        loss.backward()
        optimizer.step()
        total += loss.item()
        right += int((guessed.argmax(1) == kinds).sum())
        if step % every == 0:
            print(f"after {step} steps: loss {total / step!r}, {right:,} told right", flush=True)
    print(f"what it learned: {digest(list(network.parameters()))}")


if __name__ == "__main__":
    main()
