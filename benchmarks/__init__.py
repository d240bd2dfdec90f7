"""Speed and memory of posttrain beside TRL on the same work; `python -m benchmarks.run`."""
