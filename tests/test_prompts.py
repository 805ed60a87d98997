from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adpo_jax.data.dataset import Dataset
from adpo_jax.data.files import load_rows
from adpo_jax.data.prompts import render_prompts
from adpo_jax.data.solutions import extract_solution

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


def make_tokenizer(chat_template=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is one plus one?"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer(CHAT_TEMPLATE)


def render(prompts, tokenizer, *, columns=None, **kwargs):
    dataset = Dataset({"question": prompts} | (columns or {}))
    options = {"prompt_key": "question", "max_prompt_length": 1000}
    return render_prompts(dataset, tokenizer, **options | kwargs)


def texts(prompts, tokenizer, **kwargs):
    rendered = render(prompts, tokenizer, **kwargs)
    return [tokenizer.decode(ids) for ids in rendered.token_ids]


# Rendering.


def test_the_chat_template_is_used_with_system_prompt_generation_prompt_and_arguments(chat):
    assert texts(["1+1?", "Grüße"], chat, system_prompt="Be brief.") == [
        "<|system|>Be brief.<eos><|user|>1+1?<eos><|assistant|>",
        "<|system|>Be brief.<eos><|user|>Grüße<eos><|assistant|>",
    ]
    assert texts(["1+1?"], chat, chat_template_kwargs={"enable_thinking": False}) == [
        "<|user|>1+1?<eos><|assistant|><think></think>"
    ]


def test_without_a_chat_template_or_with_it_switched_off_the_prompt_is_plain_text(plain, chat):
    for tokenizer, options in ((plain, {}), (chat, {"apply_chat_template": False})):
        assert texts(["1+1?"], tokenizer, **options) == ["1+1?"]
        assert texts(["1+1?"], tokenizer, system_prompt="Be brief.", **options) == [
            "Be brief.\n\n1+1?"
        ]


def test_chat_messages_are_accepted_and_the_template_wraps_the_last(chat):
    messages = [
        {"role": "system", "content": "Hm."},
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    assert texts([messages], chat, prompt_template="Q: {prompt}") == [
        "<|system|>Hm.<eos><|user|>A?<eos><|assistant|>B.<eos><|user|>Q: C?<eos><|assistant|>"
    ]
    assert messages[-1]["content"] == "C?", "the data set itself was changed"
    with pytest.raises(ValueError, match=r"row 1 brings a system message of its own"):
        render([messages], chat, system_prompt="Be brief.")


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt():
    closing = make_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", closing.eos_token_id)]
    )
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    assert texts(["1+1?"], closing) == ["1+1?"]


# The prompt template.


def test_the_template_replaces_the_prompt_and_columns_and_nothing_else(plain):
    prompt = "Sum {1, 2} and {level} of {0.__class__} {prompt} 100%"
    template = "{level}: {prompt} {other} {} {{x}} {0} {prompt.__class__} {prompt!r} {prompt:>9}"
    assert texts([prompt], plain, prompt_template=template, columns={"level": [3]}) == [
        f"3: {prompt} {{other}} {{}} {{{{x}}}} {{0}} "
        "{prompt.__class__} {prompt!r} {prompt:>9}"
    ]


def test_the_template_does_not_print_the_answer_inside_a_latex_command(plain):
    template = r"{prompt} Put it in \boxed{answer}; the level is {level}."
    columns = {"answer": ["42"], "level": ["easy"]}
    assert texts(["Q?"], plain, prompt_template=template, columns=columns) == [
        r"Q? Put it in \boxed{answer}; the level is easy."
    ]


def test_a_template_that_makes_every_prompt_the_same_is_refused(plain):
    for template in ("", "{promt}", r"\boxed{prompt}"):
        with pytest.raises(ValueError, match=r"every prompt the same.*\{prompt\}.*\{question\}"):
            render(["Q?"], plain, prompt_template=template)
    with pytest.raises(ValueError, match="row 2: data.prompt_template uses the column 'hint'"):
        render(["A", "B"], plain, prompt_template="{prompt} {hint}", columns={"hint": ["h", None]})


# Lengths.


def test_long_prompts_are_filtered_with_their_rows_and_counted(plain):
    prompts = ["1234", "123456", "12", "123456789"]
    rendered = render(prompts, plain, max_prompt_length=4, columns={"n": [4, 6, 2, 9]})
    assert rendered.dataset.columns == {"question": ["1234", "12"], "n": [4, 2]}
    assert [len(ids) for ids in rendered.token_ids] == [4, 2]
    assert rendered.num_overlong == 2


def test_long_prompts_are_truncated_to_their_end(plain, chat):
    rendered = render(["123456", "12"], plain, max_prompt_length=4, overlong="truncate")
    assert [plain.decode(ids) for ids in rendered.token_ids] == ["3456", "12"]
    assert (len(rendered.dataset), rendered.num_overlong) == (2, 1)
    rendered = render(["x" * 50], chat, max_prompt_length=30, overlong="truncate")
    assert chat.decode(rendered.token_ids[0]).endswith("x<eos><|assistant|>")


def test_nothing_left_is_refused_with_the_lengths_and_the_cure(plain):
    with pytest.raises(ValueError, match=r"all 2 prompts .*=4: 5 to 7 tokens\. Raise .* to 7"):
        render(["12345", "1234567"], plain, max_prompt_length=4)


# Refusals.


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "human", "content": "hello"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        7,
    ],
)
def test_malformed_messages_are_refused_with_their_row(chat, messages):
    with pytest.raises(ValueError, match="row 2: a prompt must be text or a list of messages"):
        render(["fine", messages], chat)


