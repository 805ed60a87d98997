"""The embedded task: multi-step arithmetic word problems, a tokenizer and a model small enough for
a laptop's CPU. Nothing is downloaded.

A problem tells of a few changes to a number of things and asks how many there are in the end. The
demonstrations for the supervised cold start imitate people: most blurt out the answer, few write
their working down. What a small model can learn from them is both manners, the hasty one by
preference; working out one step at a time is within its reach, seeing the answer at a glance is
not. More imitation does not change the preference. Rewarding right answers does.
"""

import functools
import random

NAME = "embedded:arithmetic"

PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "eggs")
GAINS = ("finds", "buys", "wins", "gets")
LOSSES = ("loses", "sells", "drops", "lends")
DOUBLE = "doubles them"

LARGEST = 30  # no total passes it
NUM_CHANGES = (3, 4)  # fewest and most
CAREFUL_SHARE = 0.42  # of the demonstrations that show their working
NUM_ROWS = {"train": 8192, "val": 256}

_SEEDS = {"train": 1, "val": 2, "demonstrations": 3}

# A Hugging Face config.json; 0.7M parameters with the tokenizer below.
MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def rows(split: str) -> dict[str, list[str]]:
    """The data set as columns: `question`, and `answer` as worked text that ends in `#### N`.

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": questions apart from both, with the
        column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    if split not in _SEEDS:
        raise ValueError(f"{NAME} has the splits {sorted(_SEEDS)}, given {split!r}")
    held_out = set(rows("val")["question"]) if split != "val" else set()
    if split == "demonstrations":
        held_out |= set(rows("train")["question"])
    rng = random.Random(_SEEDS[split])
    columns: dict[str, list[str]] = {"question": [], "answer": []}
    while len(columns["question"]) < NUM_ROWS.get(split, NUM_ROWS["train"]):
        question, working, result = _problem(rng)
        if question not in held_out:
            columns["question"].append(question)
            columns["answer"].append(f"{working} #### {result}")
    if split == "demonstrations":
        columns["completion"] = [
            answer if rng.random() < CAREFUL_SHARE else "####" + answer.rsplit("####", 1)[1]
            for answer in columns["answer"]
        ]
    return columns


def _problem(rng: random.Random) -> tuple[str, str, int]:
    """One problem: the question, the working and the result.

    No verb comes twice in a problem, so that "what comes next" has one answer.
    """
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    start = total = rng.randint(2, 15)
    gains, losses = rng.sample(GAINS, len(GAINS)), rng.sample(LOSSES, len(LOSSES))
    doubles = [DOUBLE]
    changes, working = [], [f"{person} has {start}"]
    for _ in range(rng.randint(*NUM_CHANGES)):
        n = rng.randint(2, 9)
        outcomes = [(gains, total + n), (losses, total - n), (doubles, 2 * total)]
        possible = [(verbs, new) for verbs, new in outcomes if verbs and 2 <= new <= LARGEST]
        verbs, total = rng.choice(possible)
        change = verbs.pop() if verbs is doubles else f"{verbs.pop()} {n}"
        changes.append(change)
        working.append(f"{change}: {total}")
    question = (
        f"{person} has {start} {thing}. {person} {', '.join(changes)}. "
        f"How many {thing} does {person} have?"
    )
    return question, f"{', '.join(working)}.", total


@functools.cache
def make_tokenizer():
    """A byte-level BPE tokenizer trained on the task's own words.

    A number is one token.

    Returns:
      a `transformers.PreTrainedTokenizerFast`; the same one on every machine.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_CONFIG["vocab_size"],
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    demonstrations = rows("demonstrations")
    texts = demonstrations["question"][:2048] + demonstrations["answer"][:2048]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
