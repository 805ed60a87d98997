"""Word problems of one to three steps with worked answers, made up by templates. Nothing is
downloaded. `embedded:word_problems?max_steps=2&largest=20` has easier ones.

They are of the kind that small pretrained language models are taught on: someone shops, saves,
reads or shares something, and a whole number is asked for. Stories, names and numbers are drawn, so
that a seed gives as many problems as are wanted. No text is taken from any data set.

The demonstrations for a supervised cold start answer in two manners, as those of the task of
`arithmetic` do: most blurt out an answer, which is mostly wrong, and fewer show their working and
are right.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping

from adpo_jax.data import splits

NAME = "embedded:word_problems"

CAREFUL_SHARE = 0.15  # of the demonstrations that show their working
LUCKY_SHARE = 0.15  # of the answers blurted out that are right
# The least and the most that may be asked for of each option.
OPTIONS = {"max_steps": (1, 3), "largest": (10, 1000), "seed": (0, 1_000_000)}
NUM_ROWS = {"train": 8192, "val": 256, "demonstrations": 2048}

_NAMES = {
    "she": "Amara Bea Chloe Dalia Elif Freya Greta Hana Ines Jana Kira Lena Mona Nadia Olga Petra "
    "Rosa Sofia Tara Uma Vera Yuki Zoe",
    "he": "Adam Boris Carlos Dmitri Emil Farid Goran Hiro Ivan Jorge Kofi Liam Marco Nils Omar "
    "Pavel Quinn Ravi Sven Tomas Umar Victor Yusuf Zack",
}
_NAMES = {pronoun: tuple(names.split()) for pronoun, names in _NAMES.items()}
_POSSESSIVES = {"she": "her", "he": "his"}

_NOUNS = {
    "things": "marbles stickers stamps shells buttons coins postcards pebbles beads magnets cards "
    "badges",
    "goods": "notebooks pencils mugs candles plates brushes towels bulbs baskets ribbons scarves "
    "puzzles",
    "foods": "apples muffins cookies oranges pears plums carrots eggs lemons peaches buns tomatoes",
    "holders": "boxes bags crates baskets packs trays jars",
    "group": "friends neighbours children classmates cousins teammates",
}
_NOUNS = {kind: tuple(nouns.split()) for kind, nouns in _NOUNS.items()}
_JOBS = ("babysitting", "mowing lawns", "walking dogs", "washing cars", "tutoring", "gardening")
_PLACES = ("a theatre", "a cinema", "a concert hall", "a school hall", "a stadium stand")
_TIMES = {2: "twice", 3: "three times", 4: "four times"}
_BILLS = (20, 50, 100)


@functools.cache
def rows(
    split: str, *, seed: int = 0, max_steps: int = 3, largest: int = 1000
) -> dict[str, list[str]]:
    """The data set as columns: `question`, and `answer` as worked text that ends in `#### N`.

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": questions apart from both, with the
        column `completion` to imitate.
      seed: another one gives other problems.
      max_steps: problems have up to so many steps.
      largest: no number of the story and of the working is larger; 10 or more.

    Raises:
      ValueError: for another split.
    """
    options: Mapping[str, int] = {"seed": seed, "max_steps": max_steps, "largest": largest}
    seen = splits.held_out(NAME, split, functools.partial(rows, **options))
    rng = random.Random(3 * seed + splits.SEEDS[split])
    problems = []
    while len(problems) < NUM_ROWS[split]:
        problem = draw(rng, max_steps)
        if problem.largest <= largest and problem.question not in seen:
            seen.add(problem.question)
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
class Problem:
    """A word problem.

    Attributes:
      working: a sentence for each step, which has the calculation in it.
      numbers: the numbers of the story.
      results: the results of the steps; the last one is the answer.
    """

    question: str
    working: tuple[str, ...]
    numbers: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The largest number of the story and of the working."""
        return max(self.numbers + self.results)

    @property
    def answer(self) -> str:
        """The working, and the result after "####"."""
        return f"{' '.join(self.working)} #### {self.results[-1]}"

    def blurted(self, rng: random.Random) -> str:
        """A result without working, and mostly a wrong one.

        A wrong one stops a step too early, repeats a number of the story or slips a little. None
        follows a rule, such as the sum, that is right where another problem asks for it.
        """
        right = self.results[-1]
        if rng.random() < LUCKY_SHARE:
            return f"#### {right}"
        slip = right + rng.choice((-10, -2, -1, 1, 2, 10))
        wrong = sorted({*self.results, *self.numbers, slip} - {right})
        return f"#### {rng.choice([number for number in wrong if number > 0])}"


