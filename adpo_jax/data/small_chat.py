"""A tokenizer with a chat template that is small enough for the embedded tasks with tools.

The prompt names the tools, a call is JSON between two marks, and so is what a tool answers:

    [add]
    What is 12 + 30?
    <tool_call>{"name": "add", "arguments": {"a": 12, "b": 30}}</tool_call><eos>
    <tool>42</tool>#### 42<eos>

The marks are single tokens, and so is every digit.
"""

from collections.abc import Iterable

OPEN, CLOSE, END = "<tool_call>", "</tool_call>", "<eos>"

TEMPLATE = (
    "{% if tools %}[{{ tools | map(attribute='function.name') | join(' ') }}]\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<tool>{{ message.content }}</tool>"
    "{% elif message.role == 'assistant' %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<eos>"
    "{% else %}{{ message.content }}\n{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on a task's own words; it is the same on every machine.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", END, OPEN, CLOSE, "<tool>", "</tool>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<pad>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
