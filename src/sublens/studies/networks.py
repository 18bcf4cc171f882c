"""The networks of the built-in studies."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def feed_forward(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Return linear layers of the given widths with ReLU between them; [N, inputs] -> [N, outputs]."""
    sizes = [inputs, *widths]
    hidden = [layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


class RepeatedLSTM(nn.Module):
    """An LSTM that is shown the same input for some steps and answers at the last; [N, inputs] -> [N, outputs]."""

    def __init__(self, inputs: int, width: int, layers: int, outputs: int, *, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.lstm = nn.LSTM(inputs, width, layers, batch_first=True)
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Answer the inputs ``x`` [N, inputs]."""
        states, _ = self.lstm(x.unsqueeze(1).expand(-1, self.steps, -1))
        answer: Tensor = self.output(states[:, -1])
        return answer
