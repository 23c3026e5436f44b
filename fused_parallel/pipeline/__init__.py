"""Pipeline parallelism: cutting a model into stages."""

from .split import split_layers

__all__ = ["split_layers"]
