"""Models of somebody's own, for `--backbone own_models:NAME`."""

from __future__ import annotations

import torch
from torch import nn

from mgg_edge.learn import Backbone
from mgg_edge.learn.images import synthetic_frames


class Net(nn.Module):
    """Convolutions with two kinds of norm; says how its pictures are prepared."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 48, 40), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.block(self.stem(images)).mean((2, 3)))


class ByValue(nn.Module):
    """Decides by the values of a picture."""

    def forward(self, images):
        return images * 2 if images.mean() > 0 else images


class Exotic(nn.Module):
    """An operator that no engine has."""

    def forward(self, images):
        return images + torch.linalg.svdvals(images[..., :3, :3]).sum()


class Scaled(nn.Module):
    """A layer scale [C, 1, 1] behind a permutation, which ONNX Runtime's optimiser moves past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])

    def forward(self, images):
        wide = self.linear(self.norm(images.permute(0, 2, 3, 1)))
        return images + self.scale * nn.functional.gelu(wide).permute(0, 3, 1, 2)


def with_inner(inner: nn.Module) -> Net:
    net = Net()
    net.stem.insert(0, inner)
    return net


def scaled() -> Net:
    net = Net()
    net.stem.append(nn.Sequential(Scaled(), Scaled()))
    return net


def by_value() -> Net:
    return with_inner(ByValue())


def exotic() -> Net:
    return with_inner(Exotic())


def no_model() -> int:
    return 3


def broken() -> Net:
    raise ValueError("no such layer")


def fixed_size() -> Net:
    net = Net()
    net.head = nn.Sequential(nn.Unflatten(1, (4, 5)), nn.Flatten(), nn.Linear(20, 5))
    return net


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return self.net(images)


class Reassigning(Counting):
    """The same by a new tensor."""

    def forward(self, images):
        self.calls = self.calls + 1
        return self.net(images)


def net_of_mine():
    """Takes no options."""
    torch.manual_seed(0)
    net = Net()
    net.head.weight.data.mul_(30)  # sure of itself
    return net


def ends_in_softmax():
    return _ending(nn.Softmax(1))


def ends_in_sigmoid():
    return _ending(nn.Sigmoid())


def ends_in_log_softmax():
    return _ending(nn.LogSoftmax(1))


def _ending(last):
    net = net_of_mine()
    whole = nn.Sequential(net, last)
    whole.default_cfg = net.default_cfg
    return whole


def scaled_to_255():
    net = net_of_mine()
    net.default_cfg |= {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    return net


def compiled():
    net = net_of_mine()
    net.block = torch.compile(net.block)
    return torch.compile(net)


def in_parallel():
    return nn.DataParallel(net_of_mine())


class Attending(nn.Module):
    """Attention by PyTorch's own modules and functions, on sixteen patches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        self.patch, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 5)
        self.kind = kind
        if kind == "multihead":
            self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        elif kind == "encoder":
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            self.mix = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, images):
        tokens = self.norm(self.patch(images).flatten(2).transpose(1, 2))
        if self.kind == "multihead":
            tokens = tokens + self.mix(tokens, tokens, tokens, need_weights=False)[0]
        elif self.kind == "encoder":
            tokens = self.mix(tokens)
        else:
            heads = tokens.unflatten(2, (2, 8)).transpose(1, 2)
            mask = self.mask if self.kind == "masked" else None
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
            tokens = tokens + mixed.transpose(1, 2).flatten(2)
        return self.head(tokens.mean(1))


def attends_multihead():
    return Attending("multihead")


def attends_encoder():
    return Attending("encoder")


def attends_masked():
    return Attending("masked")


def attends_plain():
    return Attending("plain")


def moving_net(norm_statistics: str, size: int = 32) -> Backbone:
    """A small net with batch normalisation whose source statistics are those of synthetic pictures."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(40):
            model((synthetic_frames(16, size, size, 5).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    scaling = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return Backbone.from_module(model, input_size=size, norm_statistics=norm_statistics, **scaling)
