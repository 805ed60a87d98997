r"""What only dresses an answer: fonts, sizes, colours, layout, and marks around it.

`undress` takes it off: `{\large\textcolor{red}{=72,}}` becomes `72`. It also spells in one way what
LaTeX has several commands for. It is given no text longer than an answer may be.
"""

import re

from adpo_jax.rewards.grading.limits import MAX_DIGITS

_NO_LETTER = r"(?![A-Za-z])"
FONTS = """
    bf it rm sf tt sl sc em cal bfseries itshape slshape scshape upshape mdseries rmfamily sffamily
    ttfamily normalfont boldmath tiny scriptsize footnotesize small normalsize large Large LARGE
    huge Huge displaystyle textstyle scriptstyle scriptscriptstyle
"""
NOTHING = """
    centering noindent nonumber notag hline strut mathstrut allowbreak nobreak hfill hfil newline
    par protect relax null thinspace medspace thickspace negthinspace negmedspace enspace enskip
    space nobreakspace smallskip medskip bigskip unboldmath bigstrut
"""
_FONT = "|".join(FONTS.split())
_SWITCHES = re.compile(rf"\\(?:{_FONT}|{'|'.join(NOTHING.split())}){_NO_LETTER}")
_FONT_GROUP = re.compile(
    rf"\{{ {{0,4}}(?:\\(?:{_FONT}){_NO_LETTER} {{0,4}}){{1,4}}([^{{}}\\$]*)\}}"
)
# A command with an argument that says how it looks, before the one that is shown.
_COLOURS = re.compile(
    r"\\(?:textcolor|color|colorbox|fcolorbox {0,4}\{[^{}]{0,40}\}|style|class|cssId|href)"
    r" {0,4}(?:\[[A-Za-z]{1,10}\])? {0,4}\{[^{}]{0,80}\}|\\bbox {0,4}\[[^\]]{0,80}\]"
)
_UNSEEN = re.compile(
    r"\\(?:label|tag\*?|[hv]?phantom|[hv]space\*?|mspace) {0,4}\{[^{}]{0,40}\}"
    r"|\\(?:m?kern|[mhv]skip) {0,4}-?[0-9.]{1,8} {0,4}(?:pt|em|ex|mu|cm|mm|in)"
)
_BARE_WRAPPERS = re.compile(
    rf"\\(?:ensuremath|math(?:op|ord|inner|rel|bin|close|open|normal|up|bfit|bfup)"
    rf"|sym(?:bf|it|rm|up|normal)|smash|bbox|boxed|fbox"
    rf"|underbrace|overbrace){_NO_LETTER}"
    r" {0,4}(?=\{)"
)
_LIKE_BOLD = re.compile(
    r"\\(?:emph|uline|textsc|textsl|textmd|pmb|framebox|mathfrak|mathscr)(?= {0,4}\{)"
)
_TEXT_NAMES = r"(?:text[a-z]{0,6}|mbox|hbox|math(?:rm|bf|it|sf|tt)|bm|boldsymbol|bold|underline)"
_NESTED_TEXT = re.compile(
    rf"\\{_TEXT_NAMES} {{0,4}}\{{ {{0,4}}(\\{_TEXT_NAMES} {{0,4}}\{{[^{{}}]*\}}) {{0,4}}\}}"
)
_TEXT_WITH_COMMANDS = re.compile(rf"\\({_TEXT_NAMES}) {{0,4}}\{{([^{{}}]*[\\€£¢°][^{{}}]*)\}}")
_ESCAPED_IN_TEXT = re.compile(r"(\\[$%]|\\cdot(?![A-Za-z])|[€£¢°])")
_NUMBER_IN_TEXT = re.compile(r" {0,4}[0-9]{1,20}(?:[.,][0-9]{1,20}){0,8}(?![0-9])")
_SPACING_IN_TEXT = re.compile(rf"\\[,;:! ]|~|\\q?quad{_NO_LETTER}")
_UNITS = re.compile(r"\\(?:SI|qty) {0,4}\{([^{}\\]{1,40})\} {0,4}\{([^{}\\]{1,40})\}")
_NUM = re.compile(r"\\num {0,4}\{([^{}\\]{1,80})\}")
_ANGLE = re.compile(r"\\ang {0,4}\{([^{}\\]{1,40})\}")
SAME = {
    "slash": "/", "bullet": r"\cdot ", "cdotp": r"\cdot ", "centerdot": r"\cdot ",
    "textdegree": r"^\circ ", "textdollar": r"\$", "textpercent": r"\%", "pounds": r"\pound ",
    "textsterling": r"\pound ", "mathdollar": r"\$", "mathsterling": r"\pound ",
    "texteuro": r"\euro ", "EUR": r"\euro ", "R": r"\mathbb{R}",
    "Reals": r"\mathbb{R}", "reals": r"\mathbb{R}", "leqq": r"\le ", "geqq": r"\ge ",
    "vcentcolon": ":", "ratio": ":", "textpm": r"\pm ", "texttimes": r"\times ",
    "lang": "(", "rang": ")", "ldots": "...", "cdots": "...", "dotsc": "...", "dots": "...",
    "hdots": "...", "coloneqq": "=", "dotsb": "...", "textquotesingle": "'", "Bbb": r"\mathbb",
}  # fmt: skip
_SYNONYMS = re.compile(rf"\\({'|'.join(SAME)}){_NO_LETTER}")
_BARE_REALS = re.compile(r"\\mathbb {1,4}R(?![A-Za-z])|\\mathbb(?=R(?![A-Za-z]))R")
_COLON = re.compile(r"(?:\\text)? {0,4}\{ {0,4}: {0,4}\}")
_ORDINAL = re.compile(
    r"(?<=[0-9]) ?(?:\^ ?(?:\{ ?(?:(?:\\[a-z]{4,6} ?)?\{? ?(?:st|nd|rd|th) ?\}?) ?\}"
    r"|\\[a-z]{4,6} ?\{(?:st|nd|rd|th)\}))"
)
_TO = re.compile(r"(?<=[0-9}]) {0,4}- {0,4}to {0,4}- {0,4}(?=[0-9\\])|\\text\{ ?-to- ?\}")
_RUPEES = re.compile(r"\\text {0,4}\{ ?Rs\.? ?\}|Rs\.? ?(?=[0-9])")
_EMPTY_SCRIPT = re.compile(r"[\^_] {0,4}\{ {0,4}\}")
_NAMES = re.compile(r"\\([A-Za-z]+)")
_LOOKS = {
    *FONTS.split(), *NOTHING.split(), *SAME, "textcolor", "color", "colorbox", "fcolorbox", "style",
    "class", "cssId", "href", "bbox", "label", "tag", "phantom", "hphantom", "vphantom", "hspace",
    "vspace", "mspace", "kern", "mkern", "mskip", "hskip", "vskip", "ensuremath", "mathop",
    "mathord", "mathinner", "mathrel", "mathbin", "mathclose", "mathopen", "smash", "emph", "uline",
    "textsc", "textsl", "textmd", "pmb", "framebox", "SI", "qty", "num", "ang", "boxed", "fbox",
    "underbrace", "overbrace", "mathfrak", "mathscr", "mathnormal", "mathup", "mathbfit",
    "mathbfup", "symbf", "symit", "symrm", "symup", "symnormal",
}  # fmt: skip
_TEXTS = {
    "text", "textbf", "textit", "textrm", "textsf", "texttt", "textup", "textnormal", "mbox",
    "hbox", "mathrm", "mathbf", "mathit", "mathsf", "mathtt", "bm", "boldsymbol", "bold",
    "underline", *("emph", "uline", "textsc", "textsl", "textmd", "pmb", "framebox"),
}  # fmt: skip

