"""Rollout strategies beside the plain one, a mechanism a file."""
