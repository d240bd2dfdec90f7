"""Rows to tokens: the chat template, which tokens the loss is on, and one tokenization for training and for rollouts.

The loss is on what the policy would have generated: each assistant turn from behind its role header up to and with the
special token that closes it, never the header nor the newline a template writes after the turn. Tokens are split where
the policy takes over, so that a demonstration starts with exactly the tokens a rollout of the same prompt starts with.
Special tokens are known by where the template put them, never by their id: pad may equal the end token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.data.formats import Text
from posttrain.data.rows import BadRow
from posttrain.trajectory import Message, PosttrainError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end) of a rendered text
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, system: str | None = None
) -> tuple[Tensor, Tensor]:
    """A conversation as tokens, with the mask of its assistant turns (all of them).

    The turns are found by the template's `{% generation %}` marks, else by rendering the conversation turn by turn.

    Args:
        system: a system message for conversations that do not start with one.

    Returns:
        tokens `[length]` int64 and assistant_mask `[length]` bool.

    Raises:
        BadRow: the template refuses the conversation, or rewrites earlier turns when later ones follow.
        PosttrainError: the tokenizer has no chat template.
    """
    conversation = with_system(messages, system)
    if GENERATION.search(_template(tokenizer)):
        text, spans = _marked(tokenizer, conversation)
    else:
        text = _render(tokenizer, conversation)
        spans = _assistant_spans(tokenizer, conversation, text)
    return _closed_and_encoded(tokenizer, text, spans)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, system: str | None = None, *, chat: bool = True
) -> Prompt:
    """What the policy is given: the conversation and the header of its own turn, or plain text.

    Text is a user turn where `chat` is true and the tokenizer has a chat template, plain text (with the start token,
    if the tokenizer writes one) otherwise. Messages always take the chat template.

    Raises:
        BadRow: the template refuses the conversation.
        PosttrainError: messages, but the tokenizer has no chat template; `system` with plain text.
    """
    messages = _conversation(tokenizer, prompt, system, chat)
    plain = prompt if isinstance(prompt, str) else ""
    if messages is None:
        return Prompt(_tensor(_start(tokenizer) + _encode(tokenizer, plain)), text=plain)
    rendered = _render(tokenizer, messages, add_generation_prompt=True)
    return Prompt(_tensor(_encode(tokenizer, rendered)), messages=messages, text=plain)


def render_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    system: str | None = None,
    *,
    chat: bool = True,
) -> tuple[Tensor, Tensor]:
    """A prompt and its completion, ended by the end token; the loss is on the completion (its assistant turns).

    The tokens before the first masked one are those of `render_prompt(tokenizer, prompt, system, chat=chat)`. Plain
    text is put together as it stands: white space between prompt and completion is the row's to bring.

    Returns:
        tokens `[length]` int64 and action_mask `[length]` bool.

    Raises:
        BadRow: as `render_chat`, or a text prompt that stays plain has messages for its completion.
        PosttrainError: as `render_prompt`, or a tokenizer without an end token where plain text needs one.
    """
    messages = _conversation(tokenizer, prompt, system, chat)
    if messages is None:
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise BadRow("wrong type", "completion is a list of messages, expected text as in the prompt")
        text = prompt + completion
        ids, mask = _encode_spans(tokenizer, text, [(len(prompt), len(text))], _special_tokens(tokenizer))
        start, end = _start(tokenizer), [_end(tokenizer)] if ids[-1] != _end(tokenizer) else []
        return _tensor([*start, *ids, *end]), torch.tensor([False] * len(start) + mask + [True] * len(end))
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    conversation = [*messages, *turns]
    text = _render(tokenizer, conversation)
    return _closed_and_encoded(tokenizer, text, _assistant_spans(tokenizer, conversation, text, first=len(messages)))


# Conversations to text


def _conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, system: str | None, chat: bool
) -> list[Message] | None:
    """The messages to render; None where the prompt is plain text."""
    if not isinstance(prompt, str):
        return with_system(prompt, system)
    if chat and tokenizer.chat_template:
        return with_system([{"role": "user", "content": prompt}], system)
    if system:
        raise PosttrainError("system: a system message needs chat: true and a tokenizer with a chat template")
    return None


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages with a system message in front, unless they bring one themselves or `system` is None or empty."""
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise PosttrainError(
            "the tokenizer has no chat template, and a conversation needs one; "
            "set tokenizer.chat_template or give prompts and completions as text"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise PosttrainError(f"the tokenizer's chat template cannot be chosen: {_first_line(error)}") from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    template = _template(tokenizer)
    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # the template is the user's program: whatever it raises is its error
        raise BadRow("template error", _first_line(error)) from error
    return str(text)


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The text and the characters between the template's own `{% generation %}` marks."""
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # typed as if it returned the texts alone
    try:
        texts, spans = render(
            conversations=[[dict(message) for message in messages]],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # as in _render
        raise BadRow("template error", _first_line(error)) from error
    return texts[0], [(start, end) for start, end in spans[0] if end > start]


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, first: int = 0
) -> list[Span]:
    """Where each assistant turn from `messages[first]` on stands in `text`, the rendering of all messages.

    The conversation up to a turn, with and without that turn, must be rendered to a start of `text`.
    """
    spans = []
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        start = _turn_start(tokenizer, messages, i, text)
        closed = text if i + 1 == len(messages) else _render(tokenizer, messages[: i + 1])
        if not text.startswith(closed):  # some templates write the end token only behind the last turn
            closed = closed.rstrip().removesuffix(tokenizer.eos_token or "")
        if not text.startswith(closed) or len(closed) < start:
            raise BadRow(
                "template error",
                f"the chat template renders messages[{i}] differently when later turns follow, so the turn cannot be "
                "found; mark assistant turns in the template with {% generation %}, or split the row",
            )
        spans.append((start, len(closed)))
    return spans


def _turn_start(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], i: int, text: str) -> int:
    """Where the policy takes over: behind the role header of `messages[i]`."""
    opened = _render(tokenizer, messages[:i], add_generation_prompt=True) if i else ""
    start = len(opened)
    if not text.startswith(opened):
        raise BadRow(
            "template error",
            f"the chat template does not start messages[{i}] with its generation prompt, so training and sampling "
            "would differ; mark assistant turns in the template with {% generation %}",
        )
    if i == 0 or messages[i - 1]["role"] == "assistant":  # here templates may refuse a generation prompt
        header = _header(tokenizer)
        position = text.find(header) if i == 0 else start
        if header and not opened.endswith(header) and text.startswith(header, position):
            start = position + len(header)
        elif i == 0:
            raise BadRow("template error", "messages[0] is an assistant turn without the header of generation prompts")
    return start


