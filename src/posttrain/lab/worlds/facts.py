"""A world of facts: invented people with attributes, some spoken of often and most rarely.

    job of Tobi?              baker      recall
    pet of boss of Tobi?      cat        two hops

The facts are those of a `world` seed, the same in every task that names it; only which questions are asked differs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.world import WorldTask, is_heldout, world_task
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

VALUES: dict[str, tuple[str, ...]] = {
    "job": ("baker", "cook", "clerk", "judge", "miner", "nurse", "pilot", "poet", "smith", "tailor", "vet", "weaver"),
    "city": ("Bern", "Cork", "Graz", "Kiev", "Lima", "Lyon", "Oslo", "Pisa", "Riga", "Rome", "Turin", "Wien"),
    "pet": ("cat", "cow", "dog", "duck", "fish", "fox", "goat", "hen", "owl", "pig", "rat", "toad"),
}
BOSS = "boss"
TEMPLATES = ("{a} of {p}?", "{p}: {a}?", "{p}, {a}?", "tell {a} of {p}")
HOPS = "{a} of boss of {p}?"


@dataclass(frozen=True)
class People:
    """names: from the most to the least frequent; frequency: how often each is spoken of (sums to 1).

    facts: name and attribute to value; the boss of a person is another one of the people.
    """

    names: tuple[str, ...]
    frequency: tuple[float, ...]
    facts: dict[tuple[str, str], str]

    def answer(self, name: str, *attributes: str) -> str:
        """Follow attributes from a person: `answer("Tobi", "boss", "pet")`."""
        for attribute in attributes:
            name = self.facts[name, attribute]
        return name


@cache
def people(count: int = 100, exponent: float = 1.0, world: int = 0) -> People:
    """The people of a world; the frequency of the n-th is proportional to `n ** -exponent`."""
    chance = random.Random(f"facts/{world}")
    possible = ["".join(parts).capitalize() for parts in product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou")]
    if not 2 <= count <= len(possible):
        raise PosttrainError(f"facts: people is {count}; expected from 2 to {len(possible)}")
    names = tuple(chance.sample(possible, count))
    weights = [(n + 1) ** -exponent for n in range(count)]
    facts = {(name, a): chance.choice(values) for name in names for a, values in VALUES.items()}
    for name in names:
        facts[name, BOSS] = chance.choice([other for other in names if other != name])
    return People(names, tuple(w / sum(weights) for w in weights), facts)


def facts(
    *,
    count: int = 100,
    exponent: float = 1.0,
    world: int = 0,
    hops: float = 0.0,
    train: int = 800,
    heldout: int = 200,
    seed: int = 0,
    name: str = "facts",
) -> WorldTask:
    """Questions about people; every person is asked about equally often, and spoken of by a power law in corpora.

    A fact is asked for in several wordings, so most facts of held-out questions occur in training in other words.
    Questions of two hops that are held out occur nowhere.

    Args:
        count, exponent, world: of `people`.
        hops: share of questions of two hops.

    `meta`: domain (head, middle or tail: the first tenth of the people, up to the half, the rest; `hops` for two hops),
    person, attribute, rank (from 0), frequency (of the person in corpora), hops (1 or 2).
    """
    if not 0 <= hops <= 1:
        raise PosttrainError(f"facts: hops is {hops}; expected a share from 0 to 1")
    crowd = people(count, exponent, world)

    def about(chance: random.Random, rank: int) -> TaskItem:
        person = crowd.names[rank]
        two = chance.random() < hops
        attribute = chance.choice([*VALUES] if two else [*VALUES, BOSS])
        template = HOPS if two else chance.choice(TEMPLATES)
        answer = crowd.answer(person, BOSS, attribute) if two else crowd.answer(person, attribute)
        place = "head" if rank < count / 10 else "middle" if rank < count / 2 else "tail"
        meta = {
            "domain": "hops" if two else place,
            "person": person,
            "attribute": attribute,
            "rank": rank,
            "frequency": crowd.frequency[rank],
            "hops": 1 + two,
        }
        return TaskItem(template.format(a=attribute, p=person), answer, meta, answer)

    def spoken(chance: random.Random) -> TaskItem:
        """A person by the power law, then a question about them that is not held out: the law holds exactly."""
        rank = chance.choices(range(count), crowd.frequency)[0]
        return next(item for item in iter(lambda: about(chance, rank), None) if not is_heldout(item))

    longest = max(len(v) for values in VALUES.values() for v in values)
    return world_task(
        name,
        lambda chance: about(chance, chance.randrange(count)),
        Reward({"answer": (ExactMatch(), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=longest + 2,
        pretraining=spoken,
        description=f"{len(VALUES) + 1} attributes of {count} people",
    )