# Environments that lay formulas out, and systems of equations.
_LAYOUT = (
    r"(?:aligned|alignedat|alignat|align|gathered|gather|split|equation|eqnarray|multlined|multline"
    r"|flalign|math|displaymath|center|dcases|rcases|cases|lcases)\*?"
)
_ENVIRONMENT = re.compile(rf"\\(begin|end) {{0,4}}\{{{_LAYOUT}\}}(?:\[[tbc]\]|\{{[0-9]\}})?")
_BRACED_SYSTEM = re.compile(
    r"\\left {0,4}(?:\\\{|\\lbrace) {0,4}\\begin\{(array|matrix|aligned|gathered|split|alignedat)\}"
    r"(?:\{[lcr| ]{0,12}\}|\{[0-9]\})?((?:(?!\\begin).){0,1000}?)\\end\{\1\}"
    r" {0,4}\\right {0,4}\."
)
_COLUMN = re.compile(
    r" {0,4}\\begin\{array\}\{[lcr| ]{1,12}\}((?:(?!\\begin).)*)\\end\{array\} {0,4}"
)
_ROW_GAP = re.compile(r"(\\\\) {0,4}\[ {0,4}-?[0-9.]{1,6} {0,4}[a-z]{2} {0,4}\]")
_PIECEWISE = re.compile(
    r"&(?! {0,8}(?:[=<>]|\\(?:le|ge|leq|geq|lt|gt|approx|ne|neq)(?![A-Za-z])|\\\\|$))"
)
_ALIGNED_RELATION = re.compile(r"& {0,4}([=<>]|\\(?:le|ge|leq|geq|approx)) {0,4}&")
_ROW_END = re.compile(
    r"\\\\ {0,4}(?:\[ {0,4}-?[0-9.]{1,6} {0,4}[a-z]{2} {0,4}\])?|\\cr(?![A-Za-z])"
)
_CONTINUES = re.compile(
    r" {0,8}(?:[=<>]|\\(?:le|ge|leq|geq|lt|gt|approx|equiv|ne|neq)(?![A-Za-z]))"
)

