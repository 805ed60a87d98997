"""Words of sentences, and what they say of an answer that they stand beside."""

# A text of several words with one of these is a sentence, not a value.
_NO_READING_TEXT = """
    because since as so is are was were we he she they it this that the which where when thus
    therefore hence from if but then there here let get got now has had can may sum add use ans
"""
NO_READING = set(_NO_READING_TEXT.split())
# With one of these it says what the answer is not, or about what it is.
_NO_ANSWERS_TEXT = """
    not never neither nor cannot between than more less fewer least most nearly almost either
    maybe perhaps possibly except unless isn't wasn't doesn't don't approximately about wrong
    incorrect
"""
NO_ANSWERS = set(_NO_ANSWERS_TEXT.split())
# Beside one of these a number counts or names something, and is not the answer.
_NO_NUMBERS_TEXT = """
    or step part case question problem method example section chapter exercise note equation
    figure table attempt way ways false untrue mistaken percent hundred thousand million billion
    half third thirds quarter quarters dozen dozens squared cubed times point plus minus if but to
    degrees over under first second fourth fifth
"""
NO_NUMBERS = NO_ANSWERS | set(_NO_NUMBERS_TEXT.split())
# A claim that begins with one of these talks about the answer.
_COMMENTS_TEXT = """
    correct incorrect right wrong consistent inconsistent helpful reasonable unreasonable valid
    verified confirmed clear obvious same accurate logical plausible sensible sound good complete
    above below found shown here obtained derived calculated computed determined provided
    presented stated written boxed expressed based supported justified checked easy simple unique
    likely unlikely in on at as what when because of if whether this it there your my our you we
    they he she how why who which where marked wrapped enclosed placed highlighted required needed
    expected being been ready straightforward explained done useful clearly always often usually
    sometimes hard difficult tricky perfect fine okay ok sure yours ours mine such both close
    different incomplete missing underlined displayed listed known now then so and or but
"""
COMMENTS = set(_COMMENTS_TEXT.split())
# These are an answer by themselves.
_OUTRIGHT_TEXT = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand million half twice none nothing nobody undefined indeterminate impossible
    infinite infinity unknown yes no true false neither both never
"""
OUTRIGHT = set(_OUTRIGHT_TEXT.split())
