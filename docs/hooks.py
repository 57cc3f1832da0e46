"""What MkDocs generates from the code: the pages on the command line and on the fields of the configs, and drawings."""

import argparse
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe
import peft
from docstrings import as_markdown
from drawings import pictures
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import vblora
from vblora.cli import make_parser

log = logging.getLogger("mkdocs.hooks.vblora")

CONFIGS = {  # with PEFT's class of the same method
    vblora.VBLoRAConfig: peft.VBLoRAConfig,
    vblora.VeraConfig: peft.VeraConfig,
    vblora.TiedLoraConfig: None,
    vblora.LoraConfig: peft.LoraConfig,
}


ROOT = Path(__file__).parents[1]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    pages = {
        "reference/cli.md": command_line(),
        "reference/config.md": config_fields(),
        "contributing.md": at_top("CONTRIBUTING.md"),
        "changelog.md": at_top("CHANGELOG.md"),
    }
    for path, text in pages.items():
        if (stub := files.get_file_from_path(path)) is not None:  # what the repository shows in its place
            files.remove(stub)
        files.append(File.generated(config, path, content=text))
    for name, picture in pictures():
        files.append(File.generated(config, f"pictures/{name}", content=picture))
    api = files.get_file_from_path("reference/api.md").content_string
    for name in vblora.__all__:
        if f"::: vblora.{name}\n" not in api:
            log.warning("reference/api.md lacks vblora.%s", name)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../CONTRIBUTING.md", "](contributing.md")


def at_top(name: str) -> str:
    """A file of the repository's top folder, with links as seen from docs/. Files outside of docs/ are named, not linked."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^]]+)\]\(((?:tests|benchmarks|csrc|examples)/[^)]*)\)", r"\1 (`\2`)", text)


def command_line() -> str:
    """Each command with tables of its arguments, as --help groups them."""
    parser = make_parser()
    lines = ["# Command line", "", f"`{parser.prog}`: {parser.description}", ""]
    lines += ["`vblora COMMAND --help` prints the same as this page.", ""]
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        lines += [f"## vblora {name}", "", *paragraphs(command.description), "```text", usage(command), "```", ""]
        for group in command._action_groups:
            if rows := [f"| {cells} |" for cells in arguments(group)]:
                title = (group.title or "").capitalize()
                lines += [f"**{title}**", "", "| argument | meaning |", "|---|---|", *rows, ""]
        lines += paragraphs(command.epilog)
    return "\n".join(lines) + "\n"


def paragraphs(text: str | None) -> list[str]:
    """The text as Markdown. Indented lines, such as a list of forms, stay as they are."""
    lines: list[str] = []
    for number, part in enumerate(re.split(r"((?:^  .*\n?)+)", (text or "").strip(), flags=re.MULTILINE)):
        lines += ["```text", dedent(part).rstrip(), "```"] if number % 2 else [options_as_code(part)]
        lines.append("")
    return lines


def options_as_code(text: str) -> str:
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)


def usage(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    return parser.format_usage().removeprefix("usage: ").strip()


def arguments(group: argparse._ArgumentGroup) -> Iterator[str]:
    formatter = argparse.HelpFormatter("vblora")
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else f" {formatter._format_args(action, action.dest.upper())}"
        names = ", ".join(f"`{name}{value}`" for name in action.option_strings) or f"`{value.strip()}`"
        meaning = formatter._expand_help(action) if action.help else ""
        yield f"{cell(names)} | {cell(options_as_code(meaning))}"


def cell(text: str) -> str:
    """The text on one line; Markdown takes a bar for the end of a cell unless it is in code."""
    return re.sub(r"(`[^`]*`)|\|", lambda bar: bar[1] or r"\|", " ".join(text.split()))


def config_fields() -> str:
    """Each config with a table of its fields: type, default, meaning, and whether PEFT has them."""
    lines = [
        "# Configuration",
        "",
        "The configs are dataclasses with PEFT's field names and defaults. A value out of range raises `ValueError`, one of a",
        "wrong type `TypeError`. PEFT's config objects and their fields are accepted, too; see [Move from PEFT](../peft.md).",
        "",
    ]
    lines += ["## Fields of all configs", "", *table(vblora.VBLoRAConfig.__mro__[1], list(CONFIGS.values())), ""]
    for config, theirs in CONFIGS.items():
        lines += [f"## {config.__name__}", "", *table(config, [] if theirs is None else [theirs]), ""]
    return "\n".join(lines)


def table(config: type, theirs: list[Any]) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    in_peft = {field.name for cls in theirs if cls is not None for field in dataclasses.fields(cls)}
    lines = ["| field | type | default | meaning | in PEFT |", "|---|---|---|---|---|"]
    for name, (annotation, meaning) in documented(config).items():
        default = fields[name].default
        shown = "" if default is dataclasses.MISSING else f"`{default!r}`"
        lines.append(f"| `{name}` | `{annotation}` | {shown} | {meaning} | {'yes' if name in in_peft else 'no'} |")
    return lines


def documented(config: type) -> dict[str, tuple[str, str]]:
    """The fields that the docstring describes, with their types and meanings."""
    docstring = griffe.Docstring(as_markdown(config.__doc__ or "", config.__qualname__))
    found: dict[str, tuple[str, str]] = {}
    for section in docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.parameters:
            for parameter in section.value:
                for name in parameter.name.split(", "):
                    annotation = _annotation(config, name)
                    found[name] = (annotation, cell(parameter.description))
    return found


def _annotation(config: type, name: str) -> str:
    owner = next(cls for cls in config.__mro__ if name in vars(cls).get("__annotations__", {}))
    annotation = owner.__annotations__[name]
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
