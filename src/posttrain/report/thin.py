"""Choosing what to keep of a long run, so that its page stays small: samples evenly, curves with their peaks."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.report.folder import Row, stage_of, step_of


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices of `range(count)`, evenly spread, the first and the last among them (the last if one)."""
    if count <= limit:
        return list(range(count))
    if limit <= 1:
        return [count - 1][:limit]
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def thin_samples(samples: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` samples in their order: all of the last step first, the others spread evenly over the run."""
    if len(samples) <= limit:
        return list(samples)
    end = max((stage_of(row), step_of(row)) for row in samples)
    last = [i for i, row in enumerate(samples) if (stage_of(row), step_of(row)) == end]
    kept_last = [last[i] for i in spread(len(last), limit)]
    in_last = set(last)
    others = [i for i in range(len(samples)) if i not in in_last]
    kept_others = [others[i] for i in spread(len(others), limit - len(kept_last))]
    return [samples[i] for i in sorted(kept_others + kept_last)]


def keep_peaks(values: Sequence[float | None], limit: int) -> list[int]:
    """At most `limit` (at least 4) indices of `values`: the ends, and of each of equal buckets its lowest and highest.

    A plain subsample would hide the one step at which a loss exploded. A bucket without values gives one index, so
    that a gap in the curve stays a gap.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    buckets = (limit - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        inside = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        numbers = [(value, i) for i in inside if (value := values[i]) is not None]
        kept |= {min(numbers)[1], max(numbers)[1]} if numbers else {inside[0]}
    return sorted(kept)
