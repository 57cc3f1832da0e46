"""Texts for language models: reading, splitting, and what of them is learnt."""

import json
import re
from argparse import Namespace

import pytest

from tests.finetune.chats import make_chats, make_pairs, make_tokenizer, write_jsonl
from tests.tables import write_csv
from vblora.errors import CommandError
from vblora.finetune import texts
from vblora.finetune.task import split_texts
from vblora.finetune.tokens import IGNORED, Encoder

NONE = {"text": None, "prompt": None, "completion": None, "messages": None}


def read(path, **given):
    columns = texts.find_columns(path, "--data", NONE | given)
    return columns.kind, list(texts.read_examples(path, columns, "--data"))


def test_the_columns_tell_what_rows_are(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"text": " a\n"}])) == ("text", [texts.Example(None, " a\n")])
    pairs = [{"prompt": "a ", "completion": " b", "text": "c"}]
    assert read(write_csv(tmp_path / "b.csv", pairs)) == ("prompt", [texts.Example("a ", " b")])
    assert read(tmp_path / "b.csv", text="text") == ("text", [texts.Example(None, "c")])
    (tmp_path / "c.tsv").write_text("mr\tref\na\tb\n")
    assert read(tmp_path / "c.tsv", prompt="mr", completion="ref") == ("prompt", [texts.Example("a", "b")])
    assert read(write_jsonl(tmp_path / "g.jsonl", [{"PROMPT": "a", "Completion ": "b"}])) == (
        "prompt",
        [texts.Example("a", "b")],
    )
    chat = make_chats(1)[0]["messages"]
    kind, [example] = read(write_jsonl(tmp_path / "d.jsonl", [{"messages": chat, "tools": [{"name": "x"}]}]))
    assert (kind, example) == ("messages", texts.Example(chat[:1], chat[1:], [{"name": "x"}]))
    assert read(write_csv(tmp_path / "e.csv", [{"messages": json.dumps(chat)}]))[1] == [
        texts.Example(chat[:1], chat[1:])
    ]
    _, [example] = read(write_jsonl(tmp_path / "f.jsonl", [{"prompt": chat[:3], "completion": chat[3:]}]))
    assert example == texts.Example(chat[:3], chat[3:])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"question": "a"}], r"has the columns 'question'. A language model trains on `text`, on"),
        ([{"messages": "[1"}], "line 1: column 'messages' is not valid JSON"),
        ([{"messages": []}], r"line 1: column 'messages' is \[\]; it must be a list of messages"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "whose roles are system, developer, user, assistant, tool"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "has no message of the assistant"),
        ([{"messages": [{"role": "user", "content": 3}]}], "content of a message is 3; it must be text"),
        ([{"messages": [{"role": "assistant", "content": " "}]}], "line 1: a message of the assistant is empty"),
        ([{"text": "a"}, {"text": " "}], "line 2: column 'text' is empty"),
        ([{"text": float("nan")}], "line 1: column 'text' is NaN, which stands for a missing value"),
        (
            [{"prompt": '[{"role": "user", "content": "a"}]', "completion": "b"}],
            "line 1: column 'prompt' is a list of messages that was written as text",
        ),
        ([{"text": "a"}, {"txt": "b"}], "--text-column: .*line 2, has no column 'text'"),
        ([{"text": "\ud800"}], "half of a surrogate pair"),
        ([{"text": "a\0b"}], "contains a NUL character"),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}],
            "line 1: column 'completion' is a text, but column 'prompt' is a list of messages. Both must be",
        ),
    ],
)
def test_bad_rows_are_refused(tmp_path, rows, expected):
    with pytest.raises(CommandError, match=expected):
        read(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_columns_that_do_not_go_together(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", make_pairs(1))
    with pytest.raises(CommandError, match="--prompt-column and --text-column do not go together"):
        read(path, text="a", prompt="b")
    with pytest.raises(CommandError, match="--completion-column: is 'prompt', as is --prompt-column"):
        read(path, prompt="prompt", completion="prompt")


def test_the_share_to_evaluate_on_has_no_other_limit_than_what_is_given(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(1200)])
    columns = texts.find_columns(path, "--data", NONE)
    for max_eval, count in ((None, 600), (20, 20)):
        arguments = Namespace(eval_fraction=0.5, max_train=None, max_eval=max_eval, seed=0)
        train, held_out = split_texts(arguments, path, columns)
        assert (len(train), len(held_out)) == (600, count)


def test_rows_with_one_prompt_are_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"completion": str(i)} for i, row in enumerate(make_pairs(200))])
    columns = texts.find_columns(path, "--data", NONE)

    def split(**options):
        options = {"fraction": 0.3, "max_train": None, "max_eval": None, "seed": 0} | options
        return [list(side) for side in texts.split(path, columns, **options)]

    train, held_out = split()
    assert len(train) + len(held_out) == 200 and len({row.completion for row in train + held_out}) == 200
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert 60 <= len(held_out) < 100
    assert split() == [train, held_out]
    whole = texts.whole(path, columns, "--eval-data", 50, 0)
    assert texts.count_common(texts.whole(path, columns, "--data", None, 0), whole) == 50
    assert texts.count_common(*texts.split(path, columns, fraction=0.3, max_train=None, max_eval=None, seed=0)) == 0
    assert split(seed=1) != [train, held_out]
    some, few = split(max_train=30, max_eval=20)
    assert len(some) == 30 and len(few) == 20
    assert {row.completion for row in some} <= {row.completion for row in train}
    path = write_jsonl(tmp_path / "one.jsonl", make_pairs(1) * 4)
    with pytest.raises(CommandError, match=r"--eval-fraction: 0.3 of 4 rows with 1 different prompts"):
        texts.split(path, columns, fraction=0.3, max_train=None, max_eval=None, seed=0)


