"""Where the outputs and the inputs of a module are in its weight."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Layout:
    """A weight seen in a shape whose dimensions are outputs, inputs, and others (a convolution's kernel).

    Attributes:
        view: the shape.
        outputs: its dimensions that count the outputs, in the order in which a bias counts them.
        inputs: its dimensions that count the inputs.
        plain_outputs: the dimensions of the weight's own shape that count the outputs; empty if none do.
    """

    view: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    plain_outputs: tuple[int, ...]

    @property
    def apart(self) -> tuple[int, ...]:
        """Dimensions that count both: the groups of a convolution, which have nothing to do with each other."""
        return tuple(d for d in self.outputs if d in self.inputs)


def layout_of(module: nn.Module, parameter: nn.Parameter) -> Layout:
    """The layout of one of a module's own parameters: outputs first, then inputs, unless it is known to differ."""
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        return Layout(shape, tuple(range(len(shape))), (), tuple(range(len(shape))))
    if isinstance(module, _ConvNd) and module.groups > 1:
        parts = module.groups
        if isinstance(module, _ConvTransposeNd):
            return Layout((parts, shape[0] // parts, *shape[1:]), (0, 2), (0, 1), ())
        return Layout((parts, shape[0] // parts, *shape[1:]), (0, 1), (0, 2), (0,))
    # Hugging Face's Conv1D is a linear layer whose weight is stored as (inputs, outputs).
    if isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return Layout(shape, (1,), (0,), (1,))
    return Layout(shape, (0,), (1,), (0,))
