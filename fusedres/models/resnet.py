"""The ResNet of He et al. 2015."""

from __future__ import annotations

from .network import Network


class ResNet(Network):
    """The residual network of He et al. 2015 (arXiv:1512.03385), fused, for signals, images and volumes.

    With the 7x7 stem and four stages the state_dict is that of torchvision's ResNet, in both directions.

    Args:
        block: `fusedres.nn.BasicBlock`, `fusedres.nn.Bottleneck`, or a class that takes the same arguments.
        layers: blocks for each stage; every stage but the first begins with a stride of 2.
        num_classes: of the classifier.
        in_channels: of the input.
        widths: for each stage the blocks' `channels`; the stem has the first.
        stem: "7x7" (stride 2, then a max-pooling; for ImageNet) or "3x3" (stride 1; for CIFAR).
        shortcut, stride_on, groups, base_width, activation, gate_bias: as for the block.
        init: of the convolutions: "he" (normal, fan-out) or "xavier" (uniform).
        zero_init_residual: every block begins as its shortcut alone.
        channels_last: give the parameters the memory format channels_last (channels_last_3d for `dims=3`).
        dims: 1, 2 or 3 spatial dimensions.
        keep_finite_statistics: as in `FuseConfig`, for all BatchNorms of the network.
        device, dtype: of parameters and buffers.

    Raises:
        TypeError: a number that is no whole one.
        ValueError: an argument that is none of these; the text lists what is accepted.
    """
