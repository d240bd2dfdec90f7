"""Rows of text from files, the hub or memory to token sequences with a loss mask; every unusable row is named."""

from posttrain.data.dataset import Dataset, load_dataset
from posttrain.data.decontaminate import Overlap, overlap
from posttrain.data.formats import Chat, Feedback, Preference, PromptAnswer, PromptCompletion, Row, kind_of, parse
from posttrain.data.rows import BadRow, Origin, RawRow
from posttrain.data.sources import Source, read_rows
from posttrain.data.templates import render_chat, render_completion, render_prompt

__all__ = [
    "BadRow",
    "Chat",
    "Dataset",
    "Feedback",
    "Origin",
    "Overlap",
    "Preference",
    "PromptAnswer",
    "PromptCompletion",
    "RawRow",
    "Row",
    "Source",
    "kind_of",
    "load_dataset",
    "overlap",
    "parse",
    "read_rows",
    "render_chat",
    "render_completion",
    "render_prompt",
]
