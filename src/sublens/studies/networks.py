"""The networks of the built-in studies."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def feed_forward(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Return linear layers of the given widths with ReLU between them; [N, inputs] -> [N, outputs]."""
    sizes = [inputs, *widths]
    hidden = [layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


class TurnsLSTM(nn.Module):
    """An LSTM that is shown the parts of its input in turn, and answers each before the next; [N, I] -> [N, O].

    The input is cut into ``turns`` equal parts. Each is shown for ``steps`` steps in inputs of its own, the others
    zero, and answered at the last of them in outputs of its own. The state goes on from part to part.
    """

    def __init__(self, inputs: int, width: int, layers: int, outputs: int, *, turns: int, steps: int) -> None:
        super().__init__()
        self.turns, self.steps = turns, steps
        self.lstm = nn.LSTM(inputs, width, layers, batch_first=True)
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Answer the inputs ``x`` [N, inputs]."""
        parts = torch.block_diag(*torch.ones(self.turns, 1, x.shape[1] // self.turns)).to(x)
        states, _ = self.lstm((x.unsqueeze(1) * parts).repeat_interleave(self.steps, 1))
        answers = self.output(states[:, self.steps - 1 :: self.steps])  # [N, turns, outputs]
        own = answers.unflatten(2, (self.turns, -1)).diagonal(dim1=1, dim2=2)  # [N, outputs of one, turns]
        joined: Tensor = own.transpose(1, 2).flatten(1)
        return joined


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
