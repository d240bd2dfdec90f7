"""Making a model smaller: transform* -> bit allocation -> solver(grid) -> packing, one pipeline for every method."""
