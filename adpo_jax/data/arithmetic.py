"""The embedded task: multi-step arithmetic word problems, a tokenizer and a model small enough for
a laptop's CPU. Nothing is downloaded.

A problem tells of a few changes to a number of things and asks how many there are in the end. The
demonstrations for the supervised cold start answer in two manners: most blurt out an answer and
overlook one of the changes, fewer write their working down and are right. A model that imitates
them learns both manners and prefers the hasty one. More imitation does not change that, but
rewarding right answers does.
"""

import dataclasses
import functools
import random

from adpo_jax.data import splits

NAME = "embedded:arithmetic"

PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "eggs")
GAINS = ("finds", "buys", "wins", "gets")
LOSSES = ("loses", "sells", "drops", "lends")
DOUBLE = "doubles them"

LARGEST = 30  # the largest total
NUM_CHANGES = (3, 4)  # fewest and most
CAREFUL_SHARE = 0.38  # of the demonstrations that show their working
NUM_ROWS = {"train": 8192, "val": 256, "demonstrations": 8192}

# A Hugging Face config.json of 0.66 million parameters.
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


@functools.cache
def rows(split: str) -> dict[str, list[str]]:
    """The data set as columns: `question`, and `answer` as worked text that ends in `#### N`.

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": questions apart from both, with the
        column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    held_out = splits.held_out(NAME, split, rows)
    rng = random.Random(splits.SEEDS[split])
    problems = []
    while len(problems) < NUM_ROWS[split]:
        problem = _Problem.draw(rng)
        if problem.question not in held_out:
            problems.append(problem)
    columns = {
        "question": [problem.question for problem in problems],
        "answer": [problem.answer for problem in problems],
    }
    if split == "demonstrations":
        columns["completion"] = [
            problem.answer if rng.random() < CAREFUL_SHARE else problem.blurted(rng)
            for problem in problems
        ]
    return columns


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Someone has a number of things, and it changes.

    Attributes:
      changes: (words, sign, operand) of each change, with sign "+", "-" or "*". No verb comes
        twice, so that "what comes next" has one answer.
    """

    person: str
    thing: str
    start: int
    changes: tuple[tuple[str, str, int], ...]

    @classmethod
    def draw(cls, rng: random.Random) -> "_Problem":
        person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
        start = total = rng.randint(2, 15)
        verbs = {"+": rng.sample(GAINS, len(GAINS)), "-": rng.sample(LOSSES, len(LOSSES))}
        verbs["*"] = [DOUBLE]
        changes = []
        for _ in range(rng.randint(*NUM_CHANGES)):
            n = rng.randint(2, 9)
            outcomes = {"+": total + n, "-": total - n, "*": total * 2}
            possible = [s for s, new in outcomes.items() if verbs[s] and 2 <= new <= LARGEST]
            sign = rng.choice(possible)
            total, verb = outcomes[sign], verbs[sign].pop()
            changes.append((verb, "*", 2) if sign == "*" else (f"{verb} {n}", sign, n))
        return cls(person, thing, start, tuple(changes))

    @property
    def question(self) -> str:
        story = ", ".join(words for words, _, _ in self.changes)
        return (
            f"{self.person} has {self.start} {self.thing}. {self.person} {story}. "
            f"How many {self.thing} does {self.person} have?"
        )

    @property
    def answer(self) -> str:
        """The working, change by change, and the result after "####"."""
        totals = _totals(self.start, self.changes)
        steps = [f"{words}: {total}" for (words, _, _), total in zip(self.changes, totals)]
        working = ", ".join([f"{self.person} has {self.start}", *steps])
        return f"{working}. #### {totals[-1]}"

    def blurted(self, rng: random.Random) -> str:
        """A wrong result, that of a story in which one of the changes was overlooked."""
        right = _totals(self.start, self.changes)[-1]
        shorter = [self.changes[:i] + self.changes[i + 1 :] for i in range(len(self.changes))]
        wrong = [total for c in shorter if (total := _totals(self.start, c)[-1]) != right]
        return f"#### {rng.choice(wrong)}"


def _totals(start: int, changes) -> list[int]:
    """How many there are after each change."""
    totals, total = [], start
    for _, sign, n in changes:
        total = {"+": total + n, "-": total - n, "*": total * n}[sign]
        totals.append(total)
    return totals


@functools.cache
def make_tokenizer():
    """A byte-level BPE tokenizer trained on the task's own words.

    A number is one token.

    Returns:
      A `transformers.PreTrainedTokenizerFast`; it is the same on every machine.
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