def encode(example, **options):
    """The example's text, and the words of it that are learnt."""
    tokenizer = make_tokenizer()
    tokens, labels = Encoder(tokenizer, **{"chat": True} | options).encode(example)
    assert len(tokens) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(tokens, labels, strict=True))
    return tokenizer.decode(tokens), tokenizer.decode([label for label in labels if label != IGNORED])


PAIR = texts.Example("what is good ?", "the cat .")
CHAT = texts.Example(
    [{"role": "user", "content": "what ?"}],
    [
        {"role": "assistant", "content": "the cat ."},
        {"role": "user", "content": "who ?"},
        {"role": "assistant", "content": "the dog ."},
    ],
)


def test_what_is_learnt():
    assert encode(PAIR, chat=False) == ("what is good ? the cat . <|im_end|>", "the cat . <|im_end|>")
    asked = "<|im_start|> user what is good ? <|im_end|> <|im_start|> assistant"
    assert encode(PAIR) == (f"{asked} the cat . <|im_end|>", "the cat . <|im_end|>")
    assert encode(PAIR, loss="all")[1] == f"{asked} the cat . <|im_end|>"
    assert encode(texts.Example(None, "the cat"))[1] == "the cat <|im_end|>"
    assert encode(CHAT)[1] == "the cat . <|im_end|> the dog . <|im_end|>"
    assert encode(CHAT, loss="last")[1] == "the dog . <|im_end|>"
    assert encode(CHAT)[0] == encode(CHAT, loss="all")[0] == encode(CHAT, loss="all")[1]


def test_a_completion_is_generated_from_the_tokens_that_were_trained_on():
    for chat in (True, False):
        encoder = Encoder(make_tokenizer(), chat)
        tokens, labels = encoder.encode(PAIR)
        prompt = encoder.prompt(PAIR.prompt)
        assert tokens[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert labels[len(prompt)] != IGNORED


def test_a_default_system_message_before_the_assistant_is_not_learnt():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|im_start|> system hello <|im_end|> " + tokenizer.chat_template
    tokens, labels = Encoder(tokenizer, chat=True).encode(texts.Example([], CHAT.completion[:2]))
    assert tokenizer.decode(tokens).startswith("<|im_start|> system hello <|im_end|> <|im_start|> assistant the cat")
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "the cat . <|im_end|>"


def test_the_token_that_ends_a_message_need_not_end_a_text():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "</s>"
    encoder = Encoder(tokenizer, chat=True)
    assert tokenizer.convert_ids_to_tokens(encoder.ends()) == ["<|im_end|>"]
    tokenizer.chat_template = "{% for m in messages %}{{m.content}} . {% endfor %}"
    assert encoder.ends() == []
    tokenizer.chat_template = None
    assert encoder.ends() == []


def test_a_template_that_leaves_out_tools_is_refused():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "cat"}}}
    spoken = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    encoder = Encoder(make_tokenizer(), chat=True)
    for example, left_out in (
        (CHAT._replace(tools=[call]), "the column `tools`"),
        (CHAT._replace(completion=spoken), 'the tool call {"type": "function", "function": {"name": "look_up"'),
    ):
        with pytest.raises(CommandError, match=f"chat template leaves out {re.escape(left_out)}"):
            encoder.encode(example)
    with pytest.raises(CommandError, match="leaves out the column `tools`"):
        encoder.prompt(CHAT.prompt, [call])
    encoder.tokenizer.chat_template += (
        "{% for t in tools or [] %}{{t.function.name}}{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{c.function.name}}{% endfor %}{% endfor %}"
    )
    assert encoder.prompt(CHAT.prompt, [call])
    encoder.tokenizer.chat_template = encoder.tokenizer.chat_template.replace(
        "{{c.function.name}}", "{{c.function|tojson}}"
    )
    assert encoder.encode(CHAT._replace(completion=spoken))
    call["function"]["arguments"] = '{"word": "cat"}'
    with pytest.raises(CommandError, match="as a string in JSON, because the row has a string"):
        encoder.encode(CHAT._replace(completion=spoken))


def test_a_template_that_changes_earlier_messages_is_refused():
    encoder = Encoder(make_tokenizer(), chat=True)
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{{m.role}} {% if loop.last %}says {% endif %}{{m.content}} {% endfor %}"
    )
    with pytest.raises(CommandError, match="Give --loss last, --loss all, or"):
        encoder.encode(CHAT)
    encoder.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(CommandError, match=r"the chat template fails on .*no system"):
        encoder.encode(CHAT)