_BEFORE = re.compile(
    r"=>|=(?![=<>])|:(?!=)|\\[,;:! ]|~(?=~)| |\{\}|\\text\{ ?= ?\}"
    r"|\\text\{ ?[Aa]ns(?:wer)?[ .:=]{0,3}\}|[Aa]ns(?:wer)?\.? ?[:=]"
    r"|\\(?:therefore|implies|to|equiv|longrightarrow|[Rr]ightarrow|Longrightarrow|iff|so)"
    r"(?![A-Za-z])"
)
_AFTER = (
    "\\,", "\\;", "\\:", "\\!", "\\ ", "\\\\", "\\checkmark", "\\blacksquare", "\\square",
    "\\Box", "\\qed", "\\qedhere", "\\text{.}", "\\text{,}", "\\quad", "\\qquad", "{}",
    ",", ";", ":", " ", "~", "\\",
)  # fmt: skip
_EMPHASIS = ("**", "__", "``", "`", '"', "''", "*", "'")
_LINES = re.compile(r"[\t\n\r]")
_MATHS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")  # what opens and closes a formula
_UNICODE = str.maketrans({
    "∴": "\\therefore ", "⇒": "\\Rightarrow ", "⟹": "\\Rightarrow ", "→": "\\to ",
    "：": ":", "∶": ":", "，": ",",
    "；": ";", "。": ".", "（": "(", "）": ")", "＝": "=", "＋": "+", "－": "-", "［": "[",
    "］": "]",
    "＜": "<", "＞": ">", "＄": "$", "｜": "|", "∣": "|", "⟨": "(", "⟩": ")", "⌊": "\\lfloor ",
    "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "℃": "^\\circ C", "℉": "^\\circ F",
    "«": '"', "»": '"', "₹": "\\rupee ", "¥": "\\yen ",
    "“": '"', "”": '"', "‘": "'", "•": "\\cdot ", "∙": "\\cdot ", "…": "...", "⅕": "\\frac15 ",
    "⅖": "\\frac25 ", "⅗": "\\frac35 ", "⅘": "\\frac45 ", "⅙": "\\frac16 ", "⅚": "\\frac56 ",
    "⅛": "\\frac18 ", "⅜": "\\frac38 ", "⅝": "\\frac58 ", "⅞": "\\frac78 ", "∛": "\\cbrt ",
    "∖": "\\setminus ", "✓": "\\checkmark ", "✔": "\\checkmark ", "✅": "\\checkmark ",
    "■": "\\blacksquare ", "□": "\\square ", "∎": "\\blacksquare ", "\ufe0f": "", "∧": "\\land ",
    "∨": "\\lor ", "δ": "\\delta ", "ε": "\\epsilon ", "η": "\\eta ", "κ": "\\kappa ",
    "μ": "\\mu ", "ν": "\\nu ", "ξ": "\\xi ", "ρ": "\\rho ", "σ": "\\sigma ", "τ": "\\tau ",
    "χ": "\\chi ", "ψ": "\\psi ", "ω": "\\omega ", "Δ": "\\Delta ", "Σ": "\\Sigma ",
    "Φ": "\\Phi ", "Ω": "\\Omega ", "ℓ": "\\ell ",
})  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]{1,40}")
_LOWERED = re.compile(r"[₀-₉]{1,40}")

