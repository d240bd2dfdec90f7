"""A run's online stages on a Ray cluster: who draws and who scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from posttrain.models.causal import CausalPolicy
from posttrain.reward.pooled import PooledReward
from posttrain.rollout.pool.cluster import Cluster, joined
from posttrain.rollout.pool.engine import PooledEngine
from posttrain.training.collect import Online, Source


def on_cluster(cluster: Cluster | None) -> AbstractContextManager[None]:
    """Be part of the recipe's cluster inside the block, where it names one."""
    return nullcontext() if cluster is None else joined(cluster)


@contextmanager
def pooled(source: Source, policy: CausalPolicy, cluster: Cluster | None, say: Callable[[str], None]) -> Iterator[None]:
    """Inside the block workers of the cluster draw an online source's completions, and score them where it has such.

    The source's reward goes on counting failures after it.
    """
    if cluster is None or not isinstance(source, Online):
        yield
        return
    engine = PooledEngine(policy, cluster, rows=source.settings.rollout_rows, say=say)
    reward = PooledReward(source.reward, cluster.reward_workers, say) if cluster.reward_workers else None
    source.engine, source.reward = engine, source.reward if reward is None else reward
    try:
        yield
    finally:
        engine.close()
        if reward is not None:
            reward.close()
