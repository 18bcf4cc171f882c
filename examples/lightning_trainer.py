"""Lightning's Trainer: the masked network is a module like any other; a checkpoint holds the logits alone."""

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sublens as sl


class MaskTraining(lightning.LightningModule):
    def __init__(self, network: nn.Module, alpha: float) -> None:
        super().__init__()
        self.masked = sl.MaskedNetwork(network, samples=4, seed=0)
        self.alpha = alpha

    def training_step(self, batch, index):
        x, y = batch
        loss = cross_entropy(self.masked(x), y)
        self.log("loss", loss)
        return loss + self.masked.penalty(self.alpha)

    def validation_step(self, batch, index):  # Lightning has called eval(): this is the mask itself
        x, y = batch
        self.log("accuracy", (self.masked(x).argmax(dim=1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.masked.parameters(), lr=0.1)


def main(epochs: int = 3, folder: str = "lightning") -> sl.Mask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    x = torch.randn(4096, 16)
    data = TensorDataset(x, x[:, :4].argmax(dim=1))
    training = MaskTraining(network, alpha=1e-6)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, logger=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(training, DataLoader(data, batch_size=128, shuffle=True), DataLoader(data, batch_size=1024))
    mask = training.masked.mask()
    print(f"{mask.kept:.1%} of the weights kept, accuracy {trainer.callback_metrics['accuracy']:.3f}")
    return mask


if __name__ == "__main__":
    main()
