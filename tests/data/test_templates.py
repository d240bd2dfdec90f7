"""Tokens and loss masks of rendered rows, token by token, for the shapes of chat template that are in use."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import BadRow, render_chat, render_completion, render_prompt
from posttrain.trajectory import PosttrainError

USER = {"role": "user", "content": "hi"}
FIRST = {"role": "assistant", "content": "yo"}
MORE = {"role": "user", "content": "more"}
LAST = {"role": "assistant", "content": "ok"}
TALK = [USER, FIRST, MORE, LAST]

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nhelp<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
END_AT_THE_END = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<|im_start|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% else %}{{ eos_token }}{% endif %}"
)
NOTHING_CLOSES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DROPS_EARLIER_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CONTENT = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
MARKED_AND_DROPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}...<|im_end|>{% endif %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def shown(tokenizer, tokens, mask):
    """The decoded sequence with the masked tokens in braces."""
    text, open_ = "", False
    for token, inside in zip(tokens.tolist(), mask.tolist(), strict=True):
        text += ("{" if inside and not open_ else "}" if open_ and not inside else "") + tokenizer.decode([token])
        open_ = inside
    return text + ("}" if open_ else "")


def chat(tokenizer, messages, **options):
    tokens, mask = render_chat(tokenizer, messages, **options)
    assert tokens.dtype == torch.long
    assert mask.dtype == torch.bool
    assert tokens.shape == mask.shape
    return shown(tokenizer, tokens, mask)


def test_several_turns_token_by_token(tiny_tokenizer):
    tokens, mask = render_chat(tiny_tokenizer, TALK)
    start, end, newline = 1, 2, tiny_tokenizer.encode("\n")[0]

    def letters(text):
        return tiny_tokenizer.encode(text, add_special_tokens=False)

    expected = [
        ([start, *letters("user"), newline, *letters("hi"), end, newline], False),
        ([start, *letters("assistant"), newline], False),
        ([*letters("yo"), end], True),
        ([newline, start, *letters("user"), newline, *letters("more"), end, newline], False),
        ([start, *letters("assistant"), newline], False),
        ([*letters("ok"), end], True),
        ([newline], False),
    ]
    assert tokens.tolist() == [token for piece, _ in expected for token in piece]
    assert mask.tolist() == [inside for piece, inside in expected for _ in piece]


def test_the_end_token_stays_in_the_loss_although_pad_equals_it(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    tokens, mask = render_chat(tiny_tokenizer, TALK)
    assert (tokens[mask] == tiny_tokenizer.eos_token_id).sum() == 2
    tokens, mask = render_completion(tiny_tokenizer, "q", "a", chat=False)
    assert tokens[mask].tolist()[-1] == tiny_tokenizer.eos_token_id


CASES = {
    "chatml": (None, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{yo<|im_end|>}\n"
               "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n{ok<|im_end|>}\n"),
    "default system": (DEFAULT_SYSTEM, "<|im_start|>system\nhelp<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                       "<|im_start|>assistant\n{yo<|im_end|>}\n<|im_start|>user\nmore<|im_end|>\n"
                       "<|im_start|>assistant\n{ok<|im_end|>}\n"),
    "no header": (NO_HEADER, "[hi]{ yo<|im_end|>}[more]{ ok<|im_end|>}"),
    "end token at the end": (END_AT_THE_END, "<user>\nhi<|im_start|>\n<assistant>\n{yo<|im_start|>}\n"
                             "<user>\nmore<|im_start|>\n<assistant>\n{ok<|im_start|>\n<|im_end|>}"),
    "nothing closes": (NOTHING_CLOSES, "user: hi\nassistant: {yo\n}user: more\nassistant: {ok\n<|im_end|>}"),
    "marked": (MARKED, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{yo<|im_end|>}\n"
               "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n{ok<|im_end|>}\n"),
    "marked content": (MARKED_CONTENT, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{yo<|im_end|>}\n"
                       "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n{ok<|im_end|>}\n"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "expected"), CASES.values(), ids=CASES.keys())
def test_the_mask_under_every_shape_of_template(tiny_tokenizer, template, expected):
    tokenizer = with_template(tiny_tokenizer, template or tiny_tokenizer.chat_template)
    assert chat(tokenizer, TALK) == expected


def test_marks_find_turns_in_a_template_that_rewrites_earlier_ones(tiny_tokenizer):
    with pytest.raises(
        BadRow, match=r"^template error: the chat template renders messages\[1\] differently when later"
    ):
        render_chat(with_template(tiny_tokenizer, DROPS_EARLIER_TURNS), TALK)
    text = chat(with_template(tiny_tokenizer, MARKED_AND_DROPPED), TALK)
    assert text == CASES["chatml"][1].replace("{yo<|im_end|>}", "...<|im_end|>")


def test_a_template_that_leaves_the_last_turn_out_is_a_template_error(tiny_tokenizer):
    template = tiny_tokenizer.chat_template.replace(
        "{% for message in messages %}",
        "{% for message in (messages[:-1] if messages[-1].role != 'user' else messages) %}",
    )
    with pytest.raises(BadRow, match=r"^template error: the chat template renders messages\[1\] differently"):
        render_chat(with_template(tiny_tokenizer, template), TALK)


def test_a_generation_prompt_that_training_would_not_see_is_a_template_error(tiny_tokenizer):
    message = r"^template error: the chat template does not start messages\[1\] with its generation prompt"
    with pytest.raises(BadRow, match=message):
        render_chat(with_template(tiny_tokenizer, THINKS), TALK)


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM, REFUSES], ids=["chatml", "default system", "refuses"])
def test_roles_need_not_alternate(tiny_tokenizer, template):
    tokenizer = with_template(tiny_tokenizer, template or tiny_tokenizer.chat_template)
    text = chat(tokenizer, [FIRST, LAST, USER, USER, LAST, MORE])
    turn = "<|im_start|>assistant\n{%s<|im_end|>}\n"
    user = "<|im_start|>user\n%s<|im_end|>\n"
    expected = turn % "yo" + turn % "ok" + user % "hi" + user % "hi" + turn % "ok" + user % "more"
    assert text.removeprefix("<|im_start|>system\nhelp<|im_end|>\n") == expected


def test_a_system_message_is_put_in_front_where_there_is_none(tiny_tokenizer):
    own = {"role": "system", "content": "own"}
    assert chat(tiny_tokenizer, [USER, FIRST], system="be").startswith(
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user"
    )
    assert chat(tiny_tokenizer, [own, USER, FIRST], system="be").startswith("<|im_start|>system\nown<|im_end|>\n<|im_s")
    assert "be" in tiny_tokenizer.decode(render_prompt(tiny_tokenizer, "hi", "be").tokens)
    assert render_prompt(tiny_tokenizer, "hi", "be").messages[0] == {"role": "system", "content": "be"}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (REFUSES, "template error: System role not supported"),
        (
            "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
            'template error: can only concatenate str (not "int")',
        ),
        ("{% for m in messages %}", "template error: Unexpected end of template"),
    ],
)
def test_what_a_template_raises_is_a_template_error(tiny_tokenizer, template, reason):
    tokenizer = with_template(tiny_tokenizer, template)
    messages = [{"role": "system", "content": "be"}, USER, FIRST]
    for render in (
        lambda: render_chat(tokenizer, messages),
        lambda: render_prompt(tokenizer, messages),
        lambda: render_completion(tokenizer, messages, "x"),
    ):
        with pytest.raises(BadRow) as caught:
            render()
        assert caught.value.reason.startswith(reason)
        assert "\n" not in caught.value.reason


def test_what_a_marked_template_raises_is_a_template_error(tiny_tokenizer):
    with pytest.raises(BadRow, match=r"^template error: no"):
        render_chat(with_template(tiny_tokenizer, MARKED + "{{ raise_exception('no') }}"), TALK)


def test_half_a_surrogate_pair_is_a_bad_row(tiny_tokenizer):
    with pytest.raises(BadRow, match=r"^not UTF-8: the text holds half of a surrogate pair"):
        render_prompt(tiny_tokenizer, "a\ud83d")


def test_a_conversation_needs_a_chat_template(tiny_tokenizer):
    plain = with_template(tiny_tokenizer, None)
    for render in (lambda: render_chat(plain, TALK), lambda: render_prompt(plain, [USER])):
        with pytest.raises(
            PosttrainError, match=r"no chat template, and a conversation needs one; set tokenizer\.chat_"
        ):
            render()
    with pytest.raises(PosttrainError, match=r"^system: a system message needs chat: true and a tokenizer with a chat"):
        render_prompt(plain, "hi", "be brief")
    several = with_template(tiny_tokenizer, {"tool_use": "x", "rag": "y"})
    with pytest.raises(PosttrainError, match="chat template cannot be chosen"):
        render_chat(several, TALK)


def test_plain_text_is_prompt_completion_and_end_token(tiny_tokenizer):
    expected = "1+1={ 2<|im_end|>}"
    assert shown(tiny_tokenizer, *render_completion(tiny_tokenizer, "1+1=", " 2", chat=False)) == expected
    assert shown(tiny_tokenizer, *render_completion(with_template(tiny_tokenizer, None), "1+1=", " 2")) == expected
    ended = render_completion(tiny_tokenizer, "1+1=", " 2<|im_end|>", chat=False)
    assert shown(tiny_tokenizer, *ended) == expected
    prompt = render_prompt(tiny_tokenizer, "1+1=", chat=False)
    assert (prompt.text, prompt.messages, prompt.question) == ("1+1=", [], "1+1=")


def test_plain_text_needs_an_end_token_and_a_text_completion(tiny_tokenizer):
    with pytest.raises(BadRow, match=r"^wrong type: completion is a list of messages, expected text as in the prompt"):
        render_completion(tiny_tokenizer, "q", [LAST], chat=False)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(PosttrainError, match=r"no end token, so completions would never end; set tokenizer\.eos_token"):
        render_completion(endless, "q", "a", chat=False)


def test_plain_text_starts_with_the_start_token_of_the_tokenizer(tiny_tokenizer):
    from tokenizers import processors

    starting = copy.deepcopy(tiny_tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert starting.decode(starting.encode("q")) == "<|im_start|>q<|im_end|>"
    assert shown(starting, *render_completion(starting, "q", "a", chat=False)) == "<|im_start|>q{a<|im_end|>}"
    assert starting.decode(render_prompt(starting, "q", chat=False).tokens) == "<|im_start|>q"
    assert chat(starting, TALK) == CASES["chatml"][1]  # the template writes its own


def test_a_completion_of_several_turns(tiny_tokenizer):
    text = shown(tiny_tokenizer, *render_completion(tiny_tokenizer, TALK[:2], [MORE, LAST]))
    assert text.count("{") == 1  # the prompt's own assistant turn is not imitated
    assert text.endswith("<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n{ok<|im_end|>}\n")
    both = shown(tiny_tokenizer, *render_completion(tiny_tokenizer, "hi", TALK[1:]))
    assert both == CASES["chatml"][1]


def test_a_tokenizer_in_python():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert not tokenizer.is_fast
    assert chat(tokenizer, TALK) == "user:hi</s>assistant:{yo</s>}user:more</s>assistant:{ok</s>}"
    assert shown(tokenizer, *render_completion(tokenizer, "q", "a", chat=False)) == "q{a</s>}"


@pytest.fixture(scope="module")
def merging():
    """Tokenizers whose merges reach over the boundary between prompt and completion, with the boundary of each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, newline = "Ġ", "Ċ"
    merges = [(newline, newline), ("a", "b"), (space, "a"), ("t", newline), (":", "a")]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")

    pieces = ["▁", "▁▁", "a", "▁a", "▁▁a", "b", "[", "]", "<s>", "</s>", "<unk>"]
    merges = [("▁", "▁"), ("▁", "a"), ("▁▁", "a")]
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    first = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return whole, first


