"""Which layer gets how many bits."""

from posttrain.compress.allocate.allocation import Allocation

__all__ = ["Allocation"]
