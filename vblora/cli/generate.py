"""``vblora generate``: prompts in, completions out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .folders import require
from .options import add_inference, add_load_in, add_output_file, at_least, number, refuse_idle, seed

if TYPE_CHECKING:
    from .folders import Subparsers

_DESCRIPTION = """\
Completes prompts with a language model and an adapter. Give prompts with --prompt, or a file with --data: the output then has
its columns and a new one, generated. With --adapter-column, each row uses its own adapter. Defaults are in parentheses."""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "generate",
        help="complete prompts with a language model and its adapter",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; may be given several times, and then the standard output is JSON lines",
    )
    group.add_argument("--data", type=Path, metavar="FILE", help="rows with prompts: .csv, .tsv or .jsonl")
    group.add_argument(
        "--prompt-column",
        metavar="NAME",
        help="the column with the prompt: a text, or a chat (prompt, messages or text); a chat that ends with the assistant is "
        "completed from before the assistant's first message",
    )
    add_load_in(add_inference(parser, base_alone=True))
    group = parser.add_argument_group("how to generate")
    group.add_argument(
        "--chat-template", metavar="auto|none|FILE",
        help="auto: a plain prompt becomes a chat if the tokenizer has a template; none: it stays plain text; FILE: use this "
        "template (as in training)",
    )  # fmt: skip
    group.add_argument(
        "--max-new-tokens", type=at_least(1), default=128, metavar="N", help="tokens to generate (%(default)s)"
    )
    group.add_argument(
        "--num-beams", type=at_least(1), default=1, metavar="N", help="beams; 1 is no beam search (%(default)s)"
    )
    group.add_argument(
        "--temperature", type=number(float, "0 or above", lambda x: 0 <= x < float("inf")), default=0.0, metavar="X",
        help="0: always take the most likely token, without the penalties in the model's generation_config.json; above 0: "
        "sample (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--top-p", type=number(float, "above 0 and at most 1", lambda x: 0 < x <= 1), metavar="X",
        help="sample from the most likely tokens that together have this probability (1: all tokens)",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N", help="prompts in a batch (%(default)s)"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the sampling (%(default)s)")
    add_output_file(parser)


def run(arguments: argparse.Namespace) -> int:
    require("transformers", "accelerate")
    if (arguments.prompt is None) == (arguments.data is None):
        raise CommandError("--prompt or --data: give one of them.")
    if arguments.adapter_column is not None and (arguments.data is None or not arguments.adapter):
        raise CommandError("--adapter-column is a column of --data, and its adapters are in --adapter. Give both.")
    if arguments.num_beams > 1 and arguments.temperature > 0:
        raise CommandError("--num-beams and --temperature: beam search does not sample. Give one of them.")
    refuse_idle(
        "--top-p",
        arguments.top_p is not None and not arguments.temperature,
        "--temperature is 0, so nothing is sampled",
    )
    refuse_idle("--prompt-column", bool(arguments.prompt_column and arguments.prompt), "--prompt has no columns")
    refuse_idle("--bank", bool(arguments.bank and not arguments.adapter), "there is no --adapter that could need it")
    from ..finetune import adapters
    from ..finetune.outputs import check_output_file
    from ..finetune.task import read_template

    check_output_file(arguments.output, arguments.overwrite)
    folders = adapters.find_folders(arguments.adapter)
    if arguments.adapter_column is None:
        adapters.refuse_several(folders)
    runs = [adapters.read_run(folder) for folder in folders.values()]
    for run in runs:
        if run.is_language_model is False:
            raise CommandError(f"--adapter: {run.folder} is a classifier's adapter. Use vblora predict.")
    model = adapters.find_base(arguments.model, runs)
    template = arguments.chat_template
    if template is None:
        told = [run for run in runs if run.report.get("chat_template") is not None]
        templates = [run.report["chat_template"] for run in told]
        template = adapters.common_setting(told, "--chat-template", templates) if told else "auto"
    else:
        template = read_template(template) or template
    from ..finetune import generating  # imports transformers, which is slow: only after all other checks

    return generating.run(arguments, generating.Job(model, folders, runs, template))
