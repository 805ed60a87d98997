"""A process that renders chat templates for `templates.py`.

A template is a program of the folder that it came with. Jinja's sandbox keeps it from files and
from Python; this process has a limit of memory and of CPU time, so that the template can neither
fill the machine nor run for ever. It imports jinja2 and the standard library alone.

A request is a line of JSON on standard input, an answer is one on standard output:

    {"template": number, "source": text or null, "chats": [messages, ...], "variables": {...}}
    {"texts": [text, ...]}  or  {"error": text}
"""

import datetime
import json
import math
import sys
import time

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows has no such limits; the reader's deadline holds there
    resource = None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the assistant wrote; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names of Python's internals."""

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")
        super().__setitem__(name, value)


def environment() -> jinja2.Environment:
    """The environment that transformers gives chat templates.

    Source: transformers 5.24, `utils/chat_template_utils.py`.
    """

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.globals["namespace"] = _Namespace
    return env


def limit(cpu_s: float) -> None:
    """Lets this process use so many more seconds of CPU time before it is killed."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = math.ceil(time.process_time() + cpu_s)
        resource.setrlimit(
            resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard)
        )  # hard < 0: no limit


def rendered(template, chats: list, variables: dict, most: int) -> list[str]:
    """The text of each conversation; ValueError where they are longer than `most` in all."""
    texts, room = [], most
    for chat in chats:
        pieces = []
        for piece in template.generate(messages=chat, **variables):
            room -= len(piece)
            if room < 0:
                raise ValueError(f"it writes more than {most:,} characters")
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than a template may have"
    if isinstance(error, RecursionError):
        return "it calls itself without an end"
    return (str(error).strip() or type(error).__name__)[:2000]


def main(cpu_s: float, memory: int, most: int) -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    env, templates = environment(), {}
    print("{}", flush=True)
    for line in sys.stdin.buffer:
        limit(cpu_s)
        try:
            request = json.loads(line)
            number = request["template"]
            if request["source"] is not None:
                templates.clear()
                templates[number] = env.from_string(request["source"])
            texts = rendered(templates[number], request["chats"], request["variables"], most)
            answer = json.dumps({"texts": texts})
            del texts
        except BaseException as error:
            answer = json.dumps({"error": reason(error)})
        print(answer, flush=True)
        del line, answer


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
