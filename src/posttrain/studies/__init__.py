"""Studies: a paper's claim as a controlled experiment, with a verdict by a rule that is fixed before the run.

A module of this package holds studies of one family; it is imported when studies are looked up.
"""

from posttrain.studies.registry import find, registered

__all__ = ["find", "registered"]
