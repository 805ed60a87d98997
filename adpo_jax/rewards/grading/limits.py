"""What an answer may be at most. Beyond any of these it is wrong, before anything is computed.

The numbers bound the work that one answer can cause; no answer of GSM8K or MATH comes near them.
"""

MAX_SEARCHED_CHARS = 262_144  # of a completion, counted from its end
MAX_ANSWER_CHARS = 600
MAX_TOKENS = 300
MAX_DEPTH = 40
MAX_DIGITS = 60  # of one number as written
MAX_BITS = 1_700  # of a numerator, a denominator, or the magnitude of a result
MAX_FACTORIAL = 60
MAX_ITEMS = 100  # of a set, list or matrix
MAX_NGRAM_WORDS = 32_768  # of a completion, counted from its start, for the repetition penalty
