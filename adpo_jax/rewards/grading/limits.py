"""What an answer may be at most.

The numbers bound the work that one answer can cause. Text beyond its limits is unreadable unless it
is the reference itself. Numbers beyond theirs are not computed: they are compared in a canonical
form (see `canonical`), and what that cannot tell is unreadable as well.
"""

MAX_SEARCHED_CHARS = 262_144  # of a completion, counted from its end
MAX_ANSWER_CHARS = 600
MAX_TOKENS = 300
MAX_DEPTH = 40
MAX_DIGITS = 600  # of one number as written
MAX_BITS = 1_700  # of a numerator, a denominator, or the magnitude of a result
MAX_FACTORIAL = 60  # of a factorial that is written out
MAX_TABLED_FACTORIAL = 10_000  # of one that is compared modulo a prime
MAX_ITEMS = 100  # of a set, list or matrix
MAX_NGRAM_WORDS = 32_768  # of a completion, counted from its start, for the repetition penalty