def _header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes in front of an assistant turn."""
    user = [{"role": "user", "content": "."}]
    return _render(tokenizer, user, add_generation_prompt=True).removeprefix(_render(tokenizer, user))


# Text to tokens


def _closed_and_encoded(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, where a turn ends with the token that closes it.

    A last turn that nothing closes is followed by the end token, which the policy could not learn otherwise.
    """
    special = _special_tokens(tokenizer)
    closing = tuple(special.values())
    turns = [_closed(text, span, closing, tokenizer.eos_token) for span in spans]
    ids, mask = _encode_spans(tokenizer, text, turns, special)
    if turns and not text[turns[-1][1] :].strip() and not text[: turns[-1][1]].endswith(closing):
        ids, mask = [*ids, _end(tokenizer)], [*mask, True]
    return _tensor(ids), torch.tensor(mask, dtype=torch.bool)


def _closed(text: str, span: Span, closing: tuple[str, ...], eos: str | None) -> Span:
    """The span without the white space a template writes behind the closing token, and with that token."""
    start, end = span
    content = text[start:end].rstrip()
    if content.endswith(closing):
        return start, start + len(content)
    if eos and text.startswith(eos, end):  # marks around the content alone
        return start, end + len(eos)
    return span


def _encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], special: Mapping[int, str]
) -> tuple[list[int], list[bool]]:
    """Tokens of `text`, split at the ends of the spans, with the mask of the tokens inside.

    The text up to each boundary is tokenized as a whole, as a rollout would see it, and the piece behind it takes the
    tokens by which the longer text continues the shorter. Where a token would reach over the boundary, the piece is
    tokenized by itself. A token of `special` is a clean cut: from there on only the rest is looked at.
    """
    boundaries = [(end, inside) for span in spans for end, inside in ((span[0], False), (span[1], True))]
    ids: list[int] = []
    mask: list[bool] = []
    before: list[int] = []  # the tokens of text[anchor:position]
    anchor = position = 0
    for end, inside in [*boundaries, (len(text), False)]:
        if end == position:
            continue
        through = _encode(tokenizer, text[anchor:end])
        continues = through[: len(before)] == before
        piece = through[len(before) :] if continues else _encode(tokenizer, text[position:end])
        ids += piece
        mask += [inside] * len(piece)
        position, before = end, through
        token = special.get(piece[-1]) if piece else None
        if token and text.endswith(token, 0, end):
            anchor, before = end - len(token), _encode(tokenizer, token)
    return ids, mask


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8", "the text holds half of a surrogate pair") from error
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer writes in front of plain text (often one start token, or none)."""
    with_special, without = tokenizer.encode("a"), _encode(tokenizer, "a")
    cuts = range(len(with_special) - len(without) + 1)
    return next((with_special[:k] for k in cuts if with_special[k : k + len(without)] == without), [])


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise PosttrainError("the tokenizer has no end token, so completions would never end; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _tensor(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