def draw(rng: random.Random, max_steps: int = 3) -> Problem:
    """A problem of one to three steps."""
    story = _Story(rng)
    rng.choice(_STORIES)(story, rng.randint(1, max_steps))
    return Problem(
        " ".join(story.sentences), tuple(story.working), tuple(story.numbers), tuple(story.results)
    )


class _Story:
    """A story while it is told. Phrasings may have {name}, {other}, {they} (she or he), {their}
    and every word drawn by `words`."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.sentences: list[str] = []
        self.working: list[str] = []
        self.numbers: list[int] = []
        self.results: list[int] = []
        pronoun = rng.choice(sorted(_NAMES))
        name = rng.choice(_NAMES[pronoun])
        others = sorted({n for names in _NAMES.values() for n in names} - {name})
        self._words = {
            "name": name,
            "other": rng.choice(others),
            "they": pronoun,
            "They": pronoun.capitalize(),
            "their": _POSSESSIVES[pronoun],
            "Their": _POSSESSIVES[pronoun].capitalize(),
        }

    def words(self, **choices) -> None:
        """Draws a word of each of the choices, for phrasings."""
        self._words |= {name: self.rng.choice(words) for name, words in choices.items()}

    def number(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def several(self, least: int, most: int) -> int:
        """Draws a factor, which phrasings have in words as {times}."""
        times = self.number(least, most)
        self.numbers.append(times)
        self._words["times"] = _TIMES[times]
        return times

    def say(self, *phrasings: str, **numbers: int) -> None:
        """Adds a sentence in one of the phrasings to the story."""
        self.sentences.append(self.rng.choice(phrasings).format(**self._words, **numbers))
        self.numbers += numbers.values()

    def work(self, first: int, sign: str, second: int, *phrasings: str) -> int:
        """Adds a step to the working, whose calculation is {work} in the phrasings."""
        result = {
            "+": first + second,
            "-": first - second,
            "*": first * second,
            "/": first // second,
        }[sign]
        assert result > 0
        assert sign != "/" or result * second == first
        work = f"{first} {sign} {second} = {result}"
        self.working.append(self.rng.choice(phrasings).format(**self._words, work=work))
        self.results.append(result)
        return result


def _collection(story: _Story, steps: int) -> None:
    """Someone has some things, and gains and loses some."""
    story.words(things=_NOUNS["things"])
    total = story.number(10, 40)
    story.say(
        "{name} has {a} {things}.",
        "There are {a} {things} in {name}'s collection.",
        "{name} starts the week with {a} {things}.",
        "In {their} drawer {name} keeps {a} {things}.",
        a=total,
    )
    for _ in range(steps):
        total = story.rng.choice((_gain, _lose, _multiply))(story, total)
    story.say(
        "How many {things} does {name} have now?",
        "How many {things} are there in the end?",
        "What is the number of {name}'s {things} after that?",
    )


def _gain(story: _Story, total: int) -> int:
    n = story.number(3, 20)
    story.say(
        "{They} finds {n} more.",
        "Then {other} gives {name} {n} {things}.",
        "At a flea market {they} buys {n} more of them.",
        "For {their} birthday {they} gets another {n}.",
        n=n,
    )
    return story.work(
        total, "+", n, "{name} then has {work}.", "With these it is {work}.", "That makes {work}."
    )


def _lose(story: _Story, total: int) -> int:
    if total < 6:
        return _gain(story, total)
    n = story.number(2, min(20, total - 2))
    story.say(
        "{They} loses {n} of them.",
        "Then {name} gives {n} to {other}.",
        "{They} sells {n} {things} at school.",
        "{n} of the {things} break.",
        n=n,
    )
    return story.work(
        total, "-", n, "There are {work} left.", "{name} keeps {work}.", "That leaves {work}."
    )


def _multiply(story: _Story, total: int) -> int:
    if total > 40:
        return _lose(story, total)
    times = story.several(2, 3)
    story.say(
        "A month later {they} has {times} as many.",
        "By summer {name} owns {times} that number of {things}.",
    )
    return story.work(total, "*", times, "Then it is {work}.", "{They} then has {work}.")


def _shopping(story: _Story, steps: int) -> None:
    """Someone buys some goods at a price each, and something else, and pays with a bill."""
    story.words(
        goods=_NOUNS["goods"], item=("a lamp", "a kettle", "a cushion", "a clock", "a poster")
    )
    n, price, extra = story.number(2, 9), story.number(2, 9), story.number(3, 18)
    story.say(
        "{name} buys {n} {goods} for {p} dollars each.",
        "{name} needs {n} {goods}, and each of them costs ${p}.",
        "At the market {goods} cost {p} dollars apiece. {name} takes {n} of them.",
        n=n,
        p=price,
    )
    total = story.work(
        n, "*", price, "The {goods} cost {work} dollars.", "For the {goods} {they} pays {work}."
    )
    if steps == 1:
        story.say("How many dollars does {they} spend?", "How much do the {goods} cost in dollars?")
        return
    bill = min(bill for bill in _BILLS if bill > total + extra)
    if steps == 3 or story.rng.random() < 0.5:
        story.say(
            "{They} also buys {item} for {e} dollars.",
            "{They} adds {item}, which costs ${e}.",
            e=extra,
        )
        total = story.work(
            total, "+", extra, "Together it is {work} dollars.", "With {item} it is {work}."
        )
        if steps == 2:
            story.say("How many dollars does {they} spend in all?", "What is the total in dollars?")
            return
    story.say(
        "{They} pays with a {b}-dollar bill.",
        "{They} hands the clerk ${b}.",
        "{name} had {b} dollars in {their} purse.",
        b=bill,
    )
    story.work(
        bill, "-", total, "{They} is left with {work} dollars.", "The rest is {work} dollars."
    )
    story.say("How many dollars are left?", "How much money does {name} have left after paying?")


def _earning(story: _Story, steps: int) -> None:
    """Someone works for some hours, is paid by the hour, and spends or adds to it."""
    story.words(job=_JOBS)
    hours, days = story.number(2, 5), story.number(2, 4)
    wage = story.number(3, 9)
    if steps == 3:
        story.say(
            "{name} spends {h} hours a day {job}, on {d} days of the week.",
            "On {d} days {name} earns money by {job}, {h} hours each day.",
            h=hours,
            d=days,
        )
        hours = story.work(
            hours, "*", days, "{name} works {work} hours.", "That is {work} hours of work."
        )
    else:
        hours = story.number(3, 9)
        story.say(
            "{name} spends {h} hours {job}.",
            "On Saturday {name} earns money by {job} for {h} hours.",
            h=hours,
        )
    story.say("{They} is paid {w} dollars an hour.", "Every hour brings {name} ${w}.", w=wage)
    total = story.work(
        hours, "*", wage, "The pay is {work} dollars.", "{They} earns {work} dollars."
    )
    if steps == 1:
        story.say("How many dollars does {name} earn?", "What is {their} pay in dollars?")
        return
    if story.rng.random() < 0.5:
        n = story.number(2, min(20, total - 1))
        story.say("{They} spends ${n} of it on a gift.", "Lunch costs {name} {n} dollars.", n=n)
        story.work(total, "-", n, "{They} keeps {work} dollars.", "What is left is {work} dollars.")
        story.say("How many dollars does {name} have left?", "How much of the money remains?")
    else:
        n = story.number(5, 30)
        story.say(
            "{They} had {n} dollars saved already.",
            "{Their} uncle adds a gift of ${n}.",
            n=n,
        )
        story.work(total, "+", n, "Now {they} has {work} dollars.", "In all it is {work} dollars.")
        story.say("How many dollars does {name} have now?", "How much money is it altogether?")


def _sharing(story: _Story, steps: int) -> None:
    """Someone has some containers of food, eats a part and shares the rest."""
    story.words(**{kind: _NOUNS[kind] for kind in ("foods", "holders", "group")})
    share, people = story.number(2, 9), story.number(2, 6)
    total = share * people
    divisors = [k for k in range(2, 10) if total % k == 0 and 2 <= total // k <= 12]
    if steps == 1:
        story.say(
            "{name} shares {t} {foods} equally among {p} {group}.",
            "{t} {foods} are handed out to {p} {group}, the same number to each.",
            t=total,
            p=people,
        )
        story.work(total, "/", people, "Each of them gets {work}.", "That is {work} {foods} each.")
        story.say("How many {foods} does each of them get?")
        return
    if steps == 3:
        eaten = story.number(2, 8)
        divisors = [k for k in range(2, 10) if (total + eaten) % k == 0]
        divisors = [k for k in divisors if 2 <= (total + eaten) // k <= 12]
    if not divisors:
        _sharing(story, steps)
        return
    boxes = story.rng.choice(divisors)
    each = (total + (eaten if steps == 3 else 0)) // boxes
    story.say(
        "{name} has {b} {holders} with {e} {foods} in each.",
        "{name} brings {b} {holders} of {foods}. Each holds {e}.",
        "There are {e} {foods} in each of {name}'s {b} {holders}.",
        b=boxes,
        e=each,
    )
    whole = story.work(
        boxes, "*", each, "There are {work} {foods}.", "In all it is {work} {foods}."
    )
    if steps == 3:
        story.say("{They} eats {n} of them.", "{n} of them are spoiled.", n=eaten)
        whole = story.work(whole, "-", eaten, "{work} are left.", "That leaves {work} {foods}.")
    story.say(
        "The rest goes to {p} {group} in equal parts."
        if steps == 3
        else "They all go to {p} {group} in equal parts.",
        "{They} shares what {they} has equally among {p} {group}.",
        p=people,
    )
    story.work(whole, "/", people, "Each of them gets {work}.", "That is {work} {foods} each.")
    story.say("How many {foods} does each of them get?", "What is the share of each?")


def _comparison(story: _Story, steps: int) -> None:
    """Someone has more, fewer or several times as many things as someone else."""
    story.words(things=_NOUNS["things"], verb=("has", "collects", "owns"))
    first = story.number(5, 25)
    story.say("{name} {verb} {a} {things}.", "{a} {things} belong to {name}.", a=first)
    if story.rng.random() < 0.5:
        times = story.several(2, 4)
        story.say("{other} {verb} {times} as many as {name}.")
        second = story.work(
            first, "*", times, "{other} has {work}.", "{other}'s {things} are {work}."
        )
    elif story.rng.random() < 0.5:
        n = story.number(2, 20)
        story.say("{other} {verb} {n} more than {name}.", n=n)
        second = story.work(first, "+", n, "{other} has {work}.", "{other}'s {things} are {work}.")
    else:
        n = story.number(2, first - 2)
        story.say("{other} {verb} {n} fewer than {name}.", n=n)
        second = story.work(first, "-", n, "{other} has {work}.", "{other}'s {things} are {work}.")
    if steps == 1:
        story.say("How many {things} does {other} have?")
        return
    total = story.work(first, "+", second, "Together they have {work}.", "The sum is {work}.")
    if steps == 3:
        n = story.number(2, min(12, total - 1))
        story.say("Together they give away {n} of them.", "Then they throw out {n} old ones.", n=n)
        story.work(total, "-", n, "{work} are left.", "Both keep {work}.")
        story.say("How many {things} do they have left together?")
    else:
        story.say(
            "How many {things} do they have together?", "How many is that for the two of them?"
        )


def _reading(story: _Story, steps: int) -> None:
    """Someone reads a book at so many pages a day."""
    pages, days = story.number(3, 12), story.number(2, 8)
    rate, more_days = story.number(2, 9), story.number(2, 6)
    story.say(
        "{name} reads {p} pages of a book a day for {d} days.",
        "For {d} days {name} reads {p} pages each evening.",
        "{name} has been reading for {d} days, {p} pages every day.",
        p=pages,
        d=days,
    )
    read = story.work(
        pages, "*", days, "{They} has read {work} pages.", "So far it is {work} pages."
    )
    if steps == 1:
        story.say("How many pages has {they} read?", "How many pages is that?")
        return
    left = rate * more_days
    story.say("The book has {t} pages.", "There are {t} pages in the book.", t=read + left)
    story.work(read + left, "-", read, "{work} pages are left.", "There remain {work} pages.")
    if steps == 2:
        story.say(
            "How many pages are left to read?", "How many pages does {name} still have to read?"
        )
        return
    story.say(
        "From now on {they} reads {r} pages a day.", "{They} will go on with {r} a day.", r=rate
    )
    story.work(left, "/", rate, "That takes {work} days.", "{They} needs {work} more days.")
    story.say("How many more days does {name} need?", "In how many days will the book be finished?")


def _seats(story: _Story, steps: int) -> None:
    """A hall has rows of seats, some are taken, and tickets have a price."""
    story.words(place=_PLACES)
    num_rows, each = story.number(3, 9), story.number(4, 10)
    story.say(
        "The hall where {name} works has {r} rows of {s} seats.",
        "{name} helps in {place} with {r} rows, {s} seats in each.",
        r=num_rows,
        s=each,
    )
    total = story.work(num_rows, "*", each, "There are {work} seats.", "It has {work} seats.")
    if steps == 1:
        story.say("How many seats are there?", "How many people can sit down?")
        return
    free = story.number(2, 9)
    story.say("{t} seats are taken.", "{t} people have sat down already.", t=total - free)
    left = story.work(total, "-", total - free, "{work} are free.", "{work} seats are empty.")
    if steps == 2:
        story.say("How many seats are free?", "How many seats are still empty?")
        return
    price = story.number(3, 9)
    story.say("A ticket costs {p} dollars.", "Tickets are sold at ${p} each.", p=price)
    story.work(left, "*", price, "They bring {work} dollars.", "That is {work} dollars.")
    story.say("How many dollars do tickets for the free seats bring?")


_STORIES = (_collection, _shopping, _earning, _sharing, _comparison, _reading, _seats)
