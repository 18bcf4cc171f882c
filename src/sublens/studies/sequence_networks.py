"""Networks that read one sequence of tokens and write another: encoder and decoder, as LSTMs or Transformers.

A vocabulary of V tokens is numbered 0..V-1. Token V ends a sentence, fills short rows up, and starts the decoder.
Shapes: N sentences, S source tokens, T target tokens, O = V + 1 outputs. Source and target rows end with at least one
end token.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def written(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """Return which sentences ``net`` writes exactly right, letting it choose the likeliest token (bool [N]).

    The network is given the right sentence so far at every place. That decides the same as letting it go on with its
    own tokens: it writes the whole sentence right if and only if it chooses every token right after right ones.
    """
    with torch.no_grad():
        chosen = net(source, target).argmax(-1)
    right: Tensor = ((chosen == target) | ~asked(target, target.max())).all(1)
    return right


def asked(target: Tensor, end: Tensor | int) -> Tensor:
    """Return which places of ``target`` [N, T] count: those up to the first end token, and that one (bool)."""
    ended = (target == end).long()
    return ended.cumsum(1) - ended == 0


def sentence_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the tokens of a sentence, added up over each sentence and averaged over sentences.

    Args:
        outputs: scores [N, T, O].
        target: int64 [N, T].
    """
    each = functional.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none")
    return (each.view_as(target) * asked(target, outputs.shape[-1] - 1)).sum() / len(target)


def _delayed(target: Tensor, start: int) -> Tensor:
    """Return what the decoder is given: the start token, and all tokens but the last."""
    return functional.pad(target[:, :-1], (1, 0), value=start)


class LSTMTranslator(nn.Module):
    """An LSTM reads the source, and another writes the target from the state that the first one ends in.

    Args:
        source_tokens: V of the source.
        target_tokens: V of the target.
        embedding: size of the embeddings.
        width: size of the states.
        layers: of each LSTM.
        dropout: of the embeddings, and between layers.
    """

    def __init__(
        self, source_tokens: int, target_tokens: int, *, embedding: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.source_end, self.target_end = source_tokens, target_tokens
        self.source_embedding = nn.Embedding(source_tokens + 1, embedding)
        self.target_embedding = nn.Embedding(target_tokens + 1, embedding)
        self.dropout = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.encoder = nn.LSTM(embedding, width, layers, dropout=between, batch_first=True)
        self.decoder = nn.LSTM(embedding, width, layers, dropout=between, batch_first=True)
        self.output = nn.Linear(width, target_tokens + 1)

    def forward(self, source: Tensor, target: Tensor, forced: bool = True) -> Tensor:
        """Return the scores [N, T, O] of every token of ``target`` [N, T] after ``source`` [N, S].

        With ``forced`` the decoder is given the right tokens so far; without, those that it found likeliest itself.
        """
        read = self.dropout(self.source_embedding(source))
        lengths = asked(source, self.source_end).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(read, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.encoder(packed)
        given = _delayed(target, self.target_end)
        if forced:
            states, _ = self.decoder(self.dropout(self.target_embedding(given)), state)
            scores: Tensor = self.output(states)
            return scores
        token, found = given[:, :1], []
        for _ in range(target.shape[1]):
            states, state = self.decoder(self.dropout(self.target_embedding(token)), state)
            found.append(self.output(states))
            token = found[-1].argmax(-1)
        return torch.cat(found, 1)


class TransformerTranslator(nn.Module):
    """A Transformer, normalised after each part, with sines as positions.

    Args:
        source_tokens: V of the source.
        target_tokens: V of the target, or ``None``: source and target have one vocabulary and one embedding, and the
            scores are products with that embedding, over the square root of its size.
        width: size of the states (d).
        inner: size of the feed-forward layers.
        heads: of each attention.
        encoder_layers: their number.
        decoder_layers: their number.
        dropout: after each part.
    """

    def __init__(
        self,
        source_tokens: int,
        target_tokens: int | None,
        *,
        width: int,
        inner: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        tied = target_tokens is None
        self.source_end = source_tokens
        self.target_end = source_tokens if target_tokens is None else target_tokens
        self.source_embedding = nn.Embedding(source_tokens + 1, width)
        self.target_embedding = self.source_embedding if tied else nn.Embedding(self.target_end + 1, width)
        sizes: dict[str, Any] = {"dim_feedforward": inner, "dropout": dropout, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, **sizes), encoder_layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, **sizes), decoder_layers)
        self.dropout = nn.Dropout(dropout)
        self.output = None if tied else nn.Linear(width, self.target_end + 1)
        for name, weight in self.named_parameters():
            # torch copies one layer with its weights; each gets weights of its own, as in nn.Transformer.
            if weight.dim() > 1 and "embedding" not in name:
                nn.init.xavier_uniform_(weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the scores [N, T, O] of every token of ``target`` [N, T] after ``source`` [N, S]."""
        ignored = ~asked(source, self.source_end)
        read = self.encoder(self._placed(self.source_embedding(source)), src_key_padding_mask=ignored)
        given = self._placed(self.target_embedding(_delayed(target, self.target_end)))
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device, dtype=torch.bool)
        states = self.decoder(given, read, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=ignored)
        if self.output is None:
            scores = states @ self.target_embedding.weight.T / math.sqrt(states.shape[-1])
        else:
            scores = self.output(states)
        found: Tensor = scores
        return found

    def _placed(self, embedded: Tensor) -> Tensor:
        """Add the sines that tell places apart (Vaswani et al., 2017, section 3.5) to embeddings [N, S, d]."""
        places = torch.arange(embedded.shape[1], device=embedded.device, dtype=embedded.dtype)
        even = torch.arange(0, embedded.shape[2], 2, device=embedded.device, dtype=embedded.dtype)
        angles = places[:, None] * torch.exp(even * (-math.log(10_000) / embedded.shape[2]))
        sines = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        dropped: Tensor = self.dropout(embedded + sines)
        return dropped