# Repeating decimals: the lexer knows 0.1\overline{6}.
_OVERSET_DOT = re.compile(
    r"\\(?:overset|stackrel) ?\{ ?(?:\.|\\cdot|\\bullet) ?\} ?(?:\{ ?([0-9]) ?\}|([0-9]))"
)
_OVERLINED = re.compile(r"(?:[0-9][\u0304\u0305]){1,60}")
_BRACED_CYCLE = re.compile(
    r"\{ ?(\\(?:dot|overline|bar|widehat) ?(?:\{ ?[0-9]{1,60} ?\}|[0-9])) ?\}"
)
_BAR = re.compile(
    r"(\.[0-9]{0,60}) ?\\(?:overline|bar|widebar|widehat|overparen|overbracket|mathring)"
    r" ?(?:\{ ?([0-9]{1,60}) ?\}|([0-9]))"
    r"(?: ?\.\.\.)?"
)
_DOT = r"\\dot ?(?:\{ ?([0-9]) ?\}|([0-9]))"
_DOTS_ABOVE = re.compile(rf"(\.[0-9]{{0,60}}) ?{_DOT}(?: ?([0-9]{{0,60}}) ?{_DOT})?")
_CYCLE_IN_BRACKETS = re.compile(
    r"(?<![0-9A-Za-z.])([0-9]{0,60}\.[0-9]{0,60})\(([0-9]{1,60})\)(?![0-9^(!.A-Za-z])"
)
_GOING_ON = re.compile(r"(?<![0-9.])([0-9]{0,60}\.)([0-9]{3,60}) ?\.\.\.")


def undress(text: str) -> str:
    """An answer without what dresses it."""
    text = _LINES.sub(" ", text)
    if not text.isascii():
        text = text.translate(_UNICODE)
        text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = _LOWERED.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
        text = _OVERLINED.sub(lambda m: "\\overline{" + m[0][::2] + "}", text)
        text = re.sub("([0-9])\u0307", r"\\dot{\1}", text)
    text = _MATHS.sub(" ", text)
    if "\\" in text:
        text = _without_commands(text)
    if "{" in text:
        text = _EMPTY_SCRIPT.sub("", _COLON.sub(":", text))
        text = _ORDINAL.sub("", text)
    if ":=" in text:
        text = text.replace(":=", "=")
    if "Rs" in text:
        text = _RUPEES.sub(r"\\rupee ", text)
    if "to" in text:
        text = _TO.sub(" to ", text)
    text = _without_marks(text)
    if "." in text:
        text = _with_one_spelling_of_cycles(text)
    return text


def _without_commands(text: str) -> str:
    names = set(_NAMES.findall(text))
    if "begin" in names:
        text = _BRACED_SYSTEM.sub(r"\\begin{cases}\2\\end{cases}", text)
    if not names.isdisjoint(_LOOKS):
        text = _COLOURS.sub(" ", text)
        text = _UNSEEN.sub(" ", text)
        text = _FONT_GROUP.sub(_font_group, text)
        text = _SWITCHES.sub(" ", text)
        text = _BARE_WRAPPERS.sub("", text)
        text = _LIKE_BOLD.sub(r"\\textbf", text)
        text = _SYNONYMS.sub(lambda m: SAME[m[1]], text)
        text = _UNITS.sub(r"\1\\text{ \2}", text)
        text = _NUM.sub(r"\1", text)
        text = _ANGLE.sub(r"\1^\\circ ", text)
    if "mathbb" in names:
        text = _BARE_REALS.sub(r"\\mathbb{R}", text)
    if not names.isdisjoint(_TEXTS):
        for _ in range(3):
            shorter = _NESTED_TEXT.sub(r"\1", text)
            if shorter == text:
                break
            text = shorter
        text = _TEXT_WITH_COMMANDS.sub(_plain_text, text)
    return _without_layout(text) if "begin" in names else text


def _font_group(match: re.Match) -> str:
    content = match[1].strip()
    return f"\\mathrm{{{content}}}" if content.isalpha() else f"{{{content}}}"


