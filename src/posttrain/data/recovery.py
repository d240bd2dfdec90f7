r"""Which rows a pruned model recovers on: those where it departed most from the model that it was, in every ability.

Reference: PASER: Post-Training Data Selection for Efficient Pruned LLM Recovery, 2025, arXiv 2502.12594 (card 141).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from posttrain.data.sampler import Shuffled
from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.models.representation import mean_hidden
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, PosttrainError, Prompt

CLUSTERED = 2000  # rows that are clustered; others join the nearest cluster
CHUNK = 1024  # tokens whose distributions are compared at a time
STOP_WORDS = (
    "a an and are as at be but by do does for from had has have he her his how i if in into is it its me my no not of "
    "on or our she so than that the their them then there these they this to was we were what when where which who why "
    "will with you your"
)
STOP = frozenset(STOP_WORDS.split())


class Recovery(Shuffled):
    """Every row once an epoch, of the rows that are chosen before the stage's first step.

    Rows fall into clusters of like abilities; a cluster's part of the budget goes with how far the policy departed from
    the teacher (the model before pruning) on it. Inside, rows with the largest divergence for their cost come first,
    unless their concepts clash with those of the rows taken before.

    Args:
        share: B, of the rows. clusters: K. concepts: whether rows whose concepts clash are left out.
    """

    def __init__(
        self,
        rows: Sequence[Prompt | Group],
        seed: int = 0,
        share: float = 0.4,
        clusters: int = 10,
        concepts: bool = True,
    ) -> None:
        super().__init__(rows, seed)
        if not 0 < share <= 1 or clusters < 1:
            raise PosttrainError(
                f"recovery: share is {share} and clusters {clusters}; expected a share of the rows above 0, and at "
                f"least 1 cluster"
            )
        self.share, self.clusters, self.concepts = share, clusters, concepts
        self.kept: list[int] = list(range(self.rows))
        self.figures: dict[str, float] = {}

    def select(self, groups: Sequence[Group], policy: CausalPolicy, teacher: CausalPolicy | None) -> None:
        """Choose among the rows; called once, before anything is trained."""
        if teacher is None:
            raise PosttrainError("recovery: no teacher is given; expected the model as it was before it was pruned")
        divergence = divergences(policy, teacher, groups)
        states = torch.cat([mean_hidden(teacher, [Group(g.trajectories[:1])]) for g in groups])
        cluster = clustered(states, min(self.clusters, len(groups)), self.seed)
        costs = torch.tensor([math.log(g.trajectories[0].length ** 2) for g in groups]).clamp(min=1e-6)
        texts = [str(policy.tokenizer.decode(g.trajectories[0].tokens, skip_special_tokens=True)) for g in groups]
        budget = max(1, round(self.share * len(groups)))
        named = [key_phrases(text) for text in texts] if self.concepts else None
        self.kept, refused = chosen(divergence, cluster, divergence / costs, budget, named)
        self.rows = len(self.kept)
        self.figures = {
            "recovery/share": self.rows / len(groups),
            "recovery/refused": refused / len(groups),
            "recovery/divergence": float(divergence[self.kept].mean()),
            "recovery/divergence_all": float(divergence.mean()),
        }

    def take(self, count: int) -> list[int]:
        return [self.kept[place] for place in super().take(count)]

    def metrics(self) -> dict[str, float]:
        """The shares of rows that are kept, and that were refused for their concepts; mean divergences."""
        return self.figures


def chosen(
    divergence: Tensor, cluster: Tensor, score: Tensor, budget: int, concepts: Sequence[Iterable[str]] | None = None
) -> tuple[list[int], int]:
    """Row numbers ascending, and how many rows were refused for their concepts.

    divergence, cluster, score: `[rows]`. Clusters are visited by falling mean divergence, rows by falling score.
    """
    names = sorted(set(cluster.tolist()))
    means = {name: float(divergence[cluster == name].mean()) for name in names}
    budgets, graph, kept, refused = budgets_of(means, budget), ConceptGraph(), [], 0
    for name in sorted(names, key=lambda name: -means[name]):
        own = torch.nonzero(cluster == name)[:, 0]
        left = budgets[name]
        for row in own[score[own].argsort(descending=True, stable=True)].tolist():
            if not left:
                break
            if concepts is None or graph.admits(concepts[row]):
                kept.append(row)
                left -= 1
            else:
                refused += 1
    return sorted(kept), refused


def budgets_of(means: dict[int, float], budget: int) -> dict[int, int]:
    """Parts of a budget that go with the clusters' mean divergences (equal ones where all are 0), rounded down; what
    is left over goes to the largest.
    """
    total = sum(means.values())
    shares = {n: m / total if total > 0 else 1 / len(means) for n, m in means.items()}
    found = {n: math.floor(budget * share + 1e-9) for n, share in shares.items()}
    found[max(means, key=lambda n: means[n])] += budget - sum(found.values())
    return found


class ConceptGraph:
    """Concepts of the rows taken so far, with an edge between those that stood in one row.

    A row is admitted unless two of its concepts are both known and have no edge.
    """

    def __init__(self) -> None:
        self.edges: dict[str, set[str]] = {}

    def admits(self, concepts: Iterable[str]) -> bool:
        """Whether a row is taken; then its concepts belong together from now on."""
        found = set(concepts)
        known = sorted(found & self.edges.keys())
        if any(b not in self.edges[a] for i, a in enumerate(known) for b in known[i + 1 :]):
            return False
        for concept in found:
            self.edges.setdefault(concept, set()).update(found - {concept})
        return True


def key_phrases(text: str) -> list[str]:
    """The best third of a text's phrases between stop words and punctuation, by RAKE: a word counts degree over
    frequency, a phrase the sum of its words; lower case, plurals by s reduced.
    """
    phrases: list[tuple[str, ...]] = []
    for piece in re.split(r"[^\w\s]+", text.lower()):
        words: list[str] = []
        for word in [*piece.split(), ""]:
            if word and word not in STOP:
                words.append(word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word)
            elif words:
                phrases.append(tuple(words))
                words = []
    frequency = Counter(word for phrase in phrases for word in phrase)
    degree: Counter[str] = Counter()
    for phrase in phrases:
        for word in phrase:
            degree[word] += len(phrase)
    scores = {phrase: sum(degree[w] / frequency[w] for w in phrase) for phrase in phrases}
    best = sorted(scores, key=lambda phrase: (-scores[phrase], phrase))
    return [" ".join(phrase) for phrase in best[: -(-len(best) // 3)]]


# -- how far the models are apart --------------------------------------------------------------------------------------


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """`[..., vocabulary]` log-probabilities of two distributions to `[...]` nats, at most ln 2."""
    middle = torch.logaddexp(one, other) - math.log(2)
    halves = [(p.exp() * (p - middle)).nan_to_num(0.0).sum(-1) for p in (one, other)]  # what is impossible counts 0
    return 0.5 * (halves[0] + halves[1])


@torch.no_grad()
def divergences(policy: CausalPolicy, teacher: CausalPolicy, groups: Sequence[Group], budget: int = 4096) -> Tensor:
    """`[rows]`: the Jensen–Shannon divergence between the two models' next tokens, mean over a row's answer tokens."""
    batch = Batch.of([Group(g.trajectories[:1]) for g in groups])
    total = torch.zeros(len(batch))
    heads = policy.head(), teacher.head()
    with evaluating(policy.model), evaluating(teacher.model):
        for members in batch.partition(budget, keep_groups=False):
            part = batch.select(members)
            states = policy.hidden_states(part), teacher.hidden_states(part)
            pieces = zip(*(s.split(CHUNK) for s in states), strict=True)
            found = [
                jensen_shannon(*(h.logits(s).float().log_softmax(-1).cpu() for h, s in zip(heads, piece, strict=True)))
                for piece in pieces
            ]
            total[members] = torch.zeros(len(part)).index_add(0, part.sequence, torch.cat(found))
    return total / batch.lengths


# -- which rows are alike ----------------------------------------------------------------------------------------------


def clustered(states: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """`[rows]` int64: clusters of `[rows, width]` states, by diffusion embedding and NMF of its similarities.

    Of more than 2,000 rows an even sample is clustered, and the others join the cluster whose mean is nearest.
    """
    draw = torch.Generator().manual_seed(seed % (1 << 63))
    sample = torch.randperm(len(states), generator=draw)[:CLUSTERED].sort().values
    x = states[sample].double()
    own = factored(similarities(affinity(x), clusters), clusters, draw).argmax(1)
    names = own.unique()
    centres = torch.stack([x[own == name].mean(0) for name in names])
    found = names[torch.cdist(states.double(), centres).argmin(1)]
    found[sample] = own
    return found


def affinity(x: Tensor) -> Tensor:
    """`exp(-|x_i - x_j|^2 / 2 σ^2)`, σ the median distance of two rows (1 where all are equal)."""
    distance = torch.cdist(x, x)
    scale = float(distance.median()) or float(distance.max()) or 1.0
    return (-(distance**2) / (2 * scale**2)).exp()


def similarities(affinity: Tensor, count: int) -> Tensor:
    """`|U U^T|`, U the eigenvectors of the `count` least eigenvalues of the symmetric normalised Laplacian."""
    root = affinity.sum(1).clamp(min=1e-12).rsqrt()
    laplacian = torch.eye(len(affinity), dtype=affinity.dtype) - root[:, None] * affinity * root
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :count]
    return (vectors @ vectors.T).abs()


def factored(matrix: Tensor, rank: int, draw: torch.Generator, passes: int = 200) -> Tensor:
    """`[rows, rank]`: W of the non-negative factors W H of a matrix, by multiplicative updates (Lee and Seung, 2001).

    W starts from `rank` columns of the matrix, each as unlike those before as any.
    """
    first = int(torch.randint(len(matrix), (1,), generator=draw))
    columns = [first]
    while len(columns) < rank:
        columns.append(int(matrix[columns].amax(0).argmin()))
    w = matrix[:, columns] + 1e-4
    h = torch.full((rank, matrix.shape[1]), 1.0, dtype=matrix.dtype)
    for _ in range(passes):
        h = h * (w.T @ matrix) / (w.T @ w @ h).clamp(min=1e-12)
        w = w * (matrix @ h.T) / (w @ (h @ h.T)).clamp(min=1e-12)
    return w
