"""Plans: how much memory and time a training step takes, and how rollouts and training overlap on many workers."""
