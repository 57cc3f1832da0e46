"""Examples as tokens: the chat template, and which tokens are learnt."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CommandError
from .texts import Example, Message

IGNORED = -100  # the label of a token that is not learnt


@dataclass
class Encoder:
    """Turns examples into tokens and labels.

    A prompt's tokens are the same here and in :meth:`prompt`, so the model generates from what it was trained on: prompt and
    completion are tokenised apart.

    Attributes:
        chat: whether prompts and completions that are plain text become messages of a chat.
        loss: what is learnt: "completions" (all that the assistant says), "last" (only its last message), or "all".
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    loss: str = "completions"

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Tokens and labels of the whole example.

        Raises:
            CommandError: the chat template fails, or renders a conversation so that its parts cannot be told apart.
        """
        tokens: list[int] = []
        labels: list[int] = []
        for text, learnt in self._pieces(example):
            ids = self._ids(text)
            tokens += ids
            labels += ids if learnt or self.loss == "all" else [IGNORED] * len(ids)
        if isinstance(self._in_chat(example).completion, str):
            start = self._start()
            tokens = start + tokens + [self.tokenizer.eos_token_id]
            labels = [IGNORED] * len(start) + labels + [self.tokenizer.eos_token_id]
        return tokens, labels

    def prompt(self, prompt: str | list[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens after which a completion is generated."""
        asked = self._in_chat(Example(prompt, "", tools)).prompt
        if isinstance(asked, str):
            return self._start() + self._ids(asked)
        assert asked is not None
        text = self._render(asked, tools, ask=True)
        self._check_tools(asked, tools, text)
        return self._ids(text)

    def ends(self) -> list[int]:
        """The token with which the chat template ends what the assistant says, if it has one.

        In many base models that have a chat template, it is not the token that ends a text.
        """
        if self.tokenizer.chat_template is None:
            return []
        said = "Hello"
        try:
            text = self._render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}], None)
        except CommandError:  # a template for other chats
            return []
        after = self._ids(text[text.rfind(said) + len(said) :]) if said in text else []
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.add(self.tokenizer.eos_token_id)
        return [token for token in after if token in special][:1]

    def _in_chat(self, example: Example) -> Example:
        if not self.chat or not isinstance(example.prompt, str) or not isinstance(example.completion, str):
            return example
        return Example(
            [{"role": "user", "content": example.prompt}],
            [{"role": "assistant", "content": example.completion}],
            example.tools,
        )

    def _pieces(self, example: Example) -> Iterator[tuple[str, bool]]:
        """The example's text in pieces, and whether each is learnt."""
        example = self._in_chat(example)
        if isinstance(example.completion, str):
            if isinstance(example.prompt, str):
                yield example.prompt, False
            yield example.completion, True
            return
        assert isinstance(example.prompt, list)
        messages = example.prompt + example.completion
        whole = self._render(messages, example.tools)
        self._check_tools(messages, example.tools, whole)
        spoken = [i for i in range(len(example.prompt), len(messages)) if messages[i]["role"] == "assistant"]
        end = 0
        for index in spoken[-1:] if self.loss == "last" else [] if self.loss == "all" else spoken:
            before = (
                self._render(messages[:index], example.tools, ask=True)
                if index
                else self._header(messages[0], example.tools)
            )
            after = self._render(messages[: index + 1], example.tools)
            if not (whole.startswith(before) and whole.startswith(after) and end <= len(before) < len(after)):
                raise CommandError(
                    "--loss: the chat template renders earlier messages of a chat in another way than its last message, so "
                    "vblora cannot tell which tokens are the assistant's. Give --loss last, --loss all, or another "
                    "--chat-template."
                )
            yield whole[end : len(before)], False
            yield whole[len(before) : len(after)], True
            end = len(after)
        yield whole[end:], False

    def _header(self, first: Message, tools: list[Any] | None) -> str:
        """What the template puts before a chat's first message if the assistant says it, such as a default system message."""
        text = self._render([first], tools)
        content = str(first.get("content") or "").strip()
        return text[: text.rfind(content)] if content and content in text else ""

    def _render(self, messages: list[Message], tools: list[Any] | None, ask: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # Jinja's own errors, and whatever a template raises
            raise CommandError(f"the chat template fails on {messages!s:.100}: {error}") from None
        return text

    def _check_tools(self, messages: list[Message], tools: list[Any] | None, text: str) -> None:
        """Refuses a template that leaves out tools or calls of them, or encodes arguments twice: many do so without a word."""
        lacking = None
        if tools and self._render(messages, None) == self._render(messages, tools):
            lacking = "the column `tools`"
        for call in (call for message in messages for call in message.get("tool_calls") or []):
            about = call.get("function", call) if isinstance(call, dict) else call
            name = about.get("name") if isinstance(about, dict) else None
            if not isinstance(name, str) or name not in text:
                lacking = f"the tool call {json.dumps(call):.60}"
            arguments = about.get("arguments") if isinstance(about, dict) else None
            if isinstance(arguments, str) and '"' in arguments and json.dumps(arguments, ensure_ascii=False) in text:
                raise CommandError(
                    f"the chat template writes the arguments of the tool call {json.dumps(call):.60} as a string in JSON, "
                    "because the row has a string. Give an object, as the template expects."
                )
        if lacking:
            raise CommandError(
                f"--chat-template: the tokenizer's chat template leaves out {lacking}. Give a template that has it, or remove it "
                "from the rows."
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _start(self) -> list[int]:
        """The token that this tokenizer begins each text with, if it does."""
        first: list[int] = self.tokenizer("a").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []
