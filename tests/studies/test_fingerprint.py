"""What changes an arm's key, and what does not."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.studies.fingerprint import describe, fingerprint
from posttrain.studies.study import Arm, Measured, job_key
from posttrain.trajectory import PosttrainError, Prompt

CODE = '''
from dataclasses import dataclass, field

from posttrain.objective.advantage import Fixed, group_mean

FACTOR = 2.0
UNUSED = 1.0


def double(x):
    """Twice."""
    return FACTOR * x


def elsewhere(x):
    return x


class Base:
    def start(self):
        return 1


@dataclass(frozen=True)
class Part(Base):
    size: int = 3
    cache: dict = field(default_factory=dict, compare=False)

    def of(self, batch):
        # a comment
        return double(group_mean(batch.group, batch.reward)[0])


def helper():
    return 0


def run(seed, quick, **arguments):
    return helper()
'''


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports the module of `CODE` with some text replaced, each time as a new module of one name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def edit(old: str = "", new: str = "") -> ModuleType:
        assert old in CODE
        (tmp_path / "edited_part.py").write_text(CODE.replace(old, new) if old else CODE)
        sys.modules.pop("edited_part", None)
        importlib.invalidate_caches()
        return importlib.import_module("edited_part")

    yield edit
    sys.modules.pop("edited_part", None)


def key(module: ModuleType, **arguments: Any) -> str:
    return fingerprint(module.run, {"part": module.Part(), **arguments})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("double(group_mean", "(group_mean"),  # the part
        ("return FACTOR * x", "return FACTOR * x + 1"),  # a function it calls
        ("FACTOR = 2.0", "FACTOR = 3.0"),  # a constant of that
        ("return 1", "return 2"),  # its base class
        ("size: int = 3", "size: int = 4"),
        ("return 0", "return 1"),  # what the run function calls
        ("return helper()", "return helper() or seed"),
    ],
)
def test_code_that_an_arm_uses_changes_its_key(edited: Any, old: str, new: str) -> None:
    before = key(edited())
    assert key(edited(old, new)) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another"),
        ('    """Twice."""\n', '    """Two times what is given."""\n'),
        ("return FACTOR * x", "return (FACTOR *\n            x)"),
        ("    return x\n", "    return x + 1\n"),  # `elsewhere`, which nothing calls
        ("UNUSED = 1.0", "UNUSED = 2.0"),
        ("def run(seed, quick, **arguments):", "def run(seed, quick, **arguments):  # here"),
        ("def double(x):", "from posttrain.lab.haste import in_haste\n\n\n@in_haste(len)\ndef double(x):"),
    ],
)
def test_other_edits_do_not(edited: Any, old: str, new: str) -> None:
    before = key(edited())
    assert key(edited(old, new)) == before


def test_the_library_code_behind_a_part_counts(edited: Any) -> None:
    module = edited()
    sources = describe(module.run, {"part": module.Part()})["sources"]
    assert "posttrain.objective.advantage:group_mean" in sources
    assert "edited_part:Base" in sources
    assert not any(name.startswith(("torch", "dataclasses")) for name in sources)


def test_the_run_function_brings_the_helpers_of_its_own_module_alone(edited: Any) -> None:
    module = edited("return helper()", "return helper(), Measured, describe")
    module.Measured, module.describe = Measured, describe
    sources = describe(module.run, {})["sources"]
    assert set(sources) == {"edited_part:run", "edited_part:helper"}
    depends = describe(module.run, {}, (module.double,))["sources"]
    assert set(depends) - set(sources) == {"edited_part:double", "edited_part:FACTOR"}


def test_the_types_that_all_arms_share_count_where_they_are_named(edited: Any) -> None:
    module = edited()
    assert not any(name.startswith("posttrain.trajectory") for name in describe(module.run, {"x": Prompt})["sources"])
    assert "posttrain.trajectory:Prompt" in describe(module.run, {}, (Prompt,))["sources"]


def test_arguments_count_to_the_last_field(edited: Any) -> None:
    module = edited()
    assert key(module) == key(module)
    assert fingerprint(module.run, {"part": module.Part(size=4)}) != key(module)
    part = module.Part()
    part.cache["seen"] = 1
    assert fingerprint(module.run, {"part": part}) == key(module), "what is not compared is a cache"
    assert key(module, a=1, b=2) == key(module, b=2, a=1)
    different = [
        1, 1.0, "1", True, None, [1], {"1": 1}, {1: 1}, {1}, torch.ones(2), torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, 1), torch.tensor(1.0), Path("1"), len, str, lambda x: x, lambda x: x + 1, int.__add__, Measured,
        re.compile("a"), re.compile("a", re.I), date(2020, 1, 1), date(2020, 1, 2), b"1", Counter("ab"), Counter("aab"),
    ]  # fmt: skip
    keys = [key(module, extra=value) for value in different]
    assert len(set(keys)) == len(different)
    assert keys == [key(module, extra=value) for value in different]


def test_methods_and_their_settings() -> None:
    def of(method: Any) -> str:
        return fingerprint(key, {"method": method})

    grpo = methods.grpo()
    assert of(grpo) == of(methods.grpo())
    changed = [
        grpo.with_settings(steps=7),
        grpo.with_settings(learning_rate=1e-9),
        methods.grpo(clip=0.3),
        grpo.replace(masks=()),
        methods.sft() >> grpo,
    ]
    assert len({of(grpo), *map(of, changed)}) == 1 + len(changed)


def test_what_a_function_keeps_counts() -> None:
    def of(number: int) -> Any:
        return lambda step: step < number

    assert fingerprint(key, {"f": of(1)}) == fingerprint(key, {"f": of(1)})
    assert fingerprint(key, {"f": of(1)}) != fingerprint(key, {"f": of(2)})


def test_a_policy_counts_by_its_weights() -> None:
    def of(seed: int) -> str:
        return fingerprint(key, {"teacher": CausalPolicy(make_model(seed), make_tokenizer(), "tiny")})

    assert of(0) == of(0)
    assert of(0) != of(1)


def test_an_argument_without_a_lasting_description_is_refused() -> None:
    with Path(__file__).open() as file, pytest.raises(PosttrainError, match=r"arguments hold <_io.*cannot pickle"):
        fingerprint(key, {"file": [file]})


def test_a_value_that_holds_itself_is_no_endless_loop() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(key, {"loop": loop}) != fingerprint(key, {"loop": [1]})


def test_seed_and_quick_are_part_of_a_key(edited: Any) -> None:
    arm = Arm(edited().run, {})
    assert arm.identity == Arm(arm.run, {}).identity
    assert len({job_key(arm.identity, 0), job_key(arm.identity, 1), job_key(arm.identity, 0, quick=True)}) == 3
    again = Arm(arm.run, {"a": 1})
    assert job_key(arm.identity, 0) == job_key(Arm(arm.run, {}).identity, 0) != job_key(again.identity, 0)
