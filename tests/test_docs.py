"""What the documentation names exists: links, files, commands with their options, make targets, Python imports."""

import ast
import functools
import importlib.util
import re
import shlex
import textwrap

import pytest
from jvlm_kernels import __all__ as kernel_names

from jvlm import cli, configs, options
from jvlm.parallel import hosts
from jvlm.sweep import runner
from tests.support import ROOT
from tools import make_config_reference

PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "tests/golden/README.md")
    for page in ROOT.glob(pattern)
)
every_page = pytest.mark.parametrize("page", PAGES, ids=str)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
_ROOTS = "configs docs jvlm kernels launch tests tools".split()


# commands of an earlier page, which parse
PARSED: set[tuple[str, ...]] = set()


class Parsed(Exception):
    """The words of a command have been parsed."""


def text_of(page) -> str:
    return (ROOT / page).read_text()


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks of these languages."""
    return [textwrap.dedent(block) for _, language, block in _FENCE.findall(text) if language in languages]


def code_spans(text: str) -> list[str]:
    """Inline code, which may go over a line's end."""
    outside = _FENCE.sub("", text)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", outside)]


def shell_lines(text: str) -> list[list[str]]:
    """The words of every line of shell in blocks, indented text and inline code; settings of variables are left out."""
    outside = _FENCE.sub("", text)
    sources = [*blocks(text, "shell", ""), "\n".join(re.findall(r"^    (\S.*)$", outside, re.M)), *code_spans(text)]
    found = []
    for line in "\n".join(sources).replace("\\\n", " ").splitlines():
        if not re.match(r"(\w+=\S+ )*(jvlm|make|python|\.venv/bin/jvlm) ", line + " "):
            continue
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            words.pop(0)
        found.append(words)
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    text = _FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"


@every_page
def test_named_files_exist(page):
    names = re.findall(rf"(?<![\w/.-])(?:{'|'.join(_ROOTS)})/[\w./-]*\w", text_of(page))
    wrong = {n for n in names if not (ROOT / n).exists() and not (ROOT / "kernels" / n).exists()}
    # a module named by its folder and stem, and names of what is installed or written elsewhere
    assert not {n for n in wrong if not (ROOT / f"{n}.py").exists()}, page


@every_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for words in shell_lines(text_of(page)) if words[0] == "make" and len(words) > 1}
    assert named <= targets


@every_page
def test_commands_parse(page, monkeypatch):
    real_parse, real_load, demo = options._parse, configs.load, "mimo_vl/easy_vqa"

    def parse(kind, words, program, default, *, add_help=True, boolean_values=False):
        value, rest = real_parse(kind, words, program, default, add_help=add_help, boolean_values=boolean_values)
        if add_help:
            assert not rest
            raise Parsed
        return value, rest

    def parsed():
        raise Parsed

    monkeypatch.setattr(options, "_parse", parse)
    monkeypatch.setattr(hosts, "initialise", lambda *_: None)
    # a sweep hands the fields of its experiment on, and would train
    monkeypatch.setattr(runner, "State", lambda *_: parsed())
    # the fields of an experiment are the same in every config
    monkeypatch.setattr(configs, "load", lambda name, *_: real_load(name if name in configs.shipped() else demo))
    for words in shell_lines(text_of(page)):
        if words[0] == "make" or words[0] == "python":
            continue
        if len(words) == 1 or words[1].isupper() or words[1].startswith("-") or "..." in words:
            continue
        command = " ".join(words[1:3]) if " ".join(words[1:3]) in cli.COMMANDS else words[1]
        assert command in cli.COMMANDS, f"{page}: {words}"
        if len(words) == 1 + len(command.split()):
            continue  # named without its options
        if tuple(words) in PARSED:
            continue
        module, _ = cli.COMMANDS[command]
        with pytest.raises((Parsed, SystemExit)) as ended:
            importlib.import_module(module).run(words[1 + len(command.split()) :])
        # a command with --help prints it and exits
        assert ended.type is Parsed or ended.value.code == 0, f"{page}: {words}"
        PARSED.add(tuple(words))


@functools.cache
def fields_of_experiments():
    """The options of an experiment; tasks have fields of their own."""
    experiments = [configs.load(name) for name in ("mimo_vl/easy_vqa", "mimo_vl/morl")]
    return {name for one in experiments for name in options.option_names(type(one), one)}


@every_page
def test_named_fields_of_an_experiment_exist(page):
    named = set(re.findall(r"(?<![\w-])--((?:[a-z]\w*\.)+[a-z]\w*)", text_of(page)))
    assert named <= fields_of_experiments(), page


@every_page
def test_python_blocks_import_what_exists(page):
    for block in blocks(text_of(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("jvlm", "jvlm_kernels"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.util.find_spec(name), f"{page}: {name}"


def test_the_table_of_kernels_names_all_that_compute():
    named = set(re.findall(r"^\| `(\w+)` \|", text_of("kernels/README.md"), re.M))
    assert {"segment_attention", "decode_attention", "grouped_matmul", "linear_cross_entropy"} <= named & set(
        kernel_names
    )


def test_the_configuration_reference_is_up_to_date():
    page = make_config_reference.render()
    assert page == make_config_reference.TARGET.read_text(), "run python tools/make_config_reference.py"