def test_a_token_that_reaches_over_the_boundary_is_split_there(tiny_tokenizer, merging):
    tokenizer = with_template(merging[0], tiny_tokenizer.chat_template)
    joined = tokenizer.encode("t\n\n", add_special_tokens=False)
    tokens, mask = render_completion(tokenizer, "x", "\nab")
    prompt = render_prompt(tokenizer, "x").tokens
    assert len(joined) == 2  # "t" would not have stood alone
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert not mask[: len(prompt)].any()
    assert tokenizer.decode(tokens[mask]) == "\nab<|im_end|>"
    tokens, mask = render_completion(tokenizer, "x:", "ab", chat=False)
    assert [tokenizer.decode([t]) for t in tokens.tolist()] == ["x", ":", "ab", "<|im_end|>"]


def test_pieces_continue_the_text_and_do_not_start_a_new_one(merging):
    tokenizer = with_template(
        merging[1],
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}",
    )
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}] * 2
    tokens, mask = render_chat(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(tokens[mask].tolist()) == ["a", "</s>", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)) == ["▁a"]


content = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(list(" \n\t<|>")), min_size=1, max_size=12
).filter(str.strip)
special = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "a<|im_end|>\n"])
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": content | special})


@settings(deadline=None, max_examples=60)
@given(messages=st.lists(message, min_size=1, max_size=6), system=st.none() | content, marked=st.booleans())
def test_masked_tokens_are_the_assistants_words_and_end_tokens(tiny_tokenizer, messages, system, marked):
    tokenizer = with_template(tiny_tokenizer, MARKED) if marked else tiny_tokenizer
    tokens, mask = render_chat(tokenizer, messages, system=system)
    said = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(tokens[mask]) == "".join(said)
    everything = [{"role": "system", "content": system}] * bool(system) + messages
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(everything, tokenize=False)


