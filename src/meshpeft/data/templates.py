"""Chat templates: a tokenizer's template renders a chat, within bounds of time and memory.

A template is a program in a file that people download. It is rendered in a separate process (why: see
`template_process.py`), which is started with the first chat and serves all that follow. The result is that of
`tokenizer.apply_chat_template`, with one difference: a template that reads the date gets that of the run, so that the
same data make the same tokens on every rank, on every machine, and when a run is resumed.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
from transformers import PreTrainedTokenizerBase

from meshpeft.parallel.errors import MeshPEFTError, first_line

__all__ = ["RenderedChat", "TemplateError", "chat_templates", "render_chat", "render_prefixes"]

CHAT_SECONDS = 3.0
"""Processor time that a template may take for one chat."""
TOTAL_SECONDS, MEAN_SECONDS, SECONDS_PER_CHARACTER = 10.0, 0.02, 2e-6
"""Processor time that a template may take for all chats: these, for each chat, and for each character of them."""

_PROCESS = Path(__file__).with_name("template_process.py")
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 2**28
# By the clock, which a machine with more processes than cores does not blame on the template.
_STALLED_SECONDS = 20 * CHAT_SECONDS
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WHAT_TO_DO = "mend the template of the model's directory, or use another"


class TemplateError(MeshPEFTError):
    """A chat template that cannot be used, or not with this chat; a sentence without the chat's place."""


class RenderedChat(NamedTuple):
    """A chat as its template shows it.

    Attributes:
        text: All of it.
        spans: Characters `[start, end)` of the parts that the template marks as the assistant's
            (`{% generation %}`), in order; `None` if the template marks none, or does not show where they are.
    """

    text: str
    spans: list[tuple[int, int]] | None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> RenderedChat:
    """Render a chat with the tokenizer's template.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages, at least one; keys without a value (`None`) are left out.
        tools: Schemas handed to the template.
        add_generation_prompt: End with what precedes an answer.

    Raises:
        TemplateError: There is no template, it takes too long or too much memory, shows too much, or fails.
    """
    (rendered,) = render_prefixes(tokenizer, messages, tools, [(len(messages), add_generation_prompt)])
    if isinstance(rendered, TemplateError):
        raise rendered
    return rendered


def render_prefixes(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    prefixes: Sequence[tuple[int, bool]],
) -> list[RenderedChat | TemplateError]:
    """Render the beginnings of a chat together, which is several times as fast as one after another.

    Args:
        tokenizer, messages, tools: See `render_chat`.
        prefixes: How many of the messages are shown, and whether the chat ends with what precedes an answer.

    Returns:
        Each, or why the template does not show it.

    Raises:
        TemplateError: There is no template, or it takes too long or too much memory, which ends the process.
    """
    for kind, given in (("message", messages), ("tool", tools or ())):
        for number, part in enumerate(given, start=1):
            if not isinstance(part, Mapping):
                raise TemplateError(f"{kind} {number} is of type {type(part).__name__}; expected an object")
    template = _template(tokenizer, tools)
    chat = [
        _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
    ]
    variables = {
        "messages": chat,
        "tools": list(tools) if tools else None,
        "documents": None,
        **tokenizer.special_tokens_map,
    }
    marked = _GENERATION_MARKER.search(template) is not None
    rendered = _renderer.render(template, variables, _today.get() or date.today(), list(prefixes))
    return [part._replace(spans=None) if isinstance(part, RenderedChat) and not marked else part for part in rendered]


