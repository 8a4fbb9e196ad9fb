"""The distillation step in plain PyTorch that ours is compared with.

The networks use the tensor names of the public implementations, so that they can load the weights
that `ipwd_jax.pytorch.names.to_torch` returns. The step is the usual eager one: the teacher answers
under `no_grad`, the loss is 0.1 CE + 0.9 KD, and `torch.optim.SGD` updates the student. Unlike the
usual scripts, it copies no number back to the host in each step and has no data loader: the images
are on the device, as they are for our step.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution without bias that changes the size of the map only by its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def normed(module: nn.Module, *layers: nn.Conv2d) -> None:
    """Add the layers conv1, bn1, conv2, bn2 and so on to a module."""
    for number, layer in enumerate(layers, start=1):
        module.add_module(f"conv{number}", layer)
        module.add_module(f"bn{number}", nn.BatchNorm2d(layer.out_channels))


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of each map, (B, C, H, W) -> (B, C)."""
    return x.mean((2, 3))


def shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Shuffle the channels, so that the channels of the `groups` groups alternate."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        normed(self, conv(inputs, width, stride=stride), conv(width, width))
        self.downsample = None
        if stride != 1 or inputs != width:
            shortcut = conv(inputs, width, 1, stride), nn.BatchNorm2d(width)
            self.downsample = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A ResNet for small images: depth 6 * blocks + 2."""

    def __init__(self, blocks: int, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        normed(self, conv(3, widths[0]))
        for stage in (1, 2, 3):
            inputs, width = widths[stage - 1 : stage + 1]
            first = ResidualBlock(inputs, width, 2 if stage > 1 else 1)
            rest = (ResidualBlock(width, width, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(pooled(self.layer3(self.layer2(self.layer1(x)))))


class PreactBlock(nn.Module):
    """Two convolutions after BatchNorm and ReLU; the projection reads the first activation."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = None if inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """A WRN of depth 6 * blocks + 4 without dropout."""

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, inputs = conv(3, 16), 16
        for group in (1, 2, 3):
            outputs = 8 * 2**group * width
            layers = [PreactBlock(inputs, outputs, 2 if group > 1 else 1)]
            layers += [PreactBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
            holder, inputs = nn.Module(), outputs
            holder.layer = nn.Sequential(*layers)
            self.add_module(f"block{group}", holder)
        self.bn1, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            x = group.layer(x)
        return self.fc(pooled(F.relu(self.bn1(x))))


class VGG(nn.Module):
    """Five blocks of convolutions; max pooling halves the map after each of the first three."""

    def __init__(self, repeats: int, classes: int) -> None:
        super().__init__()
        inputs = 3
        for i, width in enumerate((64, 128, 256, 512, 512)):
            layers: list[nn.Module] = []
            for _ in range(repeats):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        return self.classifier(pooled(self.block4(self.block3(x))))


class InvertedResidual(nn.Module):
    """An expansion, a depthwise convolution and a linear projection."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        layers = [conv(inputs, inside, 1), nn.BatchNorm2d(inside), nn.ReLU()]
        layers += [conv(inside, inside, 3, stride, inside), nn.BatchNorm2d(inside), nn.ReLU()]
        self.conv = nn.Sequential(*layers, conv(inside, width, 1), nn.BatchNorm2d(width))
        self.adds = stride == 1 and inputs == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width for small images."""

    stages = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2))
    stages += ((6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        inputs, blocks = 16, []
        for expansion, width, repeats, stride in self.stages:
            first = InvertedResidual(inputs, width, stride, expansion)
            rest = (InvertedResidual(width, width, 1, expansion) for _ in range(repeats - 1))
            blocks.append(nn.Sequential(first, *rest))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Sequential(conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(pooled(self.conv2(self.blocks(self.conv1(x)))))


class ShuffleUnitV1(nn.Module):
    """A grouped 1x1 convolution, a shuffle, a depthwise 3x3 and a grouped 1x1 convolution."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stride, outputs = (1, width) if inputs == width else (2, width - inputs)
        inside, self.groups = outputs // 4, 1 if inputs == 24 else 3
        first = conv(inputs, inside, 1, groups=self.groups)
        last = conv(inside, outputs, 1, groups=3)
        normed(self, first, conv(inside, inside, 3, self.stride, inside), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = shuffled(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class DownUnitV2(nn.Module):
    """Two branches that halve the map."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        half = width // 2
        left = conv(inputs, inputs, 3, 2, inputs), conv(inputs, half, 1)
        right = conv(inputs, half, 1), conv(half, half, 3, 2, half), conv(half, half, 1)
        normed(self, *left, *right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffled(torch.cat([left, right], 1), 2)


class BasicUnitV2(nn.Module):
    """Three convolutions on one half of the channels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        half = width // 2
        normed(self, conv(half, half, 1), conv(half, half, groups=half), conv(half, half, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        untouched, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return shuffled(torch.cat([untouched, F.relu(self.bn3(self.conv3(y)))], 1), 2)


class ShuffleNet(nn.Module):
    """ShuffleNet of either version for small images, with a 1x1 stem."""

    def __init__(self, version: int, classes: int) -> None:
        super().__init__()
        normed(self, conv(3, 24, 1))
        inputs, widths = 24, ((240, 480, 960), (116, 232, 464))[version - 1]
        for stage, (width, units) in enumerate(zip(widths, (4, 8, 4), strict=True), start=1):
            first = (ShuffleUnitV1, DownUnitV2)[version - 1](inputs, width)
            rest = (
                (ShuffleUnitV1, BasicUnitV2)[version - 1](width, width) for _ in range(1, units)
            )
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            inputs = width
        if version == 2:
            self.conv2, self.bn2, inputs = conv(inputs, 1024, 1), nn.BatchNorm2d(1024), 1024
        self.version, self.linear = version, nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        if self.version == 2:
            x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(pooled(x))


def create(name: str, classes: int) -> nn.Module:
    """Create the network that has this name in `ipwd_jax.models.create`.

    Raises:
        ValueError: this file does not have the network.
    """
    if match := re.fullmatch(r"resnet(\d+)(x4)?", name):
        widths = (32, 64, 128, 256) if match[2] else (16, 16, 32, 64)
        return ResNet((int(match[1]) - 2) // 6, widths, classes)
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        return WideResNet((int(match[1]) - 4) // 6, int(match[2]), classes)
    if name == "MobileNetV2":
        return MobileNetV2(classes)
    others = {"vgg8": (VGG, 1), "vgg13": (VGG, 2)}
    others |= {"ShuffleV1": (ShuffleNet, 1), "ShuffleV2": (ShuffleNet, 2)}
    if name not in others:
        known = ", ".join(["resnet*", "wrn_*", "MobileNetV2", *others])
        raise ValueError(f"there is no PyTorch network {name!r} here; choose one of {known}")
    kind, which = others[name]
    return kind(which, classes)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the step is computed."""

    channels_last: bool = True
    bfloat16: bool = False
    compiled: bool = False
    tf32: bool = False


class TorchArm:
    """A student, its teacher and the data on the device, ready to take steps."""

    def __init__(self, student: nn.Module, teacher: nn.Module, problem: Any, variant: Variant):
        """Move the networks and the data to the device; the networks are changed in place.

        `problem` is an `our_arm.Problem`; the step computes in the type of its `mean`.
        """
        self.device, self.variant, self.done = device(), variant, 0
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self._used_before = _memory(torch.cuda.memory_allocated)
        _memory(torch.cuda.reset_peak_memory_stats)
        dtype = torch.from_numpy(problem.mean).dtype
        self.student = student.to(self.device, dtype, memory_format=layout).train()
        self.teacher = teacher.to(self.device, dtype, memory_format=layout).eval()
        self.sgd = torch.optim.SGD(student.parameters(), problem.learning_rate, 0.9, 0, 5e-4)
        self._layout, self._padding, self._size = layout, problem.padding, problem.images.shape[1]
        images = np.pad(problem.images, ((0, 0), *[(problem.padding,) * 2] * 2, (0, 0)))
        self._images, self._labels, self._mean, self._std, self._index, self._view = (
            torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
            for x in (
                images,
                problem.labels.astype(np.int64),
                problem.mean,
                problem.std,
                problem.index,
                problem.view,
            )
        )
        self._loss = self._eager_loss
        if variant.compiled:
            mode = "max-autotune" if self.device == "cuda" else "default"
            self._loss = torch.compile(self._eager_loss, mode=mode)

    def _cut(self, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """Return normalised views (B, 3, H, W), cut in the same way as by `augment.apply_views`."""
        side, pixels = 2 * self._padding + 1, torch.arange(self._size, device=self.device)
        crop, mirrored = view // 2, (view % 2)[:, None]
        rows = (crop // side)[:, None] + pixels
        columns = (crop % side)[:, None] + torch.where(mirrored > 0, pixels.flip(0), pixels)
        cut = self._images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((cut.to(self._mean.dtype) / 255 - self._mean) / self._std).permute(0, 3, 1, 2)

    def _eager_loss(self, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        images = self._cut(index, view).contiguous(memory_format=self._layout)
        with torch.autocast(self.device, torch.bfloat16, self.variant.bfloat16):
            with torch.no_grad():
                target = self.teacher(images)
            logits = self.student(images)
        logits, target = logits.to(images.dtype), target.to(images.dtype)
        ours, theirs = F.log_softmax(logits / 4, 1), F.softmax(target / 4, 1)
        distilled = F.kl_div(ours, theirs, reduction="sum") * 16 / len(index)
        return 0.1 * F.cross_entropy(logits, self._labels[index]) + 0.9 * distilled

    def _step(self) -> torch.Tensor:
        loss = self._loss(self._index[self.done], self._view[self.done])
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        self.done += 1
        return loss.detach()

    def run(self, steps: int) -> tuple[float, float]:
        """Take steps; return the seconds until the device has finished, and their mean loss."""
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = self.variant.tf32
        torch.backends.cuda.matmul.allow_tf32 = self.variant.tf32
        started = time.perf_counter()
        mean = (sum(self._step() for _ in range(steps)) / steps).item()  # waits for the device
        return time.perf_counter() - started, mean

    def peak_memory(self) -> int | None:
        """Return the most bytes held since the arm was made, less those before; None on a CPU."""
        peak = _memory(torch.cuda.max_memory_allocated)
        return peak and peak - self._used_before


def device() -> str:
    """Return `cuda` if PyTorch can use a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory(count: Callable[[], Any]) -> Any:
    return count() if torch.cuda.is_available() else None
