"""`posttrain chat`: talk to a model on the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from posttrain.models.causal import CausalPolicy
    from posttrain.trajectory import Message, Sampling

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit (or Ctrl-D) ends"


def chat(
    model: Annotated[str, typer.Argument(help="A bundled name, folder, GGUF file or hub id.", show_default=False)],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Of a reply.")] = 512,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Talk to a model.

    In the conversation /reset forgets it, /system TEXT sets the system message, /quit ends. Input that is no terminal
    is answered line by line, as one conversation.
    """
    import torch

    from posttrain.models.load import load
    from posttrain.training.values import checked_seed
    from posttrain.trajectory import PosttrainError, Sampling

    checked_seed(seed, "--seed")
    sampling = Sampling(max_tokens, temperature, top_p=top_p)
    talk = _Talk(load(model), sampling, system)
    if system and not talk.chats:
        raise PosttrainError(f"{model} has no chat template and takes no system message; leave out --system")
    torch.manual_seed(seed)
    terminal = sys.stdin.isatty()
    if terminal:
        _say(HELP if talk.chats else f"no chat template: each line is continued as plain text; {HELP}")
    for line in _lines(terminal):
        if not line.strip():
            continue
        try:
            if not talk.hear(line):
                break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # the reply is cut short and forgotten; the conversation goes on
        except PosttrainError as error:
            if not terminal:
                raise
            _say(str(error))


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed or piped in, until it ends."""
    if not terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - input() then edits lines and remembers them

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    from posttrain.terminal import printable

    print(printable(text), file=sys.stderr, flush=True)


@dataclass
class _Talk:
    """A conversation with a model."""

    policy: CausalPolicy
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @property
    def chats(self) -> bool:
        """Whether the model knows turns; without a chat template every line stands for itself."""
        return bool(self.policy.tokenizer.chat_template)

    def hear(self, line: str) -> bool:
        """Answer a line, or do what it commands; False to end."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages = []
        elif word == "/system":
            from posttrain.trajectory import PosttrainError

            if not self.chats:
                raise PosttrainError("the model has no chat template and takes no system message")
            self.system = rest.strip() or None
        else:
            asked = [*self.messages, {"role": "user", "content": line}]
            reply = self._answer(asked if self.chats else line)
            self.messages = [*asked, {"role": "assistant", "content": reply}]
        return True

    def _answer(self, asked: list[Message] | str) -> str:
        """Print the reply as it comes, and return it."""
        import torch

        from posttrain.data.templates import render_prompt
        from posttrain.trajectory import PosttrainError

        tokens = render_prompt(self.policy.tokenizer, asked, self.system).tokens.to(self.policy.device)
        room = self.policy.max_length - len(tokens)
        if room < 1:
            raise PosttrainError(
                f"the conversation has {len(tokens)} tokens and the model's context is {self.policy.max_length}: "
                f"/reset it, or write less"
            )
        # in place of the model's own configuration, which would add its preferences (penalties, truncation) to what is
        # set here: chat shows the distribution that was trained
        self.policy.model.generation_config = self._config(min(room, self.sampling.max_tokens))
        with torch.inference_mode():
            found = self.policy.model.generate(
                tokens[None],
                attention_mask=torch.ones_like(tokens)[None],
                streamer=_printer(self.policy.tokenizer),
            )
        print(flush=True)
        reply = str(self.policy.tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True))
        if not reply.strip():
            _say("(an empty reply: the model ended it at once)")
        return reply

    def _config(self, max_tokens: int) -> Any:
        from transformers import GenerationConfig

        ends = sorted(self.policy.end_tokens)
        drawn = self.sampling.temperature > 0
        options = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0} if drawn else {}
        return GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=drawn,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            **options,
        )


def _printer(tokenizer: Any) -> Any:
    """Prints a reply while it is generated, its control characters made visible."""
    from transformers import TextStreamer

    from posttrain.terminal import printable

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="", flush=True)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
