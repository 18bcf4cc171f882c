"""Hugging Face's Trainer trains a classifier, and then a mask on it."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import sublens as sl


class Masked(nn.Module):
    """What Trainer wants: keyword arguments in, an output whose `loss` is minimised."""

    def __init__(self, network: nn.Module, alpha: float) -> None:
        super().__init__()
        self.masked, self.alpha = sl.MaskedNetwork(network, samples=4, seed=0), alpha

    def forward(self, input_ids: Tensor, labels: Tensor):
        output = self.masked(input_ids=input_ids, labels=labels)
        if self.training:
            output["loss"] = output.loss + self.masked.penalty(self.alpha)
        return output


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Is the first token of the upper half of the vocabulary?"""
    tokens = torch.randint(100, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in tokens]


def train(model: nn.Module, steps: int, lr: float) -> float:
    arguments = TrainingArguments(
        "trainer", max_steps=steps, per_device_train_batch_size=64, learning_rate=lr, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=sentences(4096), eval_dataset=sentences(512))
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def main(steps: int = 100) -> sl.Mask:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    network = BertForSequenceClassification(BertConfig(vocab_size=100, max_position_embeddings=8, **sizes))
    print(f"the whole network's loss: {train(network, steps, lr=2e-3):.3f}")
    masking = Masked(network, alpha=1e-7)
    loss = train(masking, steps, lr=0.1)
    mask = masking.masked.mask()
    print(f"{mask.kept:.1%} of the weights kept, loss {loss:.3f}")
    mask.apply(network).save_pretrained("trainer/masked")  # loads without sublens
    return mask


if __name__ == "__main__":
    main()
