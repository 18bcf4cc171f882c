"""The networks of the studies on images. Shapes: N images, C channels, H rows, W columns."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

PAPER_CHANNELS = (32, 64, 128, 256)
_SMALLEST = 3  # rows or columns that a pooling must leave: fewer, and a 3x3 kernel sees mostly padding


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, the mean over all places, and a linear layer; [N, C, H, W] -> [N, classes].

    In the paper's network (four convolutions, images of 32x32) a 2x2 maximum pooling follows each convolution but the
    last. On smaller images only those poolings are there that leave 3 rows and columns: one for 8x8 images.

    Args:
        shape: C, H and W of the images.
        classes: number of classes.
        channels: of each convolution.
        dropout: drop 25 % before the last convolution but one is rectified, and 50 % after the last.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, channels: Sequence[int] = PAPER_CHANNELS, *, dropout: bool
    ) -> None:
        super().__init__()
        before, *sides = shape
        side = min(sides)
        layers: list[nn.Module] = []
        for index, after in enumerate(channels):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            if dropout and index == len(channels) - 2:
                layers.append(nn.Dropout(0.25))
            layers.append(nn.ReLU())
            if index < len(channels) - 1 and side // 2 >= _SMALLEST:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            before = after
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images ``x``."""
        answer: Tensor = self.output(self.features(x).mean(dim=(2, 3)))
        return answer


class _Block(nn.Module):
    """Two convolutions around which the input goes; [N, before, H, W] -> [N, after, H/stride, W/stride]."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second_norm(self.second(functional.relu(self.first_norm(self.first(x)))))
        return functional.relu(inner + self.around(x))


class ResNet(nn.Module):
    """The residual network for small images of He et al. (2016, section 4.2); [N, C, H, W] -> [N, classes].

    A convolution of 16 channels, then three stages of 16, 32 and 64 channels with (depth - 2) / 6 blocks of two
    convolutions each; where channels and size change, a 1x1 convolution takes the input around. ResNet-110 has 1.73 M
    parameters.

    Args:
        shape: C, H and W of the images.
        classes: number of classes.
        depth: 6 n + 2 for n blocks a stage.
    """

    def __init__(self, shape: Sequence[int], classes: int, depth: int = 110) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth} must be 6 n + 2, such as 20 or 110")
        self.first = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(16)
        before, stages = 16, []
        for after, stride in ((16, 1), (32, 2), (64, 2)):
            stages.append(
                nn.Sequential(_Block(before, after, stride), *(_Block(after, after, 1) for _ in range(blocks - 1)))
            )
            before = after
        self.stages = nn.Sequential(*stages)
        self.output = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images ``x``."""
        x = self.stages(functional.relu(self.first_norm(self.first(x))))
        answer: Tensor = self.output(x.mean(dim=(2, 3)))
        return answer
