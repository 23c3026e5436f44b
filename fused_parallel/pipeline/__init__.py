"""Pipeline parallelism: cutting a model into stages, and the channels between them."""

from .split import split_layers
from .stage_links import StageLinks, links_of

__all__ = ["StageLinks", "links_of", "split_layers"]
