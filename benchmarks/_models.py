"""Models of the benchmarks: a BERT-Tiny and a ResNet-18-shaped convolution net, with heavy-tailed weights."""

from __future__ import annotations

import torch
from torch import nn

# Channels, stride and repeats of ResNet-18's four stages (He et al. 2015, table 1).
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def bert_tiny(layers: int = 2, hidden: int = 128) -> nn.Module:
    """A BERT classifier (L=2, H=128, A=2 by default) with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        vocab_size=1000 if layers < 2 else 30522,
        num_labels=6,
    )
    return heavy_tailed(BertForSequenceClassification(config).eval())


def resnet18(width: int = 1) -> nn.Module:
    """A net with the convolutions of ResNet-18, BatchNorms and residual sums; `width` divides its channels."""
    torch.manual_seed(0)
    return heavy_tailed(_ResNet(width).eval())


def heavy_tailed(model: nn.Module) -> nn.Module:
    """Redraw the weights of Linear and convolution layers from Student-t(4), at the scale that they have."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                normal = torch.randn(module.weight.shape, generator=generator)
                chi2 = torch.randn((4, *module.weight.shape), generator=generator).square().mean(0)
                module.weight.copy_(normal / chi2.sqrt() * module.weight.std())
    return model


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs)))))
        return torch.relu(hidden + self.shortcut(inputs))


class _ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        channels = 64 // width
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks = []
        for outputs, stride in STAGES:
            blocks += [_Block(channels, outputs // width, stride), _Block(outputs // width, outputs // width, 1)]
            channels = outputs // width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000 // width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(inputs)).mean((2, 3)))
