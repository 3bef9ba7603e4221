"""Parameter shapes of the models that the benchmarks step, without the models.

Only the optimizer part is timed, so all that matters of a model is how many parameters it has, of which shapes and in
which order. They are written here from the architectures' definitions, in the order in which the usual
implementations register them, and checked against the known totals.

    python benchmarks/shapes.py        # prints tensors and elements of every model, after the check
"""

import math
import os
from collections.abc import Callable

Shape = tuple[int, ...]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]  # weight, bias


def _linear(width_in: int, width_out: int) -> list[Shape]:
    return [(width_out, width_in), (width_out,)]


def _conv(width_in: int, width_out: int, kernel: int) -> list[Shape]:
    return [(width_out, width_in, kernel, kernel)]


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> list[Shape]:
    """He et al., arXiv 1512.03385, table 1, at 1,000 classes; the stride does not show in the shapes."""
    shapes = _conv(3, 64, 7) + _norm(64)
    width_in = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        width_out = 4 * width if bottleneck else width
        for block in range(depth):
            if bottleneck:
                kernels = [(width_in, width, 1), (width, width, 3), (width, width_out, 1)]
            else:
                kernels = [(width_in, width, 3), (width, width_out, 3)]
            for conv in kernels:
                shapes += _conv(*conv) + _norm(conv[1])
            if block == 0 and (stage > 0 or width_in != width_out):
                shapes += _conv(width_in, width_out, 1) + _norm(width_out)  # projection shortcut
            width_in = width_out
    return shapes + _linear(width_in, 1000)


def _wide_resnet(depth: int, widen: int) -> list[Shape]:
    """Zagoruyko and Komodakis, arXiv 1605.07146, for CIFAR-10: pre-activation blocks of two 3x3 convolutions."""
    shapes = _conv(3, 16, 3)
    width_in = 16
    for stage in range(3):
        width = 16 * widen * 2**stage
        for block in range((depth - 4) // 6):
            shapes += _norm(width_in) + _conv(width_in, width, 3) + _norm(width) + _conv(width, width, 3)
            if block == 0:
                shapes += _conv(width_in, width, 1)  # projection shortcut
            width_in = width
    return shapes + _norm(width_in) + _linear(width_in, 10)


def _vit(depth: int, width: int) -> list[Shape]:
    """Dosovitskiy et al., arXiv 2010.11929, patches of 16x16, 224x224 pixels, 1,000 classes."""
    patches = (224 // 16) ** 2
    shapes: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, patches + 1, width)]
    for _ in range(depth):
        shapes += _norm(width) + _linear(width, 3 * width) + _linear(width, width)
        shapes += _norm(width) + _linear(width, 4 * width) + _linear(4 * width, width)
    return shapes + _norm(width) + _linear(width, 1000)


def _gpt2(depth: int, width: int) -> list[Shape]:
    """GPT-2 with the output layer tied to the token embedding; its linear layers hold their weights as (in, out)."""
    shapes: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(depth):
        shapes += _norm(width) + [(width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += _norm(width) + [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return shapes + _norm(width)


TINY = (161, 100, 1000, 4000, 9000)  # next to no work in as many tensors as ResNet-50 has, and others: host time

# For scaling.py: so many elements in 16 tensors, and so many tensors of 1,000 elements.
ELEMENTS = tuple(10**power for power in range(4, 10))
TENSORS = (3, 10, 30, 100, 300, 1000, 3000, 9000)

MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": lambda: _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: _resnet((3, 4, 6, 3), bottleneck=True),
    "wrn28_10": lambda: _wide_resnet(28, 10),
    "vit_b16": lambda: _vit(12, 768),
    "vit_l16": lambda: _vit(24, 1024),
    "gpt2": lambda: _gpt2(12, 768),
    **{f"tiny{count}": lambda count=count: [(8,)] * count for count in TINY},
    **{f"elements{count}": lambda count=count: [(count // 16,)] * 16 for count in ELEMENTS},
    **{f"tensors{count}": lambda count=count: [(1000,)] * count for count in TENSORS},
}

# For a run that only shows that nothing fails: a few tensors of each model, and small ones.
SHRUNK = os.environ.get("FASTSAM_SHRUNK") == "1"

TOTALS = {  # tensors, elements
    "resnet18": (62, 11_689_512),
    "resnet50": (161, 25_557_032),
    "wrn28_10": (80, 36_479_194),
    "vit_b16": (152, 86_567_656),
    "vit_l16": (296, 304_326_632),
    "gpt2": (148, 124_439_808),
    **{f"tiny{count}": (count, 8 * count) for count in TINY},
    **{f"elements{count}": (16, count) for count in ELEMENTS},
    **{f"tensors{count}": (count, 1000 * count) for count in TENSORS},
}


def shapes_of(model: str) -> list[Shape]:
    """The shapes of `model`, checked against its known number of tensors and elements."""
    shapes = MODELS[model]()
    found = len(shapes), sum(map(math.prod, shapes))
    if found != TOTALS[model]:
        raise AssertionError(f"{model}: expected (tensors, elements) = {TOTALS[model]}, got {found}")
    if SHRUNK:
        return [tuple(min(size, 8) for size in shape) for shape in shapes[:: max(1, len(shapes) // 4)]]
    return shapes


if __name__ == "__main__":
    for name in MODELS:
        listed = shapes_of(name)
        print(f"{name:10s} {len(listed):4d} tensors {sum(map(math.prod, listed)):12,d} elements")
