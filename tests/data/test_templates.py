from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.fuzz import MANY, Generator, generators, guarded, mutated_bytes

from meshpeft.checkpoint.manifest import MANIFEST, Manifest
from meshpeft.data import templates
from meshpeft.data.templates import TemplateError, chat_templates, render_chat
from meshpeft.training.checkpoints import run_date
from meshpeft.training.config import ConfigError, FinetuneConfig

PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
QUESTION = [{"role": "user", "content": "a"}]
CALL = [
    {"role": "user", "content": "é 😀 weather?", "name": None},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1.5, True, None, 10**30]}}}]},
    {"role": "tool", "content": "<b>20°</b>"},
    {"role": "assistant", "content": "warm", "reasoning": "20 is warm"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# What templates of the Hub use, each once.
SEMANTICS = {
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  <u>\n  {% endif %}\n{{ m }}\n{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
    "json": "{{ tools | tojson(indent=2) }}{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
    "namespace": "{% set n = namespace(x=1, **{'y': 2}) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ n.y }}{{ dict(a=1) }}",
    "none": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ x is defined }}",
    "reasoning": "{% for m in messages %}[{{ m.reasoning_content }}{{ m.thinking }}{{ m.get('x', 1) }}]{% endfor %}",
    "slices": "{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[0].content.split()[-1][:1] }}",
    "special": "{{ bos_token }}{{ eos_token }}{{ unk_token }}",
    "macro": "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() }}{% endmacro %}{% call f(1) %}c{% endcall %}",
    "filters": "{{ ['b', 'a'] | sort | first }}{{ '%s-%s' | format(1, 2) }}{{ 'a' | indent(3, true) }}{{ 1.5 | int }}",
    "values": "{{ messages }}{{ (1, 2) }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 'a' ~ 1 }}{{ 'a' in 'ab' }}{{ none }}{{ '<' | e }}",
    "trim": "{%- set x = 'a  ' -%}  {{- x | trim -}}  .",
}
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of variables": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "repetition of a list": "{% set x = [messages] * 10 ** 9 %}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "format": "{{ '%1000000000s' | format('a') }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "join": "{{ ('b' * 10 ** 8).join(['a'] * 100) }}",
    "replace": "{{ ('b' * 10 ** 6) | replace('b', 'b' * 10 ** 6) }}",
    "indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "integer": "{{ 10 ** 5000 }}",
    "words": "{{ lipsum(n=10 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
    "blocks": "{% if 1 %}" * 10**4 + "{% endif %}" * 10**4,
    "output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "batch": "{% for x in [1] | batch(10 ** 9, 0) %}{% endfor %}",
}
ERRORS = {
    "TypeError": "{{ messages[0].content + 1 }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "'x' is undefined": "{{ x.y }}",
    "ValueError": "{{ 'a'.index('b') }}",
    "not today": "{{ raise_exception('not today') }}",
    "unexpected 'end of template'": "{% for",
    "No filter named 'f'": "{{ 1 | f }}",
    "unsafe": "{{ messages.__class__.__mro__ }}",
    "no loader": "{% include 'a' %}",
    "underscore": "{% set n = namespace(_x=1) %}",
    "OverflowError": "{{ range(10 ** 9) }}",
    "TemplateError": "{{ raise_exception(1) }}",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CHAT_SECONDS", 0.2)


@pytest.mark.parametrize("name", SEMANTICS)
@pytest.mark.parametrize("asks", (False, True))
def test_a_chat_is_rendered_as_transformers_renders_it(name: str, asks: bool) -> None:
    tokenizer = byte_tokenizer(SEMANTICS[name])
    for messages, tools in ((CALL, TOOLS), (QUESTION, None)):
        expected = tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=asks)
        assert render_chat(tokenizer, messages, tools, add_generation_prompt=asks).text == expected