def _plain_text(match: re.Match) -> str:
    r"""`\text{\$5}` as `\$\text{5}`: what is escaped in a text stands beside it."""
    command, content = match[1], _SPACING_IN_TEXT.sub(" ", match[2])
    content = content.replace("\\&", "&").replace("\\#", "#").replace("\\_", "_")
    command = "text" if "\\cdot" in content else command
    beside = ""
    for part in _ESCAPED_IN_TEXT.split(content):
        if part[:1] in "\\€£¢°":
            beside += part
            continue
        number = _NUMBER_IN_TEXT.match(part) if beside.endswith(("$", "€", "£")) else None
        beside += number[0] if number else ""
        part = part[number.end() :] if number else part
        beside += f"\\{command}{{{part}}}" if part.strip() else part
    return beside


def _without_layout(text: str) -> str:
    r"""Rows of `aligned` and `cases` as a list, rows that begin with a relation as its chain."""
    column = _COLUMN.fullmatch(text)
    if column:
        body = _ALIGNED_RELATION.sub(r"\1", column[1])
        if not _PIECEWISE.search(body) and ("=" in body or not _ROW_END.search(body)):
            text = f"\\begin{{cases}}{body}\\end{{cases}}"
    if not _ENVIRONMENT.search(text):
        return _ROW_GAP.sub(r"\1", text)
    rest = _ENVIRONMENT.sub(" ", text)
    if "\\begin" in rest or ("cases" in text and _PIECEWISE.search(rest)):
        return rest if "cases" not in text else text  # a matrix, or a function defined piecewise
    rows = [row.replace("\\&", "\0").replace("&", " ").replace("\0", "\\&").strip(" ,;")
            for row in _ROW_END.split(rest)]  # fmt: skip
    joined = ""
    for row in rows:
        if row:
            joined += row if not joined else (" " if _CONTINUES.match(row) else ", ") + row
    return joined


def _without_marks(text: str) -> str:
    """Without the marks before and after an answer, and without braces around all of it."""
    for _ in range(16):
        before = text
        text = text.strip()
        match = _BEFORE.match(text)
        if match:
            text = text[match.end() :]
        if text.endswith(_AFTER):
            text = text[: -next(len(mark) for mark in _AFTER if text.endswith(mark))]
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        if text[:1] == "{" and _is_one_group(text) and not set(text) & set(",;"):
            text = text[1:-1]
        if text.startswith(_EMPHASIS):
            mark = next(m for m in _EMPHASIS if text.startswith(m))
            inner = text[len(mark) : -len(mark)]
            if inner and text.endswith(mark) and mark not in inner:
                text = inner
        if text == before:
            break
    return text


def _is_one_group(text: str) -> bool:
    depth = 0
    for at, c in enumerate(text):
        if c in "{}" and text[at - 1 : at] != "\\":
            depth += 1 if c == "{" else -1
            if depth == 0:
                return at == len(text) - 1
    return False


def _with_one_spelling_of_cycles(text: str) -> str:
    if "\\" in text:
        text = _OVERSET_DOT.sub(r"\\dot{\1\2}", text)
        text = _BRACED_CYCLE.sub(r"\1", text)
        text = _BAR.sub(lambda m: f"{m[1]}\\overline{{{m[2] or m[3]}}}", text)
        text = _DOTS_ABOVE.sub(
            lambda m: f"{m[1]}\\overline{{{''.join(p or '' for p in m.groups()[1:])}}}", text
        )
    if "(" in text:
        text = _CYCLE_IN_BRACKETS.sub(r"\1\\overline{\2}", text)
    if "..." in text:
        text = _GOING_ON.sub(_cycle_that_goes_on, text)
    return text


def _cycle_that_goes_on(match: re.Match) -> str:
    """0.1666... with its cycle marked, where its digits show one: thrice one, or twice several."""
    digits = match[2]
    for length in range(1, min(len(digits), MAX_DIGITS) // 2 + 1):
        times = 3 if length == 1 else 2
        cycle = digits[-length:]
        if digits.endswith(cycle * times):
            start = digits
            while start.endswith(cycle):
                start = start[:-length]
            return f"{match[1]}{start}\\overline{{{cycle}}}"
    return match[0]
