"""Chat templates in their process: as transformers renders them, and killed where they must be."""

import functools
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adpo_jax.data import arithmetic, templates
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.prompts import render_prompts

CHATS = [
    [{"role": "user", "content": "2 + 2? é 漢 \U0001f600"}],
    [
        {"role": "system", "content": " s ", "name": None},
        {"role": "user", "content": "<b>&amp;</b>"},
        {"role": "assistant", "content": "four ", "reasoning": "hm"},
        {"role": "user", "content": "sure?\n"},
    ],
]
# What published templates make use of.
RICH = """{%- set ns = namespace(n=0) %}
{% for m in messages %}
  {%- if m.role == 'skipped' %}{% continue %}{% endif %}
  {%- set ns.n = ns.n + 1 %}
{{ bos_token }}[{{ m['role'] }}:{{ ns.n }}] {{ m | tojson }} {{ m.reasoning_content }}
  {% generation %}{{ m.content | trim }}{% endgeneration %}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}
{% if add_generation_prompt %}[assistant]{% if style is defined %}{{ style }}{% endif %}{% endif %}
"""


base = functools.cache(arithmetic.make_tokenizer)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=base().backend_tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=template,
    )


def test_a_template_writes_what_transformers_lets_it_write():
    tokenizer = tokenizer_with(RICH)
    tools = [{"type": "function", "function": {"name": "f<>", "parameters": {}}}]
    for extra in ({}, {"tools": tools, "style": "short"}):
        wanted = tokenizer.apply_chat_template(
            CHATS, tokenize=False, add_generation_prompt=True, **extra
        )
        given = templates.chat_texts(tokenizer, CHATS, add_generation_prompt=True, **extra)
        assert given == wanted


def test_a_last_message_is_left_open_as_transformers_leaves_it():
    chats = [[*CHATS[0], {"role": "assistant", "content": "it is "}]]
    for cut in ("", " | trim"):
        template = "{% for m in messages %}{{ m.content" + cut + " }}|{% endfor %}"
        tokenizer = tokenizer_with(template)
        wanted = tokenizer.apply_chat_template(chats, tokenize=False, continue_final_message=True)
        assert templates.chat_texts(tokenizer, chats, continue_final_message=True) == wanted
    with pytest.raises(templates.TemplateError, match="does not write the message"):
        templates.chat_texts(tokenizer_with("x"), chats, continue_final_message=True)


HOSTILE = {
    "{{ 'x' * 10 ** 11 }}": "more memory than a template may have",
    "{% for i in range(99999) %}{{ 'x' * 10 ** 6 }}{% endfor %}": "writes more than",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ raise_exception('no roles here') }}": "no roles here",
    "{% if": "unexpected 'end of template'",
    "{{ messages[9].content }}": "has no element 9",
    "{{ 1 / 0 }}": "division by zero",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "calls itself|come to an end",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_allocates_or_raises_is_refused_in_one_sentence(template):
    data = Dataset({"prompt": ["one"]})
    with pytest.raises(ValueError, match=HOSTILE[template]) as refusal:
        render_prompts(data, tokenizer_with(template), prompt_key="prompt", max_prompt_length=9)
    assert "chat template" in str(refusal.value)


def test_a_template_that_never_ends_is_killed_and_the_next_is_rendered(monkeypatch):
    templates._WORKER.close()
    monkeypatch.setattr(templates, "CPU_S", 1.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(templates.TemplateError, match="does not come to an end within 1 s"):
        templates.render(loop, CHATS)
    assert time.monotonic() - started < 60
    assert templates.render("{{ messages | length }}", CHATS) == ["1", "4"]
    templates._WORKER.close()


def test_the_process_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    templates._WORKER.close()
    assert templates.render("{{ messages | length }}", CHATS) == ["1", "4"]
    environment = Path(f"/proc/{templates._WORKER._process.pid}/environ")
    assert b"s3cret" not in environment.read_bytes()


def test_a_tokenizer_with_a_template_of_its_own_code_is_asked_itself():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversations, **kwargs):
            return [f"{len(chat)}" for chat in conversations]

    tokenizer = Own(tokenizer_object=base().backend_tokenizer)
    tokenizer.chat_template = "x"
    assert templates.chat_texts(tokenizer, CHATS) == ["1", "4"]


def test_an_exported_tokenizer_has_the_very_files_it_was_read_from(tmp_path):
    from adpo_jax.hf import folders

    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer_with(RICH).save_pretrained(source)
    spaced = (source / "tokenizer.json").read_text().replace(":", " :  ", 1)
    (source / "tokenizer.json").write_text(spaced)
    (source / "vocab.json").write_text("{}")
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer(["a call", "leaves padding behind"], padding=False, truncation=False)
    folders._save_tokenizer(out, tokenizer)
    copied = {path.name: path.read_bytes() for path in out.iterdir()}
    assert copied == {path.name: path.read_bytes() for path in source.iterdir()}
    tokenizer.chat_template = "another"
    folders._save_tokenizer(out, tokenizer)
    assert (out / "chat_template.jinja").read_text() == "another"