@settings(deadline=None, max_examples=60)
@given(
    prompt=content | st.lists(message, min_size=1, max_size=4),
    completion=content,
    as_message=st.booleans(),
    system=st.none() | content,
    kind=st.sampled_from(["chatml", "default system", "no header", "nothing closes", "marked", "merging", "plain"]),
)
def test_training_and_sampling_see_the_same_prompt(
    tiny_tokenizer, merging, prompt, completion, as_message, system, kind
):
    plain = kind == "plain" and isinstance(prompt, str)
    template = CASES.get(kind, (None,))[0] or tiny_tokenizer.chat_template
    tokenizer = with_template(merging[0] if kind in ("merging", "plain") else tiny_tokenizer, template)
    system = None if plain else system
    said = [{"role": "assistant", "content": completion}] if as_message and not plain else completion
    tokens, mask = render_completion(tokenizer, prompt, said, system, chat=not plain)
    start = int(mask.nonzero()[0])
    rendered = render_prompt(tokenizer, prompt, system, chat=not plain)
    assert tokens[:start].tolist() == rendered.tokens.tolist()
    assert tokenizer.decode(tokens[mask]).strip().startswith(completion.strip())
    assert int(tokens[mask][-1]) == tokenizer.eos_token_id
    assert mask[start : start + int(mask.sum())].all()


def test_chat_and_completion_rows_become_the_same_tokens(tiny_tokenizer):
    for template in (tiny_tokenizer.chat_template, DEFAULT_SYSTEM, NO_HEADER, MARKED):
        tokenizer = with_template(tiny_tokenizer, template)
        one, two = render_chat(tokenizer, TALK), render_completion(tokenizer, TALK[:3], "ok")
        assert torch.equal(one[0], two[0])
        assert two[1].sum() == len("ok") + 1 + (template == NO_HEADER)
        assert not (two[1] & ~one[1]).any()
