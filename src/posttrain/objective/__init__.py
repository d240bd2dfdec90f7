"""One surrogate with four interchangeable parts: advantage, denominator (ratio), mask and divergences."""
