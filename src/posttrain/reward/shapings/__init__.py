"""Reward shapings, a mechanism a file."""