@pytest.mark.parametrize("template", (PLAIN_TEMPLATE, MARKED_TEMPLATE))
def test_marked_parts_are_where_transformers_finds_them(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    turns = ("hi", "yes", "ho", "no")
    messages = [{"role": role, "content": turn} for role, turn in zip(["user", "assistant"] * 2, turns, strict=True)]
    rendered = render_chat(tokenizer, messages)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    if template is not MARKED_TEMPLATE:
        assert rendered.spans is None
    else:
        end = tokenizer.eos_token
        assert rendered.spans is not None
        assert [rendered.text[start:end] for start, end in rendered.spans] == ["yes" + end, "no" + end]
        assert render_chat(tokenizer, messages[:1]).spans == []


def test_a_part_marked_out_of_its_place_is_not_taken_for_one_elsewhere() -> None:
    template = "{% set x %}{% generation %}b{% endgeneration %}{% endset %}aaa{{ x }}"
    assert render_chat(byte_tokenizer(template), QUESTION) == ("aaab", None)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_ended(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"the chat template (takes|shows|calls|fails|is not)"):
        render_chat(byte_tokenizer(HOSTILE[name]), QUESTION)
    assert time.monotonic() - began < 5
    assert render_chat(byte_tokenizer("{{ messages[0].content }}"), QUESTION).text == "a"


@pytest.mark.parametrize("said", ERRORS)
def test_what_a_template_raises_is_a_sentence(said: str) -> None:
    with pytest.raises(TemplateError) as error:
        render_chat(byte_tokenizer(ERRORS[said]), QUESTION)
    assert str(error.value).startswith("the chat template ")
    assert said in str(error.value) or said == "TemplateError"


def test_a_long_error_is_cut() -> None:
    with pytest.raises(TemplateError) as error:
        render_chat(byte_tokenizer("{{ raise_exception('no ' * 10000) }}"), QUESTION)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("template", ({"a": "b"}, 7, ["x"], {"default": 3}))
def test_a_template_of_another_type_is_refused(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="chat template"):
        render_chat(tokenizer, QUESTION)


def test_the_date_is_the_one_that_is_given() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y %H:%M') }}")
    with chat_templates("2024-07-26"):
        assert render_chat(tokenizer, QUESTION).text == "26 Jul 2024 00:00"
    assert render_chat(tokenizer, QUESTION).text == date.today().strftime("%d %b %Y 00:00")


def test_chance_is_the_same_for_every_chat() -> None:
    tokenizer = byte_tokenizer("{{ range(10 ** 5) | random }}{{ lipsum(1) }}")
    with chat_templates(None):
        first = render_chat(tokenizer, QUESTION).text
    assert templates._renderer._process is None
    assert render_chat(tokenizer, QUESTION).text == first == render_chat(tokenizer, QUESTION).text


def test_many_chats_that_take_a_little_less_than_one_may_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TOTAL_SECONDS", 0.2)
    tokenizer = byte_tokenizer("{% for i in range(99999) %}{{ i }}{% endfor %}")
    monkeypatch.setattr(templates, "SECONDS_PER_CHARACTER", 0.0)
    with pytest.raises(TemplateError, match="for all until here"):
        list(map(render_chat, [tokenizer] * 100, [QUESTION] * 100))
    # Another template is not to blame.
    assert render_chat(byte_tokenizer("b"), QUESTION).text == "b"


def test_a_process_that_is_gone_is_a_sentence_once() -> None:
    tokenizer = byte_tokenizer("b")
    assert render_chat(tokenizer, QUESTION).text == "b"
    process = templates._renderer._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(TemplateError, match="signal 9"):
        render_chat(tokenizer, QUESTION)
    assert render_chat(tokenizer, QUESTION).text == "b"


def test_threads_and_forks_get_answers_of_their_own() -> None:
    tokenizer = byte_tokenizer("{{ messages[0].content }}")
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            if render_chat(tokenizer, [{"role": "user", "content": name}]).text != name:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        with chat_templates(None):
            ask("child")
        os._exit(len(wrong))
    ask("parent")
    assert os.waitpid(child, 0)[1] == 0 and not wrong


@pytest.mark.parametrize("end", ("returns", "is killed"))
def test_no_process_is_left_behind(end: str, tmp_path: Path) -> None:
    # The module without its package: this test does not wait for torch.
    source = Path(templates.__file__)
    script = f"""
import importlib.util, os, signal, sys, types
for name in ("meshpeft", "meshpeft.parallel", "transformers"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["transformers"].PreTrainedTokenizerBase = object
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
load("meshpeft.parallel.errors", {str(source.parents[1] / "parallel" / "errors.py")!r})
templates = load("templates", {str(source)!r})
class Tokenizer:
    chat_template, special_tokens_map = "b", {{}}
    def get_chat_template(self, *_): return self.chat_template
templates.render_chat(Tokenizer(), [{{"role": "user", "content": "a"}}])
print(templates._renderer._process.pid, flush=True)
if {end == "is killed"}: os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if end == "is killed" else 0), done.stderr
    assert not done.stderr
    until = time.monotonic() + 10
    while Path(f"/proc/{done.stdout.strip()}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.01)
        if not Path(f"/proc/{done.stdout.strip()}/cmdline").read_bytes():  # ended, and not yet waited for
            break
    else:
        assert not Path(f"/proc/{done.stdout.strip()}/cmdline").exists()


@pytest.mark.parametrize("resume", ("auto", "directory", "step"))
def test_a_run_that_goes_on_keeps_its_date(resume: str, tmp_path: Path) -> None:
    today = date.today().isoformat()
    checkpoints = tmp_path / "checkpoints"
    config = FinetuneConfig(output_dir=tmp_path, resume=resume)
    if resume != "auto":
        config = replace(config, resume=str(tmp_path if resume == "directory" else checkpoints / "step-00000004"))
    assert run_date(config) == today  # there is no checkpoint yet
    for step, day in ((2, "2023-01-01"), (4, "2024-07-26")):
        path = checkpoints / f"step-{step:08}"
        path.mkdir(parents=True)
        manifest = Manifest(step, False, {}, {}, extra={"run": {"template_date": day}})
        (path / MANIFEST).write_bytes(manifest.encode())
    assert run_date(config) == "2024-07-26"
    assert run_date(replace(config, template_date="2025-01-01")) == "2025-01-01"
    assert run_date(replace(config, resume=None)) == today
    (path / MANIFEST).write_bytes(Manifest(4, False, {}, {}, extra={"run": {"template_date": ["x"]}}).encode())
    assert run_date(config) == ("2023-01-01" if resume != "step" else today)


def test_an_output_directory_that_cannot_be_read_has_no_date(tmp_path: Path) -> None:
    """Each rank asks before the first collective, and must come to it; the first one says what is wrong, later."""
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", Path("a\0b")):
        assert run_date(FinetuneConfig(output_dir=output, resume="auto")) == date.today().isoformat()


def test_a_date_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template_date='yesterday': expected a date"):
        FinetuneConfig(template_date="yesterday").check()
    for given in ("yesterday", [1]):
        with pytest.raises(ConfigError, match="template_date="):
            FinetuneConfig.from_options({**FinetuneConfig().as_json(), "template_date": given}, tmp_path)


EXPRESSIONS = (
    "messages[99].content", "messages | length * 10 ** 9", "'a' * messages | length", "[messages] * 10 ** 9",
    "loop.index", "messages.append(1)", "namespace(**messages[0])", "(1).__class__", "''.join(messages)", "1 // 0",
    "x[1][2]", "cycler()", "'%s' % messages", "'{0.__class__}'.format(1)", "messages | sort",
    "messages | groupby('role')", "range(10 ** 5) | list", "9 ** 9 ** 9", "messages | tojson(indent=10 ** 9)",
    "strftime_now(1)", "raise_exception(messages)", "self", "caller()", "'a'.center(10 ** 10)", "messages | random",
    "dict(messages)", "none + 1", "'\ud83d'", "messages | batch(0) | list", "''", "messages | xmlattr",
    "lipsum(10 ** 6)", "joiner", "1e999", "0x" + "f" * 5000, "true.real", "messages[0:1:0]", "-" * 5000,
)  # fmt: skip
STATEMENTS = (
    "{% for i in range(99999) %}", "{% endfor %}", "{% if messages %}", "{% else %}", "{% endif %}",
    "{% generation %}", "{% endgeneration %}", "{% set x = namespace(a=messages) %}", "{% set x %}", "{% endset %}",
    "{% macro f() %}", "{% endmacro %}", "{% break %}", "{% include 'a' %}", "{% extends 'a' %}", "{% block b %}",
    "{% raw %}", "{#", "{{", "{%", "{% filter upper %}", "{% autoescape true %}", "{% do x %}", "{% call f() %}",
    "{% import 'a' as b %}", "{% with %}", "\x00",
)  # fmt: skip


def _mutated_template(rng: Generator) -> str:
    template = rng.choice([*SEMANTICS.values(), PLAIN_TEMPLATE, MARKED_TEMPLATE])
    for _ in range(rng.choice((1, 1, 2, 3))):
        tags = [match.span() for match in re.finditer(r"\{[{%].*?[%}]\}", template)] or [(0, len(template))]
        start, end = rng.choice(tags)
        kind = rng.randrange(6)
        if kind < 2:
            template = template[:start] + "{{ " + rng.choice(EXPRESSIONS) + " }}" + template[end:]
        elif kind == 2:
            template = template[:start] + rng.choice(STATEMENTS) + template[start:]
        elif kind == 3:
            template = template[:start] + template[end:]
        elif kind == 4:
            template = template[:start] + template[start:end] * rng.choice((2, 100)) + template[end:]
        else:
            template = mutated_bytes(template.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    return template


@MANY
@pytest.mark.usefixtures("impatient")
def test_no_template_ends_in_a_traceback(count: int, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with chat_templates(None):
        render_chat(byte_tokenizer("a"), QUESTION)
        for rng in generators("template", count):
            tokenizer.chat_template = _mutated_template(rng)
            with guarded(tmp_path, rng):
                render_chat(tokenizer, *rng.choice(((CALL, TOOLS), (QUESTION, None))))


@pytest.mark.parametrize("tools", (None, [1]))
def test_messages_and_tools_that_are_no_objects_are_refused(tools: Any) -> None:
    messages: Any = ["a"] if tools is None else QUESTION
    with pytest.raises(TemplateError, match=r"(message|tool) 1 is of type (str|int); expected an object"):
        render_chat(byte_tokenizer("a"), messages, tools)