def test_half_of_a_character_is_refused_in_prompts_and_in_the_system_prompt(plain, chat):
    for tokenizer in (plain, chat):
        with pytest.raises(ValueError, match=r"^row 2: the text has half a surrogate pair .*ud83d"):
            render(["a", "b \ud83d"], tokenizer)
    with pytest.raises(ValueError, match="row 1: the text has half a surrogate pair"):
        render([[{"role": "user", "content": "caf\udce9"}]], chat)
    with pytest.raises(ValueError, match="row 1: the text has half a surrogate pair"):
        render(["a"], chat, system_prompt="caf\udce9")


def test_what_the_chat_template_refuses_is_passed_on_with_a_cure():
    with pytest.raises(ValueError, match=r"no system role.*set data\.system_prompt to ''"):
        render(["Q?"], make_tokenizer(NO_SYSTEM), system_prompt="Be brief.")


def test_settings_that_cannot_work_are_refused(plain, chat):
    with pytest.raises(ValueError, match="filter or truncate, got 'drop'"):
        render(["Q?"], plain, overlong="drop")
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1"):
        render(["Q?"], plain, max_prompt_length=0)
    with pytest.raises(ValueError, match="chat_template_kwargs cannot set tokenize"):
        render(["Q?"], chat, chat_template_kwargs={"tokenize": False})
    with pytest.raises(ValueError, match="^row 2: the prompt is empty"):
        render(["Q?", ""], plain)


# Real input.


def test_the_real_gsm8k_renders_whole(chat):
    if not GSM8K.exists():
        pytest.skip(
            "GSM8K is not part of the repository: it would be shared/data/gsm8k beside the checkout"
        )
    dataset = load_rows(str(GSM8K / "test.jsonl"), prompt_key="question", answer_key="answer")
    solutions = [extract_solution(answer) for answer in dataset.columns["answer"]]
    rendered = render_prompts(
        dataset.with_column("solution", solutions),
        chat,
        prompt_key="question",
        prompt_template="{prompt}\nEnd with #### and the number.",
        max_prompt_length=600,
    )
    assert len(rendered.token_ids) + rendered.num_overlong == 1319
    assert 0 < rendered.num_overlong < 100
    for ids, question in zip(rendered.token_ids, rendered.dataset.columns["question"]):
        assert chat.decode(ids) == (
            f"<|user|>{question}\nEnd with #### and the number.<eos><|assistant|>"
        )
