"""The process that renders chat templates for `meshpeft.data.templates`; run by its path, not imported.

A template is a program that somebody else wrote. It may loop for ever, compute `9**9**9` inside one C call, which no
signal handler interrupts, or take all memory there is. So it runs in a separate process with limits that the operating
system enforces: address space, size of files, and processor time, which is set again for each chat and ends the
process when it is used up.

The environment is that of `transformers.utils.chat_template_utils`, to the letter, without the seconds that its
import takes: only Jinja is imported here. One request and one answer at a time go over standard input and output, each
behind its length: a request is a pickle (from the process that trains, which is trusted), an answer is JSON (from this
one, which is not).
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":  # nothing but the standard library is on the path
    sys.path += sys.argv[1:]

import jinja2
import jinja2.debug  # Jinja imports it when a template fails, perhaps for want of memory
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

LENGTH = struct.Struct("<Q")
ADDRESS_SPACE_BYTES = 768 * 2**20
MOST_CHARACTERS = 16 * 2**20
MOST_SAID = 300


class Request(NamedTuple):
    """A chat to render.

    Attributes:
        template: Text of the template.
        variables: What it reads, `messages` among it.
        moment: Time that it reads as now, in ISO format.
        seconds: Processor time for each rendering.
        prefixes: How many of the messages are shown, and whether the prompt to generate is, in each rendering.
    """

    template: str
    variables: dict[str, Any]
    moment: str
    seconds: float
    prefixes: list[tuple[int, bool]]


class TooLong(Exception):
    """A template shows more than `MOST_CHARACTERS`."""


class _MarkedParts(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}`: the assistant's parts."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.shown = 0
        """Characters that the chat has so far."""
        self.parts: list[tuple[int, str]] = []
        """Where each part begins, and its text."""
        environment.extend(marked_parts=self)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        text = str(caller())
        self.parts.append((self.shown, text))
        return text


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], args[1:]
        values = dict(*given, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_MarkedParts, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_Namespace)
    return environment.from_string(template)


def render(request: Request, count: int, ask: bool) -> dict[str, Any]:
    """Render the first messages of a chat: the `text`, and the `spans` that the template marks.

    Spans are `None` if the template puts a marked part elsewhere than where it is marked (in a macro, or in a variable
    that is shown later), since its place is then unknown.
    """
    template = _compiled(request.template)
    environment: Any = template.environment
    parts: _MarkedParts = environment.marked_parts
    parts.shown, parts.parts = 0, []
    environment.globals["strftime_now"] = datetime.fromisoformat(request.moment).strftime
    if "random" in request.template or "lipsum" in request.template:  # a chat is always the same
        random.seed(0)
    blocks = []
    shown = {"messages": request.variables["messages"][:count], "add_generation_prompt": ask}
    for block in template.generate({**request.variables, **shown}):
        parts.shown += len(block)
        if parts.shown > MOST_CHARACTERS:
            raise TooLong
        blocks.append(block)
    text = "".join(blocks)
    spans = [(start, start + len(part)) for start, part in parts.parts]
    agree = all(text.startswith(part, start) for start, part in parts.parts)
    return {"text": text, "spans": spans if agree else None}


def _answer(request: Request, count: int, ask: bool) -> dict[str, Any]:
    """Render once; on failure return the end of a sentence that begins with "the chat template"."""
    try:
        return render(request, count, ask)
    except TooLong:
        return {"fault": f"shows more than {MOST_CHARACTERS:,} characters for one chat"}
    except MemoryError:
        return {"fault": f"takes more than {ADDRESS_SPACE_BYTES // 2**20} MB of memory for one chat"}
    except RecursionError:
        return {"fault": "calls itself without end, or is nested too deep"}
    except jinja2.TemplateSyntaxError as error:
        return {"fault": f"is not one that Jinja can read (line {error.lineno}: {_said(error)})"}
    except jinja2.TemplateError as error:
        return {"fault": f"refuses it: {_said(error)}"}
    except Exception as error:
        return {"fault": f"fails on it ({type(error).__name__}: {_said(error)})"}


def _said(error: Exception) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = type(error).__name__
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]} .."


def _messages(stream: BinaryIO) -> Iterator[bytes]:
    while True:
        head = stream.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        yield stream.read(LENGTH.unpack(head)[0])


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Answer requests until standard input ends."""
    _limit(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    output = os.fdopen(os.dup(1), "wb", buffering=2**20)
    for message in _messages(sys.stdin.buffer):
        request = Request(*pickle.loads(message))
        for count, ask in request.prefixes:
            before = time.process_time()
            # Set again for each rendering; waiting takes no processor time.
            signal.setitimer(signal.ITIMER_PROF, request.seconds)
            content = _answer(request, count, ask)
            content["seconds"] = time.process_time() - before
            answer = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
            output.write(LENGTH.pack(len(answer)) + answer)
        output.flush()


if __name__ == "__main__":
    main()
