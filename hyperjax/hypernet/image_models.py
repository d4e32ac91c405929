"""The convolutional networks whose kernels Ha et al. generate, a small `ConvNet` and Wide ResNets; pictures of kernels.

B batch, H rows, W columns, C channels, K classes; h w size of a kernel.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNet(nn.Module):
    """Two convolutions, each with ReLU and 2x2 max pooling, and a linear layer: `conv1`, `conv2`, `head`.

    With the defaults and 28x28 images the kernel of `conv2`, 7x7x16x16, has 12,544 weights.

    Attributes:
        classes: K.
        features: C of both convolutions.
        kernel: height and width of their kernels.

    Reference: Ha, Dai, Le, arXiv 1609.09106, appendix A.1 (MNIST).
    """

    classes: int = 10
    features: int = 16
    kernel: int = 7

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits [B, K].

        Args:
            images: [B, H, W, C]; H and W at least 4.
            train: as of `WideResNet`; changes nothing here.

        Raises:
            ValueError: the images are smaller.
        """
        if min(images.shape[1:3]) < 4:
            raise ValueError(
                f"images are {images.shape[1]} x {images.shape[2]}, expected 4 x 4 or more: they are halved twice"
            )
        x = images
        for name in ("conv1", "conv2"):
            x = nn.Conv(self.features, (self.kernel, self.kernel), kernel_init=nn.initializers.he_normal(), name=name)(
                x
            )
            x = nn.relu(_max_pool(x))
        return nn.Dense(self.classes, name="head")(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """Two 3x3 convolutions, `conv1` and `conv2`, each after BatchNorm and ReLU, and a shortcut.

    Where the width changes, the shortcut is a 1x1 convolution of what `conv1` reads.

    Attributes:
        features: C of the output.
        stride: of `conv1` and of the shortcut.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        a = nn.relu(_norm("norm1", train)(x))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.stride, "shortcut")(a)
        a = _conv(self.features, 3, self.stride, "conv1")(a)
        a = nn.relu(_norm("norm2", train)(a))
        return x + _conv(self.features, 3, 1, "conv2")(a)


class WideResNet(nn.Module):
    """A pre-activation Wide ResNet: `stem`, three groups of (depth - 4) / 6 blocks, `norm`, `head`.

    The 3x3 kernels of the groups are `group1_block1/conv1/kernel` and so on: `^group.*/conv` selects them and neither
    the stem nor the shortcuts. BatchNorm keeps its statistics in "batch_stats".

    Attributes:
        depth: 6 n + 4 layers.
        width: the groups have 16, 32 and 64 times as many channels.
        classes: K.

    Reference: Zagoruyko and Komodakis, arXiv 1605.07146; 40-1 and 40-2 in Ha, Dai, Le, arXiv 1609.09106, table 2.
    """

    depth: int = 40
    width: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits [B, K].

        Args:
            images: [B, H, W, C]; H and W multiples of 4.
            train: whether BatchNorm uses the batch's own statistics, and updates the kept ones ("batch_stats" is then
                to be mutable).

        Raises:
            ValueError: the depth is not 6 n + 4.
        """
        if self.depth < 10 or self.depth % 6 != 4 or self.width < 1:
            raise ValueError(
                f"depth {self.depth}, width {self.width}: expected a depth 6 n + 4, as 40, and a width >= 1"
            )
        x = _conv(16, 3, 1, "stem")(images)
        for group in (1, 2, 3):
            for block in range(1, (self.depth - 4) // 6 + 1):
                stride = 2 if group > 1 and block == 1 else 1
                features = 8 * 2**group * self.width
                x = Block(features, stride, name=f"group{group}_block{block}")(x, train)
        x = nn.relu(_norm("norm", train)(x))
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))


def _max_pool(x: Array) -> Array:
    """Halves height and width; an odd last row or column is left out. On CPU its gradient beats `nn.max_pool`'s."""
    size, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(size, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def _conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), stride, use_bias=False, kernel_init=he_normal, name=name)


def _norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
