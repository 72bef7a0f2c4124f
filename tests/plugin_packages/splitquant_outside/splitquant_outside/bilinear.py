"""nn.Bilinear, y = x1 A x2 + b, as the sum of k of them."""

from torch import nn

from splitquant_plugins.modules import SplitModule


class SplitBilinear(SplitModule):
    def forward(self, input1, input2):
        return sum(part(input1, input2) for part in self.parts())


def bilinear_part(weight, bias):
    part = nn.Bilinear(weight.shape[1], weight.shape[2], weight.shape[0], bias=bias is not None, device="meta")
    part.weight, part.bias = weight, bias
    return part
