"""The registry of verifiers: the names by which recipes and `reward_from` know them."""

from __future__ import annotations

from posttrain.reward.answer_formats import BoxMatch, InFormat, LabelOverlap, OpenAnswer, OptionLetters, YesNo
from posttrain.reward.reasoning_pattern import ReasoningPattern
from posttrain.reward.verifiers import (
    Contains,
    ExactMatch,
    Format,
    LastNumber,
    Length,
    MathVerify,
    OverlongPenalty,
    ReasoningGym,
    Regex,
)

VERIFIERS: dict[str, type] = {
    "box_match": BoxMatch,
    "contains": Contains,
    "exact_match": ExactMatch,
    "format": Format,
    "in_format": InFormat,
    "label_overlap": LabelOverlap,
    "last_number": LastNumber,
    "length": Length,
    "math_verify": MathVerify,
    "open_answer": OpenAnswer,
    "option_letters": OptionLetters,
    "overlong": OverlongPenalty,
    "reasoning_gym": ReasoningGym,
    "reasoning_pattern": ReasoningPattern,
    "regex": Regex,
    "yes_no": YesNo,
}