@contextmanager
def chat_templates(day: str | None) -> Iterator[None]:
    """Give templates that read the date (`strftime_now`) this one inside the block; end the process behind it.

    Args:
        day: Date in ISO format; `None`: today.
    """
    token = _today.set(None if day is None else date.fromisoformat(day))
    try:
        yield
    finally:
        _today.reset(token)
        _renderer.close()


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    if not tokenizer.chat_template:
        raise TemplateError(
            "the tokenizer has no chat template; use a chat model's tokenizer or prompt/completion data"
        )
    try:
        template = tokenizer.get_chat_template(None, tools or None)
    except (ValueError, TypeError, AttributeError) as error:
        raise TemplateError(
            f"the tokenizer's chat template cannot be used: {first_line(error)}; {_WHAT_TO_DO}"
        ) from error
    if not isinstance(template, str):
        raise TemplateError(f"the chat template is of type {type(template).__name__}; expected text")
    return template


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning the names that templates read it by, as transformers does."""
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Copy a value in JSON's types; anything else (a date in a Parquet file) becomes its type's name, as in
    transformers.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if isinstance(value, tuple):
        return tuple(_plain(content) for content in value)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


class _Renderer:
    """The process that renders, and the time that the template has taken so far."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._lock = threading.Lock()
        self._template = ""
        self._seconds = self._allowed = 0.0

    def render(
        self, template: str, variables: dict[str, Any], today: date, prefixes: list[tuple[int, bool]]
    ) -> list[RenderedChat | TemplateError]:
        try:
            request = pickle.dumps((template, _plain(variables), today.isoformat(), CHAT_SECONDS, prefixes))
        except RecursionError:
            raise TemplateError("the chat is nested too deep to be rendered; flatten its tools and calls") from None
        with self._lock:
            answers = self._answers(request, len(prefixes))
            for answer in answers:
                self._count(template, answer["seconds"], len(answer.get("text", "")))
        return list(map(_rendered, answers))

    def close(self) -> None:
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a forked process: the process that renders is the parent's."""
        if self._process is not None:
            self._process.returncode = 0
        self._process, self._lock = None, threading.Lock()

    def _count(self, template: str, seconds: float, characters: int) -> None:
        """Bound the time of all chats, since thousands may take a little less than one is allowed."""
        if template != self._template:
            self._template, self._seconds, self._allowed = template, 0.0, TOTAL_SECONDS
        self._seconds += seconds
        self._allowed += MEAN_SECONDS + SECONDS_PER_CHARACTER * characters
        if self._seconds > self._allowed:
            raise TemplateError(
                f"the chat template takes {seconds:.2f} s for a chat of {characters:,} characters, and "
                f"{self._seconds:.0f} s for all until here; {_WHAT_TO_DO}"
            )

    def _answers(self, request: bytes, count: int) -> list[dict[str, Any]]:
        if self._process is None:
            self._process, self._received = _started(), bytearray()
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(_LENGTH.pack(len(request)) + request)
            stream.flush()
            answers = [json.loads(self._read().decode("utf-8", "surrogatepass")) for _ in range(count)]
        except (OSError, EOFError, ValueError) as error:
            raise TemplateError(f"the chat template {self._how_it_ended(error)}; {_WHAT_TO_DO}") from None
        except BaseException:
            self._end()  # its next answer would be the one that was not waited for
            raise
        return answers

    def _read(self) -> bytes:
        """Read the next answer.

        Raises:
            TimeoutError: There is none in time.
            EOFError: The process has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        until = time.monotonic() + _STALLED_SECONDS
        stream, wanted = self._process.stdout.fileno(), _LENGTH.size
        while True:
            if wanted == _LENGTH.size <= len(self._received):
                wanted += min(_LENGTH.unpack_from(self._received)[0], _MOST_BYTES)
            if wanted > _LENGTH.size and len(self._received) >= wanted:
                answer = bytes(self._received[_LENGTH.size : wanted])
                del self._received[:wanted]
                return answer
            poll = select.poll()
            poll.register(stream, select.POLLIN)
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(stream, 2**20)
            if not part:
                raise EOFError
            self._received += part

    def _how_it_ended(self, error: Exception) -> str:
        """End the process after an error, and describe its end as the template's."""
        process = self._process
        assert process is not None
        if not isinstance(error, TimeoutError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(CHAT_SECONDS)
        said = self._end()
        if isinstance(error, TimeoutError):
            return f"gives no answer in {_STALLED_SECONDS:g} s"
        if process.returncode == -signal.SIGPROF:
            return f"takes more than {CHAT_SECONDS:g} s for one chat"
        if process.returncode < 0:
            said = f"signal {-process.returncode}"
        return f"ends the process that renders it ({said or f'exit code {process.returncode}'})"

    def _end(self) -> str:
        """End the process, if there is one, and return the last line of its standard error."""
        process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        said = process.communicate()[1].decode(errors="replace")
        return said.strip().rpartition("\n")[2]


def _started() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # -S, -P: nothing but the standard library and Jinja; -B: it may not write.
    command = [sys.executable, "-S", "-P", "-B", str(_PROCESS), *_search_path()]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | {"PYTHONHASHSEED": "0"},
        start_new_session=True,  # Ctrl-C is for the run
    )


def _search_path() -> list[str]:
    return sorted({str(Path(str(package.__file__)).parents[1]) for package in (jinja2, markupsafe)})


def _rendered(answer: dict[str, Any]) -> RenderedChat | TemplateError:
    if "fault" in answer:
        return TemplateError(f"the chat template {answer['fault']}")
    text, spans = answer["text"], answer["spans"]
    try:
        text.encode()
    except UnicodeEncodeError:
        return TemplateError("the chat template shows half a surrogate pair, which is not text")
    return RenderedChat(text, None if spans is None else [(start, end) for start, end in spans])


_today: ContextVar[date | None] = ContextVar("today", default=None)
_renderer = _Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.forget)
