"""Rollouts on the workers of a Ray cluster (the extra `ray`; docs/cluster.md)."""
