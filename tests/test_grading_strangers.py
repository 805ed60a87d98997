r"""Answers as strangers wrote them: dress and notation inside a box, big numbers, false positives.

A row is an answer and its reference, with `##` between.
"""

import contextlib
import importlib.util
import json
import logging
import random
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest
from hanging import soon

from adpo_jax.rewards import RewardFunction, RewardModel, good_accuracy
from adpo_jax.rewards.grading import canonical, faults
from adpo_jax.rewards.grading import compare as comparing
from adpo_jax.rewards.grading.ball import Undefined
from adpo_jax.rewards.grading.compare import compare
from adpo_jax.rewards.grading.evaluate import evaluate, value_or_none
from adpo_jax.rewards.grading.functions import FUNCTION_WORDS
from adpo_jax.rewards.grading.lexer import Unreadable, normalise, tokenize
from adpo_jax.rewards.grading.parse import parse
from adpo_jax.rewards.grading.vocabulary import vocabulary
from adpo_jax.rollouts.sampler import reward_metrics

ROOT = Path(__file__).resolve().parents[1]
STRANGERS = ROOT.parent / "shared" / "data" / "strangers" / "answers.jsonl"

RIGHT = {
    "names of what is asked for": r"""
        f^{-1}(x) = 2x ## 2x
        f(g(3)) = 3 ## 3
        g''(2) = 3 ## 3
        \bar{x} = 3 ## 3
        \overline{AB} = 3 ## 3
        P(X=2) = \frac16 ## \frac16
        P(X \le 2) = \frac16 = 1/6 ## \frac16
        P(A \mid B) = \frac16 ## \frac16
        P(\text{red}) = \frac16 ## \frac16
        \mathbb{P}(A) = \frac16 ## \frac16
        E[X] = 3 ## 3
        \mathbb{E}[X] = 3 ## 3
        \text{Var}(X) = 3 ## 3
        \det A = 3 ## 3
        \left[ABC\right] = 3 ## 3
        |A\cup B| = 3 ## 3
        n(A\cup B) = 3 ## 3
        \|v\| = 3 ## 3
        \varphi(12) = 4 ## 4
        \sin\theta = \frac12 ## \frac12
        \cos(x) = \frac12 ## 0.5
        x+y = 3 ## 3
        a + b + c = 3 ## 3
        AB+BC = 3 ## 3
        xy = 3 ## 3
        \frac{a}{b} = 3 ## 3
        P(X=2) = 25\% ## 25
    """,
    "sets of reals": r"""
        \{x \in \mathbb{R} \mid x > 2\} ## (2,\infty)
        \{ x \in \mathbb{R} : -1 < x < 1 \} ## (-1,1)
        \{x \in \mathbb{R} \mid x \neq 2\} ## \{x \mid x \neq 2\}
    """,
    "words that only count": r"""
        3\text{ fifth graders} ## 3
        5\text{ quarters} ## 5
        5\text{ factors} ## 5
        5\text{ V} ## 5
        5\text{ K} ## 5
        5\text{ C} ## 5
        5\text{m} ## 5
        5\text{ a day} ## 5
    """,
    "money and words": r"""
        \$5 \text{ per hour} ## 5
        \$5 \text{ per hour} ## \$5
        \$5 ## \$5 \text{ per hour}
        \$5/\text{hour} ## \$5
        \$5 / \text{hour} ## 5
        \$5/\text{hour} ## \$5 \text{ per hour}
        $5/hour ## 5
        $5/hour ## \$5
        $5 per hour ## \$5
        5 dollars per hour ## \$5
        \$5 \text{ each} ## \$5
        \$5 \text{ profit} ## 5
        \$5 \text{ a day} ## 5
        \text{\$5 per hour} ## \$5
        \text{\$1,500.50 left} ## 1500.5
        5€/h ## €5
    """,
    "degrees and temperatures": r"""
        60^{\circ}\mathrm{C} ## 60
        60^{\circ}\mathrm{C} ## 60^\circ\text{C}
        60^{\circ}\mathrm{C} ## 60^\circ C
        60^{\circ} C ## 60^{\circ} \mathrm{C}
        -60^{\circ}\mathrm{F} ## -60
        60\text{ °C} ## 60^\circ C
        60^\circ\text{ Celsius} ## 60^\circ C
        60\text{ degrees Celsius} ## 60°C
        x = 30^\circ ## 30
        x = 30^{\circ} ## 30^\circ
        x = 30^\circ ## \frac{\pi}{6}
        x = 30 ## x = 30^\circ
        30^\circ, 60^\circ ## 30,60
        30^\circ \text{ and } 60^\circ ## 30,60
        30,60 ## 30^\circ,60^\circ
        30^\circ, 60^\circ ## \frac{\pi}{6},\frac{\pi}{3}
        x = 30^\circ, 150^\circ ## 30^\circ,150^\circ
    """,
    "percents and units of each": r"""
        x = 25\% ## 25
        x = 25\% ## 0.25
        x = 0.25 ## 25\%
        25\% ## x=25\%
        25\%, 75\% ## 25,75
        25\%, 75\% ## 0.25,0.75
        10\text{ cm}, 20\text{ cm} ## 10,20
        20\text{ cm} \text{ and } 10\text{ cm} ## 10,20
        -25\% ## -0.25
        x = -30^\circ ## -30
        x = 10\text{ cm}, y = 20\text{ cm} ## (10,20)
    """,
    "units of two parts": r"""
        60\frac{\text{mi}}{\text{h}} ## 60
        60 \tfrac{\text{miles}}{\text{hour}} ## 60\text{ mph}
        60\ \frac{\text{m}}{\text{s}^2} ## 60\text{ m/s}^2
        12\,\frac{\mathrm{m}}{\mathrm{s}} ## 12
        12\frac{\mathrm{m}}{\mathrm{s}^2} ## 12\text{ m/s}^2
        \frac{\mathrm{m}}{\mathrm{s}} ## m/s
        60\,\mathrm{N\cdot m} ## 60
        60\,\mathrm{N\cdot m} ## 60\,\text{N}\cdot\text{m}
        60\ \Omega ## 60
        3\,\Omega ## 3\Omega
        R=3\Omega ## 3\,\Omega
        2\Omega ## 2
        0.1\text{ M} ## 0.1
        0.10\text{ M} ## 0.1\text{ M}
        2.0\text{ t} ## 2\text{ t}
        5\text{ d} ## 5
        60\ \Omega ## 60 ohms
        1 hour and 15 minutes ## 1 hour 15 minutes
        1\text{ hour and }15\text{ minutes} ## 1 hour 15 minutes
    """,
    "products of letters": r"""
        yx ## xy
        ba ## ab
        DB ## BD
        CBA ## ABC
        CAB ## BAC
        AC ## CA
        QP ## PQ
        DC ## CD
        TR ## RT
        WLH ## LWH
        zyx ## xyz
        bac ## abc
        kab ## abk
        B \cdot A ## AB
        B\,A ## AB
        abc ## ABC
        \text{Cat} ## cat
        2 ## 3 - 1
        3-1 ## 2
        5-10\text{ apples} ## 5-10
        (5 - 10) ## 5-10
        5–10 ## 5-10
        2024-3-4 ## 2024-03-04
        1,000-2,000 ## 1000-2000
        \$1{,}000-\$2{,}000 ## 1000-2000
        5-10\text{ m}^2 ## 5-10
        5.0-10.0 ## 5-10
    """,
    "fonts and colours": r"""
    \large 13 ## 13
    {\small\frac12} ## \frac12
    \bf 13 ## 13
    {\bf 13} ## 13
    {\bf x} ## x
    \boldmath 13 ## 13
    \Huge\textbf{13} ## 13
    \textcolor{red}{13} ## 13
    \color{blue}{13} ## 13
    \color{blue}13 ## 13
    {\color{red} 13} ## 13
    \textcolor{red}{\frac{1}{2}} ## \frac12
    \textcolor[rgb]{1,0,0}{13} ## 13
    \colorbox{yellow}{$13$} ## 13
    \fcolorbox{red}{white}{13} ## 13
    \bbox[5px,border:2px solid red]{72} ## 72
    """,
    "marks around it": r"""
    72, ## 72
    72; ## 72
    72. ## 72
    72 , ## 72
    72\\ ## 72
    72\, ## 72
    72\quad ## 72
    72 \checkmark ## 72
    72 \quad\blacksquare ## 72
    72 ✅ ## 72
    =72 ## 72
    = 72 ## 72
    \;=\;72 ## 72
    \therefore 72 ## 72
    ∴ 72 ## 72
    \Rightarrow 72 ## 72
    \implies x = 72 ## 72
    \therefore x=72 ## 72
    : 72 ## 72
    """,
    "layout": r"""
    \begin{aligned}72\end{aligned} ## 72
    \begin{aligned}x&=72\end{aligned} ## 72
    \begin{align*}&=72\end{align*} ## 72
    \begin{aligned}x&=70+2\\&=72\end{aligned} ## 72
    \begin{gathered}72\end{gathered} ## 72
    \begin{split}72\end{split} ## 72
    \begin{equation*}72\end{equation*} ## 72
    \begin{aligned}x&=1\\y&=2\end{aligned} ## (1,2)
    \begin{array}{l}x=1\\y=2\end{array} ## (1,2)
    \begin{array}{c}72\end{array} ## 72
    """,
    "texts": r"""
    \text{\$}72 ## 72
    \text{\$72} ## 72
    \text{\$}72 ## \$72
    \text{US\$}72 ## 72
    \text{\$ }72 ## 72
    72\text{\%} ## 72\%
    \text{72\%} ## 72\%
    \mathrm{\$}72 ## 72
    \text{B, C} ## B,C
    \text{B and C} ## B,C
    \text{B,C} ## B, C
    \text{(B), (C)} ## B,C
    \text{C, B} ## B,C
    \text{A, B, and C} ## A,B,C
    \textbf{B, C} ## B,C
    \mathrm{B, C} ## B,C
    \text{B}, \text{C} ## B,C
    (B), (C) ## B,C
    \text{Tom, Ann and Bob} ## Ann, Bob, Tom
    \text{B; C} ## B,C
    \text{B \& C} ## B,C
    """,
    "determinants": r"""
    \begin{vmatrix}1&2\\3&4\end{vmatrix} ## -2
    3\begin{vmatrix}1&2\\3&4\end{vmatrix} ## -6
    -\begin{vmatrix}1&2\\3&4\\\end{vmatrix} ## 2
    \begin{vmatrix}1&2\\3&4\end{vmatrix} = -2 ## -2
    \begin{vmatrix}7\end{vmatrix} ## 7
    \begin{vmatrix}1&2&0\\0&2&0\\5&0&3\end{vmatrix} ## 6
    \begin{vmatrix}1&2&3&4\\2&1&0&1\\0&3&1&2\\5&1&1&0\end{vmatrix} ## -45
    \begin{vmatrix}\frac12&\sqrt2\\\sqrt2&2\end{vmatrix} ## -1
    \begin{vmatrix}a&b\\c&d\end{vmatrix} ## ad-bc
    -2 ## \begin{vmatrix}1&2\\3&4\end{vmatrix}
    \begin{vmatrix}1 & 2&3\\3&4&5\end{vmatrix} ## \begin{vmatrix}1&2&3\\3&4&5\end{vmatrix}
    """,
    "emphasis and boxes": r"""
    \textbf{\text{13}} ## 13
    \mathnormal{13} ## 13
    \mathnormal{x} ## x
    \mathup{13} ## 13
    \symbf{13} ## 13
    \mathdollar 72 ## 72
    \mathdollar72 ## \$72
    \mathsterling 72 ## 72
    \text{\textbf{13}} ## 13
    \emph{13} ## 13
    \emph{Monday} ## Monday
    \textcolor{red}{\text{Monday}} ## Monday
    \ensuremath{72} ## 72
    \mathbf{72} ## 72
    \pmb{72} ## 72
    **72** ## 72
    *72* ## 72
    `72` ## 72
    "72" ## 72
    “72” ## 72
    \underline{72} ## 72
    \underline{\underline{72}} ## 72
    \boxed{\frac12} ## 0.5
    \fbox{$\frac12$} ## 0.5
    72 \tag{1} ## 72
    72 \label{eq} ## 72
    \phantom{0}72 ## 72
    \hspace{1cm}72 ## 72
    72\ \mathrm{cm} ## 72
    72\,{\rm cm} ## 72
    72~\text{cm} ## 72
    72\text{\,cm} ## 72\text{ cm}
    72 (\text{dollars}) ## 72
    72 (dollars) ## 72
    72\text{ (dollars)} ## 72
    (72) ## 72
    \SI{72}{cm} ## 72
    \num{1234} ## 1234
    \ang{60} ## 60^\circ
    \displaystyle 72 ## 72
    \scriptstyle 72 ## 72
    $=72$ ## 72
    \(72\) ## 72
    \[72\] ## 72
    $$72$$ ## 72
    \text{Answer: }72 ## 72
    \text{The answer is }72 ## 72
    x = 72. ## 72
    \mathbf{x = 72} ## 72
    \text{x = 72} ## 72
    """,
    "ratios": r"""
    4:6 ## 2:3
    2:3 ## 4:6
    2 : 3 ## 4:6
    2{:}3 ## 2:3
    2\text{ to }3 ## 2:3
    2 to 3 ## 2:3
    4\text{ to }6 ## 2:3
    2:4:6 ## 1:2:3
    \frac12:\frac13 ## 3:2
    0.5:1 ## 1:2
    2\colon 3 ## 2:3
    2\mathbin{:}3 ## 2:3
    2\text{:}3 ## 2:3
    2x:3x ## 2:3
    \sqrt2:2 ## 1:\sqrt2
    -2:-3 ## 2:3
    """,
    "repeating decimals": r"""
    0.\dot{3} ## \frac13
    0.\dot3 ## \frac13
    0.1\dot{6} ## \frac16
    0.\dot{1}4285\dot{7} ## \frac17
    0.\dot{1}\dot{8} ## \frac{2}{11}
    0.\overline{3} ## \frac13
    0.\overline 3 ## \frac13
    0.{\overline{3}} ## \frac13
    0.(3) ## \frac13
    0.1(6) ## \frac16
    0.333... ## \frac13
    0.333\ldots ## \frac13
    0.1666\dots ## \frac16
    0.142857142857... ## \frac17
    0.3̅ ## \frac13
    0.3̇ ## \frac13
    2.\overline{45} ## \frac{27}{11}
    -0.\dot{3} ## -\frac13
    """,
    "matrices": r"""
    \frac12\begin{pmatrix}2&4\\6&8\end{pmatrix} ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
    2\begin{pmatrix}1\\2\end{pmatrix} ## \begin{pmatrix}2\\4\end{pmatrix}
    \begin{pmatrix}1&2\\3&4\end{pmatrix}\cdot 2 ## \begin{bmatrix}2&4\\6&8\end{bmatrix}
    -\begin{pmatrix}1\\2\end{pmatrix} ## \begin{pmatrix}-1\\-2\end{pmatrix}
    \frac12\left(\begin{array}{cc}2&4\\6&8\end{array}\right) ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
    \dfrac{\begin{pmatrix}2\\4\end{pmatrix}}{2} ## \begin{pmatrix}1\\2\end{pmatrix}
    \begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}3&4\end{pmatrix} ## \begin{matrix}4&6\end{matrix}
    \begin{pmatrix}1&2\\3&4\end{pmatrix} ## \frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}
    k\begin{pmatrix}1\\2\end{pmatrix} ## \begin{pmatrix}k\\2k\end{pmatrix}
    \frac12(2,4) ## (1,2)
    2\langle 1,2\rangle ## \langle 2,4\rangle
    \begin{pmatrix}1&2\end{pmatrix}^T ## \begin{pmatrix}1\\2\end{pmatrix}
    \begin{bmatrix}1\\[2ex]2\end{bmatrix} ## \begin{pmatrix}1\\2\end{pmatrix}
    """,
    "systems": r"""
    \begin{cases}x=1\\y=2\end{cases} ## (1,2)
    \begin{cases}y=2\\x=1\end{cases} ## (1,2)
    \begin{cases}x=1,\\y=2\end{cases} ## (1,2)
    \begin{cases}x&=1\\y&=2\end{cases} ## (1,2)
    \begin{cases} x = 1 \\ y = 2 \\ z = 3 \end{cases} ## (1,2,3)
    \left\{\begin{array}{l}x=1\\y=2\end{array}\right. ## (1,2)
    \left\{\begin{aligned}x&=1\\y&=2\end{aligned}\right. ## (1,2)
    \begin{cases}x=1\\y=2\end{cases} ## x=1, y=2
    (1,2) ## x=1, y=2
    (x,y)=(1,2) ## (1,2)
    \{x=1, y=2\} ## (1,2)
    \begin{cases}x=1\\x=2\end{cases} ## 1,2
    \begin{cases} x & x>0 \\ -x & x\le 0 \end{cases} ## \begin{cases}x&x>0\\-x&x\le0\end{cases}
    """,
    "times of day": r"""
    3:30 \text{ p.m.} ## 3:30 PM
    3:30\text{ PM} ## 3:30 p.m.
    \text{3:30 PM} ## 3:30 \text{ p.m.}
    3:30pm ## 3:30 PM
    3:30 ## 3:30 PM
    15:30 ## 3:30 PM
    3:30 \text{ p.m.} ## 3:30
    3:30\,\mathrm{p.m.} ## 3:30 p.m.
    3\text{ p.m.} ## 3:00 PM
    \text{noon} ## 12 PM
    3{:}30\text{ PM} ## 3:30 PM
    """,
    "other notation": r"""
    ]0,1[ ## (0,1)
    [0,1[ ## [0,1)
    \left]0;1\right] ## (0,1]
    1\over 2 ## \frac12
    {1\over 2} ## \frac12
    10^{23} ## 10²³
    x₁ ## x_1
    """,
    "functions": r"""
    \tg 45^\circ ## 1
    \operatorname{ctg}\frac{\pi}{4} ## 1
    \text{lcm}(4,6) ## 12
    2\operatorname{cis}60^\circ ## 1+i\sqrt3
    2\text{cis}\,60^\circ ## 1+i\sqrt3
    \operatorname{cis}\pi ## -1
    \cis\frac{\pi}{2} ## i
    2\,\mathrm{cis}(60^\circ) ## 1+i\sqrt3
    \operatorname{sech} 0 ## 1
    \operatorname{coth} 1 ## \frac{1}{\tanh 1}
    \max\{1,2\} ## 2
    """,
    "percents and words": r"""
    5\text{ per cent} ## 5\%
    5 per cent ## 5\%
    20\%\text{ increase} ## 20\%
    20\text{ percent of students} ## 20\%
    \text{all real numbers} ## \mathbb{R}
    \mathbb R ## (-\infty,\infty)
    \R ## \mathbb{R}
    """,
    "what says something": r"""
    1=1 ## 1=1
    3+4=7 ## 7
    \frac12=0.5 ## 0.5
    0.5=\frac12 ## \frac12
    x=5=5 ## 5
    100\% ## 1
    \lvert x\rvert ## |x|
    \{1,2\} ## \{2,1\}
    5\;\text{and}\;6 ## 5,6
    2\cdot 3^{\textstyle 2} ## 18
    48 + 24 = 72 ## 72
    72^{} ## 72
    72_{} ## 72
    72\text{.} ## 72
    \text{ 72 } ## 72
    \mathrm{72\ cm} ## 72
    \text{72\ cm} ## 72
    \mathrm{C} ## C
    \textbf{(C)} ## C
    \text{(C) } 15 ## C
    \underline{\text{C}} ## C
    \textcolor{blue}{C} ## C
    {\bf C} ## C
    {\rm C} ## C
    \boxed{C} ## C
    C, ## C
    C. ## C
    =C ## C
    """,
    "siblings of all kinds": r"""
    1000^{1000} ## 10^{3000}
    \frac{n!}{(n-2)!} ## n(n-1)
    \mathbf{\frac{1}{2}} ## 1/2
    \mathit{13} ## 13
    \mathrm{13} ## 13
    \mathfrak{13} ## 13
    13\! ## 13
    \,13\, ## 13
    \quad 13 \quad ## 13
    \begin{align}x=13\end{align} ## 13
    \begin{matrix}13\end{matrix} ## 13
    13\$ ## 13
    13\ \$ ## 13
    \text{€}13 ## 13
    \text{£13} ## 13
    \text{USD }13 ## 13
    \textsf{13} ## 13
    \texttt{13} ## 13
    \Large{13} ## 13
    \left.13\right. ## 13
    \text{Ans: }13 ## 13
    \text{Ans. }13 ## 13
    \text{Ans} = 13 ## 13
    \text{Answer} = 13 ## 13
    \text{Final answer: }13 ## 13
    → 13 ## 13
    \to 13 ## 13
    \longrightarrow 13 ## 13
    \color{#FF0000}{13} ## 13
    \mathscr{C} ## C
    \text{B.} ## B
    \text{B)} ## B
    \text{Option B} ## B
    \text{I and III} ## I, III
    I \text{ and } III ## \text{I, III}
    \text{I, III} ## I and III
    \text{B, D and E} ## B,D,E
    \mathrm{B},\mathrm{C} ## B,C
    \textbf{B}, \textbf{C} ## B,C
    BC ## BC
    \textbf{(B)}, \textbf{(C)} ## B,C
    0.\overset{.}{3} ## \frac13
    0.\overset{\cdot}{3} ## \frac13
    0.\widehat{3} ## \frac13
    0.\overline{12} ## \frac{4}{33}
    3.\dot{3} ## \frac{10}{3}
    1, 2, \ldots, 10 ## 1,2,\dots,10
    \sqrt2\begin{pmatrix}1\\\sqrt2\end{pmatrix} ## \begin{pmatrix}\sqrt2\\2\end{pmatrix}
    \frac15\left[\begin{array}{cc}5&10\\0&5\end{array}\right] ## \begin{matrix}1&2\\0&1\end{matrix}
    \begin{cases}x=1\\y=2\end{cases} ## \{(1,2)\}
    \begin{cases}x=1\\y=2\end{cases} ## (x,y)=(1,2)
    \begin{cases} x = 1 \\[4pt] y = 2 \end{cases} ## (1,2)
    \begin{cases}a=\frac12\\b=-3\end{cases} ## a=\frac12, b=-3
    03:30 PM ## 3:30 PM
    3.30 pm ## 3:30 PM
    3:30 P.M. ## 3:30 PM
    3:30\ \text{PM} ## 3:30 PM
    \text{3:30 in the afternoon} ## 3:30 PM
    3:30 \text{ am} ## 3:30 a.m.
    12:00 \text{ p.m.} ## noon
    72\;\text{cm}^2 ## 72
    13^{\text{th}} ## 13
    13\text{th} ## 13
    \text{72 cm} ## 72
    x=72\text{ cm} ## 72
    \underbrace{72} ## 72
    \overbrace{72} ## 72
    \mathop{72} ## 72
    \hbox{72} ## 72
    \textup{72} ## 72
    \textnormal{72} ## 72
    \text{\large 72} ## 72
    \text{\bf 72} ## 72
    \Big(72\Big) ## 72
    72\hspace{1cm} ## 72
    \ 72\ ## 72
    \text{A}, \text{B} \text{ and } \text{C} ## A,B,C
    \frac{\large 1}{\large 2} ## 1/2
    \begin{center}72\end{center} ## 72
    \begin{aligned} & 72 \end{aligned} ## 72
    \begin{aligned}\therefore x=72\end{aligned} ## 72
    \begin{aligned} \boxed{72} \end{aligned} ## 72
    \begin{array}{rl}x&=72\end{array} ## 72
    \begin{array}{rcl}x&=&72\end{array} ## 72
    =\frac12 ## 1/2
    =\$72 ## 72
    =-3 ## -3
    (1,2), ## (1,2)
    [1,2]. ## [1,2]
    \{1,2\}, ## 1,2
    x>3, ## x>3
    72\% , ## 72\%
    \text{(A), (B)} ## A, B
    \text{A only} ## A only
    3\text{ to }1 ## 3:1
    3\text{-to-}1 ## 3:1
    6:4:2 ## 3:2:1
    a:b=2:3 ## 2:3
    x:y = 4:6 ## 2:3
    1.5:1 ## 3:2
    20:30 ## 2:3
    \frac{4}{6} ## \frac23
    10:45 ## 10:45
    12{:}45\text{ p.m.} ## 12:45 PM
    """,
    "more siblings": r"""
    \operatorname{arcsinh}(0) ## 0
    \sinh^{-1} 0 ## 0
    \operatorname{arctanh}(0) ## 0
    \operatorname{sgn}(-3) ## -1
    \operatorname{Re}(z) ## \operatorname{Re}(z)
    2(\cos 60^\circ + i\sin 60^\circ) ## 2\operatorname{cis}60^\circ
    2e^{i\pi/3} ## 2\operatorname{cis}60^\circ
    4\operatorname{cis}\frac{\pi}{2} ## 4i
    \sqrt2\operatorname{cis}45^\circ ## 1+i
    \operatorname{cis}(\theta) ## \cos\theta+i\sin\theta
    \text{cis }60^\circ ## \operatorname{cis}60^\circ
    2\,\text{cis}\left(60^\circ\right) ## 1+i\sqrt3
    \operatorname{cis}\,{60^\circ} ## \operatorname{cis}(60^\circ)
    3^{100}\cdot 3 ## 3^{101}
    2^{2009}-1 ## 2^{2009} -1.
    1+2+2^2 ## 7
    \frac{10^{2010}-1}{9} ## \frac{1}{9}(10^{2010}-1)
    2^{1005}\cdot 3^{1005} ## 6^{1005}
    \left(\frac{1}{2}\right)^{2009} ## \frac{1}{2^{2009}}
    (2^{2009}-1)/3 ## \frac{2^{2009}-1}{3}
    2^{2008}+2^{2008} ## 2^{2009}
    2009^{2009} ## 2009^{2009}
    \sqrt{2^{2009}} ## 2^{1004}\sqrt{2}
    {\Large 13} ## 13
    \LARGE\mathbf{13} ## 13
    \normalsize 13 ## 13
    \mathbf{x}=13 ## 13
    \boldsymbol{13} ## 13
    \mathsf{13} ## 13
    \mathtt{13} ## 13
    \texttt{13} ## 13
    \textit{13} ## 13
    \it 13 ## 13
    \rm{13} ## 13
    \em 13 ## 13
    \textcolor{blue}{\mathbf{13}} ## 13
    \textcolor{red}{x=13} ## 13
    {\textcolor{red}{13}} ## 13
    13\textcolor{red}{} ## 13
    {\color{red}{\frac{1}{2}}} ## \frac12
    \color{red}\frac{1}{2} ## \frac12
    =\boxed{72} ## 72
    72=x ## 72
    \text{=}72 ## 72
    \equiv 72 ## 72
    :=72 ## 72
    x:=72 ## 72
    x\coloneqq 72 ## 72
    72;\; ## 72
    (72), ## 72
    '72' ## 72
    «72» ## 72
    \begin{aligned}[t]72\end{aligned} ## 72
    \begin{equation}72\end{equation} ## 72
    \begin{array}{l}72\end{array} ## 72
    \begin{aligned}48+24&=72\end{aligned} ## 72
    \text{\$}72.50 ## 72.5
    \text{Rs. }72 ## 72
    Rs. 72 ## 72
    ₹72 ## 72
    ¥72 ## 72
    \yen 72 ## 72
    72\text{\textdollar} ## 72
    \text{\$72.00} ## 72
    \text{B or C} ## \text{B or C}
    \text{(B) and (C)} ## B, C
    \text{B,C,D} ## B, C, D
    B \text{ and } C ## B,C
    \text{B},\text{C} ## \text{B, C}
    BCD ## BCD
    \{B, C\} ## B,C
    \text{Alice, Bob} ## Alice,Bob
    \text{Alice and Bob} ## Bob, Alice
    \text{Yes, No} ## \text{Yes, no}
    1:2 ## 2:4
    1:\frac12 ## 2:1
    6\!:\!9 ## 2:3
    6\;:\;9 ## 2:3
    \text{4:6} ## 2:3
    \frac{4}{6}:1 ## 2:3
    100:1 ## 100:1
    0.\dot{9} ## 1
    1.\dot{3} ## \frac43
    0.\dot{0}\dot{9} ## \frac1{11}
    0.58\dot{3} ## \frac{7}{12}
    .\dot{3} ## \frac13
    -0.\overline{6} ## -\frac23
    0.\bar{3} ## 0.\dot{3}
    0.1\bar{6} ## \frac16
    0.33\overline{3} ## \frac13
    33.\overline{3}\% ## \frac13
    0.3\overline{3} ## 1/3
    \frac{1}{2}\begin{bmatrix}2&4\\6&8\end{bmatrix} ## \begin{bmatrix}1&2\\3&4\end{bmatrix}
    \begin{bmatrix}1&2\\3&4\end{bmatrix} ## \left[\begin{matrix}1&2\\3&4\end{matrix}\right]
    3\cdot\begin{pmatrix}1\\0\end{pmatrix} ## \begin{pmatrix}3\\0\end{pmatrix}
    3\times\begin{pmatrix}1\\0\end{pmatrix} ## \begin{pmatrix}3\\0\end{pmatrix}
    A=\frac12\begin{pmatrix}2&4\\6&8\end{pmatrix} ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
    \begin{cases}x=1\\y=2\end{cases} ## (x,y)=(1,2)
    x=1\text{ and }y=2 ## \begin{cases}x=1\\y=2\end{cases}
    (1,2) ## \begin{cases}x=1\\y=2\end{cases}
    \begin{cases}x=1 & \\ y=2 & \end{cases} ## (1,2)
    \begin{cases}x+y=3\\x-y=1\end{cases} ## \begin{cases}x-y=1\\x+y=3\end{cases}
    \begin{cases}1,&x>0\\0,&x\le0\end{cases} ## \begin{cases} 1, & x>0 \\ 0, & x\leq 0\end{cases}
    3:30 \text{ pm} ## 3:30 PM
    3:30\text{p.m.} ## 3:30 PM
    3:30 \, PM ## 3:30 PM
    3:30 \mathrm{PM} ## 3:30 PM
    3:30~\text{p.m.} ## 3:30\text{ PM}
    3:05 \text{ a.m.} ## 3:05 AM
    8\text{ a.m.} ## 8:00 AM
    11{:}59\text{ PM} ## 11:59 p.m.
    \text{3:30 PM.} ## 3:30 PM
    3:30:00 PM ## 3:30 PM
    3:30 ## 3:30
    1.3\times10^{5} ## 130000
    60^{\circ} ## 60°
    60\degree ## 60^\circ
    60\,^\circ ## 60^\circ
    \frac{\pi}{3}\text{ rad} ## \frac\pi3
    2\sqrt{3}\;\text{cm} ## 2\sqrt3
    \{x\mid x>3\} ## x>3
    (-\infty, 3) ## x<3
    x\in(-\infty,3) ## x<3
    7\tfrac{1}{4} ## 7.25
    1{,}234 ## 1234
    5! ## 120
    \overline{AB} ## \overline{AB}
    \angle ABC ## \angle ABC
    y=2x+3 ## y = 3 + 2x
    x^2+1 ## 1+x^{2}
    2\pi r ## 2 \pi r
    \frac{-b}{2a} ## -\frac{b}{2a}
    \log_{2} 8 ## 3
    \text{even} ## even
    \text{No solution} ## no solution
    \varnothing ## \emptyset
    \text{undefined} ## undefined
    """,
}
WRONG = {
    "equations that are not solved": r"""
        2x = 10 ## 10
        2x = 10 ## 5
        x(x+1) = 6 ## 6
        |x| = 3 ## 3
        x^2 = 3 ## 3
        x+1 = 3 ## 3
        n(n+1) = 6 ## 6
        P(1+r) = 6 ## 6
        f(1)f(2) = 6 ## 6
        xx = 3 ## 3
        P(X=2) = \frac16 ## \frac13
        P(X=2) = \frac16 = \frac13 ## \frac13
        P(X=2) = \frac16 = \frac13 ## \frac16
        x+y = 3 ## 2
        x+y = 3 ## x+y = 4
        x+y = 4-x ## 4-x
        P(A) = 2, P(B) = 3 ## 3
        \{x \in \mathbb{Z} \mid x > 2\} ## (2,\infty)
    """,
    "words that change the value": r"""
        2\text{ thirds} ## 2
        2 thirds ## 2
        3\text{ fifths} ## 3
        3 halves ## 3
        2\text{ pi} ## 2
        0.3 repeating ## 0.3
        0.3\text{ (recurring)} ## 0.3
        5\text{ lakh} ## 5
        5\text{ crores} ## 5
        3\text{ tens} ## 3
        3\text{ inverse} ## 3
        5\text{x} ## 5
        f(2x) = 5x ## 5x
        if = 5 ## 5
        \$5\text{K} ## 5
        \$5\text{ per hundred} ## 5
        \$5\text{ negative} ## 5
        5\text{ i} ## 5
        5\text{k} ## 5
        5\text{M} ## 5
    """,
    "money and words": r"""
        \$5 \text{ euros} ## 5
        \$5 \text{ cents} ## 5
        \$5 \text{ per hour} ## \$5 \text{ per day}
        \$5 \text{ per hour} ## 5 \text{ per day}
        \$5/\text{hour} ## €5
        \$5 \text{ per hour} ## 5 \text{ apples}
        5/x ## 5
        \$5/2 ## 5
        \$5 \text{ million} ## 5
        \$5 \text{ or } 6 ## 5
    """,
    "degrees, percents and units of each": r"""
        60^{\circ}\mathrm{F} ## 60^\circ C
        60\text{ degrees Fahrenheit} ## 60^\circ C
        x = 25 ## 0.25
        x = 25\% ## 2.5
        x = 30^\circ ## 31
        30^\circ, 60^\circ ## \frac{\pi}{6},60
        y = 30^\circ ## x = 30^\circ
        2x = 30^\circ ## 15
        10\text{ cm}, 20\text{ m} ## 10,20
        10\text{ cm}, 20\text{ cm} ## 10\text{ m}, 20\text{ m}
        10\text{ cm} \text{ or } 20\text{ cm} ## 10
        60\frac{\text{mi}}{\text{h}} ## 60\text{ km/h}
        60\frac{\mathrm{m}}{\mathrm{s}} ## 60\text{ km/h}
        60\frac{x}{y} ## 60
        1 hour and 15 minutes ## 1 hour 16 minutes
    """,
    "letters in another order": r"""
        VI ## IV
        XI ## IX
        TTF ## FTT
        NW ## WN
        MIT ## Tim
        god ## dog
        dog ## god
        cat ## act
        act ## cat
        eat ## tea
        LX ## XL
        XC ## CX
        HTT ## TTH
    """,
    "numbers that are no arithmetic": r"""
        2024-03-04 ## 2024-04-03
        2017 ## 2024-04-03
        10/12/2023 ## 5/6/2023
        2024/12/25 ## 4048/24/25
        5-10 ## 6-11
        5–10 ## 6–11
        2020-2021 ## 2021-2022
        3-1 ## 4-2
        2 ## 3-1
        -10 ## 10-20
        1-1-1 ## 2-1-2
        555-1234 ## 666-1345
    """,
    "nothing said": r"""
    1=1 ## 1
    5=5=5 ## 5
    1.0=1 ## 1
    0=0 ## 0
    72=72 ## 72
    -1=-1 ## -1
    """,
    "units": r"""
    \$5 ## 5\%
    5\% ## 5\text{ dollars}
    5\% ## \$5
    5\text{ cm} ## 5\%
    5\% ## 5\text{ cm}
    5^\circ ## 5\%
    5\% ## 5^\circ
    5\text{ students} ## 5\%
    5\text{ dollars} ## 5\text{ euros}
    """,
    "not a number": r"""
    nan ## NaN
    NaN ## NaN
    NaN ## nan
    \text{nan} ## NaN
    n ## NaN
    """,
    "ratios and times": r"""
    2:3 ## 3:2
    4:7 ## 2:3
    2:3 ## 2:3:4
    2:3 ## 2
    1:10 ## 3:30
    7:60 ## 3:30
    2:3 ## 2,3
    0:0 ## 2:3
    3:30 \text{ a.m.} ## 3:30 PM
    3:31 PM ## 3:30 PM
    4:30 PM ## 3:30 PM
    3 PM ## 3:30 PM
    30 ## 3:30 PM
    """,
    "repeating decimals": r"""
    0.\dot{3} ## 0.3
    0.\dot{3} ## \frac{3}{10}
    0.\dot{6} ## \frac13
    0.(3) ## 0.3
    0.33... ## 0.33
    3.14... ## 3.14
    0.3\dot{1} ## \frac13
    """,
    "matrices and systems": r"""
    \frac13\begin{pmatrix}2&4\\6&8\end{pmatrix} ## \begin{pmatrix}1&2\\3&4\end{pmatrix}
    2\begin{pmatrix}1\\2\end{pmatrix} ## \begin{pmatrix}2&4\end{pmatrix}
    \begin{cases}x=2\\y=1\end{cases} ## (1,2)
    \begin{cases}y=1\\x=2\end{cases} ## (1,2)
    \begin{cases}x=1\\y=2\end{cases} ## 1,2
    \begin{cases}x=1\\y=2\end{cases} ## 1
    \begin{aligned}72\\73\end{aligned} ## 72
    \begin{aligned}x&=70+2\\&=73\end{aligned} ## 72
    """,
    "words": r"""
    \text{B, C} ## B
    \text{B, C} ## B,D
    \text{B or C} ## B
    \text{B, C, D} ## B,C
    \text{not B} ## B
    """,
    "dress that hides": r"""
    ]0,1[ ## [0,1]
    ]0,1] ## (0,1)
    72,73 ## 72
    \textcolor{red}{13} ## 12
    \textcolor{13}{12} ## 13
    \phantom{72} ## 72
    \color{72} ## 72
    \tag{72} ## 72
    \label{72}5 ## 72
    \ne 72 ## 72
    \not=72 ## 72
    >72 ## 72
    \neg 72 ## 72
    -72, ## 72
    72! ## 72
    72\% ## \frac{72}{10}
    2\operatorname{cis}60^\circ ## 5
    \operatorname{cis}60 ## \operatorname{cis}60^\circ
    cis(60) ## 5
    1\over 2 ## 2
    2\text{ to }3 ## 3:2
    20\%\text{ increase} ## 20\%\text{ decrease}
    x=1=2 ## 1
    \text{72 or 73} ## 72
    \text{Tom and Ann} ## Tom
    \text{not Tom, Ann} ## Tom, Ann
    \text{Tom, Ann} ## \text{Tom, Bob}
    1,2 ## 12
    \begin{pmatrix}1\\2\end{pmatrix} ## (1,2)
    **72** or **73** ## 72
    \max\{1,2\} ## 1
    """,
    "siblings of all kinds": r"""
    x=x ## x
    2=2 ## 2
    \$2 ## 2^\circ
    2^\circ ## 2\%
    5\text{ cents} ## 5\%
    5\text{ cents} ## \$5
    2\ne 2 ## 2
    \begin{aligned}x&=1\\y&=2\end{aligned} ## (2,1)
    20:31 ## 2:3
    12:45 AM ## 12:45 PM
    10:45 ## 10:54
    13\text{th} ## 12
    1 ## 1=2
    1=2 ## 1
    x=1=1 ## 2
    5\%=5\% ## 5
    \frac12=\frac12 ## \frac13
    \text{I and II} ## I, III
    2:3:4 ## 4:6:9
    \begin{pmatrix}1&2\\3&4\end{pmatrix} ## 2\begin{pmatrix}1&2\\3&4\end{pmatrix}
    \text{not }72 ## 72
    5\text{ kg} ## 5\%
    \frac{1}{2}\% ## \frac12\text{ cm}
    \text{cis}60^\circ ## 1
    -0.\dot3 ## \frac13
    \$5 ## 5\text{ cm}
    """,
    "more siblings": r"""
    5=5 ## 5
    x=y=1 ## 2
    \$5 ## 5\text{ cents}
    5\text{ dollars} ## 5\text{ cents}
    5\text{ m} ## 5\%
    \$5 ## 5\text{ percent}
    5\text{ percent} ## \$5
    NaN ## 5
    nan ## 0
    \text{NaN} ## NaN
    \infty ## NaN
    0.\dot{3}\dot{4} ## \frac13
    3:30 AM ## 15:30
    \text{B, C} ## C
    \text{C} ## B,C
    \text{B or C} ## B,C
    \begin{cases}x=1\\y=2\end{cases} ## 2
    \begin{cases}1,&x>0\\0,&x\le0\end{cases} ## \begin{cases}0,&x>0\\1,&x\le0\end{cases}
    2^{2009} ## 2^{2009}-1
    3^{2009} ## 2^{2009}
    2009! ## 2008!
    \binom{2009}{2} ## \binom{2009}{3}
    2^{2009}+2^{2008} ## 2^{2009}
    2\operatorname{cis}60^\circ ## 2\operatorname{cis}30^\circ
    2\operatorname{cis}60^\circ ## 2
    3\begin{pmatrix}1\\0\end{pmatrix} ## \begin{pmatrix}1\\0\end{pmatrix}
    72=73 ## 72
    72=73 ## 73
    72\text{ or }73 ## 72
    \text{about }72 ## 73
    0=1 ## 0
    1=1=1 ## 1
    \text{1=1} ## 1
    (1=1) ## 1
    \{1=1\} ## 1
    1=1, ## 1
    """,
}
BIG_RIGHT = r"""
    3^{2010} ## 3^{2010}.
    \boxed{2010!} ## 2010!
    \binom{2000}{1000} ## \frac{2000!}{1000!1000!}
    {2008 \choose 1004} ## \binom{2008}{1004}
    1-\frac{1}{2010!} ## 1 - \dfrac{1}{2010!}
    1-\frac{1}{2010!} ## \frac{2010!-1}{2010!}
    i^{2009} ## i
    \ln(2^{2009}) ## 2009\ln 2
    \log_{10}(10^{2009}) ## 2009
    2^{2009}\cdot\pi ## \pi 2^{2009}
    0.5^{2009} ## 2^{-2009}
    1.5 \times 10^{2000} ## 15 \times 10^{1999}
    (-1)^{2009} ## -1
    2^{2009} - 1 = 2\cdot 2^{2008}-1 ## 2^{2009}-1
    2^{2009}-1 \text{ ways} ## 2^{2009}-1
    \frac{1}{2}(3^{2009}+1) ## \dfrac{3^{2009}+1}{2}
    \frac{3^{2009}+1}{2} ## \frac{1+3\cdot3^{2008}}{2}
    2^{100} ## 1267650600228229401496703205376
    \frac{2009!}{2^{1000}} ## 2^{-1000}2009!
    (2^{2009}-1,2^{2009}+1) ## (2^{2009}-1, 2^{2009}+1)
    2^{2009}-1, 3^{2009} ## 3^{2009}, 2^{2009}-1
    k=2^{2009} ## 2^{2009}
    \left\lfloor \frac{2^{2009}}{3}\right\rfloor ## \lfloor 2^{2009}/3\rfloor
    \sqrt{10^{2010}+1} ## \sqrt{1+10^{2010}}
    2^{2009}-1 ## -1+2^{2009}
    2^{2009}+2^{2009} ## 2^{2010}
    2^{2010}-2^{2009} ## 2^{2009}
    (2^{1005}-1)(2^{1005}+1) ## 2^{2010}-1
    4^{1005} ## 2^{2010}
    \sqrt{2^{4018}} ## 2^{2009}
    2009! ## 2009\cdot 2008!
    \frac{2010!}{2009!} ## 2010
    \binom{2010}{1005} ## \frac{2010!}{(1005!)^2}
    \binom{2010}{3} ## \binom{2010}{2007}
    2^{1004}\sqrt2 ## 2^{1004.5}
    2^{2009}\sqrt{8} ## 2^{2010}\sqrt2
    1-\frac{1}{2^{2009}} ## \frac{2^{2009}-1}{2^{2009}}
    (1+i)^{4018} ## 2^{2009} i^{2009}
    10^{10^{10}} ## 10^{10000000000}
    3\cdot 8^{8^{8^8}} ## 8^{8^{8^8}}\cdot 3
    e^{5000} ## e^{5000}
    x^{2009}x ## x^{2010}
    \frac{x^{2010}-1}{x-1} ## \frac{1-x^{2010}}{1-x}
    1e500 ## 10^{500}
    2^{256} ## 115792089237316195423570985008687907853269984665640564039457584007913129639936
    \left(\frac23\right)^{2000} ## \frac{2^{2000}}{3^{2000}}
    100\cdot 99! ## 100!
    \frac{100!}{50!50!} ## \binom{100}{50}
    \sqrt[3]{2^{6000}} ## 2^{2000}
    [0,2^{2009}] ## [0, 2\cdot2^{2008}]
    (2^{2009},3^{2009}) ## (2^{2009},9\cdot3^{2007})
    2^{3000}>x ## x<2^{3000}
    \{2^{2009}\} ## \{4\cdot2^{2007}\}
    2^{2009}\% ## \frac{2^{2007}}{25}
    2^{2009}\text{ ways} ## 2^{2009}
    \sqrt{3}\cdot 10^{1000} ## 10^{1000}\sqrt{3}
    \sqrt{-3}\cdot 2^{2009} ## i 2^{2009}\sqrt3
    x=2^{2009} ## 2^{2009}
    2^{2009}\sin 1 ## \sin(1)2^{2009}
    -2^{2009} ## (-2)^{2009}
    2^{-2009} ## \frac1{2^{2009}}
    \sum_{n=1}^{3} n ## \sum_{n=1}^{3}n
    2^{2009}=2\cdot 2^{2008} ## 2^{2009}
    \frac{(2n)!}{n!n!} ## \binom{2n}{n}
    9^{9^9} ## 3^{2\cdot 9^9}
    \log_2 2^{2009} ## 2009
    \ln e^{2009} ## 2009
    \frac{2^{2010}-1}{3} ## \frac13(2^{2010}-1)
    (2^{2009}-1)x+3 ## 3+x(2^{2009}-1)
    3^{2009}\cdot5^{2009} ## 15^{2009}
    7^{2008}(7-1) ## 6\cdot 7^{2008}
"""
BIG_WRONG = r"""
    2^{2009}+1 ## 2^{2009}-1
    1 ## 1-2^{-2009}
    (2^{1600}+1)2^{200} ## 2^{1800}
    2^{2009}\sqrt2\sqrt2+1 ## 2^{2010}
    2^{2009}+\sqrt2 ## 2^{2009}+\sqrt3
    2009! ## 2010!
    2^{2009} ## 2^{2010}
    \binom{2010}{4} ## \binom{2010}{3}
    e^{5000} ## e^{5001}
    -2^{2009} ## 2^{2009}
    [0,2^{2009}+1] ## [0,2^{2009}-1]
    10^{10^{10}} ## 10^{10^{10}}+1
    2^{2009}x ## 2^{2009}
    x^{2009} ## x^{2010}
    8^{8^{8^8}} ## 8^{8^{8^7}}
    0 ## 2^{-2009}
    2^{2009}\% ## 2^{2009}+1
    1e500 ## 1e501
    2^{2009}i ## 2^{2009}
    \sqrt2 2^{2009} ## \sqrt3 2^{2009}
    \sqrt[3]{2}2^{2009} ## \sqrt[3]{3}2^{2009}
    115792089237316195423570985008687907853269984665640564039457584007913129639937 ## 2^{256}
    (1,2^{2009}) ## (1,2^{2008})
    x>2^{2009} ## x>2^{2009}+1
    x<2^{2009} ## x>2^{2009}
    \{2^{2009},1\} ## \{2^{2009}\}
    -2^{2010} ## (-2)^{2010}
    2^{2009}\sin 1+1 ## 2^{2009}\sin 1
"""


def rows(table: str) -> list[list[str]]:
    return [line.strip().split(" ## ") for line in table.strip().splitlines()]


@pytest.mark.skipif(
    not STRANGERS.exists(),
    reason="the 45 answers are not part of the repository: they would be "
    "shared/data/strangers/answers.jsonl beside the checkout",
)
def test_the_answers_that_strangers_found_graded_wrong_are_right():
    graded = [json.loads(line) for line in STRANGERS.read_text().splitlines()]
    assert len(graded) >= 45
    scores = good_accuracy([r["completion"] for r in graded], [r["reference"] for r in graded])
    assert [row for row, s in zip(graded, scores) if (s == 1.0) != bool(row["right"])] == []


@pytest.mark.parametrize("kind", RIGHT)
def test_an_answer_in_its_dress_or_notation_is_right(kind):
    assert [row for row in rows(RIGHT[kind]) if not compare(*row).right] == []


@pytest.mark.parametrize("kind", WRONG)
def test_an_answer_that_only_looks_right_is_wrong(kind):
    assert [row for row in rows(WRONG[kind]) if compare(*row).right] == []


def test_numbers_too_big_to_be_written_out_are_right_either_way_round():
    long = [[str(2**256), "2^{256}"], [f"{2**256:,}", "2^{256}"], ["7" * 700, "7" * 700]]
    pairs = rows(BIG_RIGHT) + long
    assert [pair for pair in pairs if not compare(*pair).right] == []
    assert [pair for pair in pairs if not compare(*pair[::-1]).right] == []


def test_big_numbers_that_differ_a_little_are_wrong():
    pairs = [*rows(BIG_WRONG), [str(2**256 + 1), "2^{256}"]]
    assert [pair for pair in pairs if compare(*pair).right or compare(*pair[::-1]).right] == []


def test_what_a_limit_keeps_from_being_told_is_unreadable_and_not_a_verdict():
    assert compare("8^{8^{8^8}}+1", "8^{8^{8^8}}") == (False, False)
    assert compare("2^{2009}+1", "2^{2009}") == (False, True)


def test_canonical_images_of_rationals_are_those_of_their_values():
    rng = random.Random(1)

    def tree(depth):
        kind = rng.choice(["num", "add", "mul", "div", "neg", "pow"]) if depth else "num"
        if kind == "num":
            return ("num", Fraction(rng.randint(-9, 9), rng.randint(1, 5)))
        if kind == "pow":
            return ("pow", tree(depth - 1), ("num", Fraction(rng.randint(-3, 3))))
        return (kind, *(tree(depth - 1) for _ in range(1 if kind == "neg" else 2)))

    compared = 0
    for _ in range(400):
        expression = tree(4)
        value = value_or_none(expression)
        if isinstance(value, Fraction):
            image = canonical.image(expression)
            assert image == canonical.image(("num", value))
            assert image != canonical.image(("num", value + Fraction(1, 10**9)))
            compared += 1
        elif value is None:
            with pytest.raises(Undefined):
                canonical.image(expression)
    assert compared > 200


def test_canonical_images_of_roots_and_of_i_multiply_as_the_numbers_do():
    def image(text):
        value, is_exact = canonical.image(parse(tokenize(text)))
        assert is_exact
        return value

    for p in (2, 3, 5, 7, 11, 89, 97):
        assert image(rf"\sqrt{{{p}}}^2") == p
        assert image(rf"\sqrt{{-{p}}}") == image(rf"i\sqrt{{{p}}}")
        assert image(rf"\sqrt{{{2 * p}}}") == image(rf"\sqrt2\sqrt{{{p}}}")
    assert image("i^2") == image("-1")
    assert image(r"(1+\sqrt2)(1-\sqrt2)") == image("-1")
    assert pow(3, canonical.PRIME - 1, canonical.PRIME) == 1


@pytest.mark.parametrize("word", sorted(FUNCTION_WORDS))
def test_every_function_that_can_be_read_has_a_value(word):
    for text in (f"{word} 2", f"\\operatorname{{{word}}}{{3}}", f"{word}(4,6)"):
        with contextlib.suppress(Unreadable, Undefined):
            evaluate(parse(tokenize(normalise(text))))
    at = r"\frac12" if "tanh" in word else "1"
    assert evaluate(parse(tokenize(normalise(f"\\{word}({at})")))) is not None


def test_a_fault_of_the_grader_is_logged_once_counted_and_graded_as_unreadable(monkeypatch, caplog):
    def broken_lookup(*_):
        raise KeyError("cis")

    monkeypatch.setattr(comparing, "undress", broken_lookup)
    model = RewardModel([RewardFunction()])
    with caplog.at_level(logging.ERROR):
        scores = model.score(
            ["\\boxed{x\x1b[2J}", "\\boxed{7}", "\\boxed{y}"], {"solution": ["y", "7", "1"]}
        )
        assert compare("z", "1") == (False, False)
    assert scores.total.tolist() == [0.0, 1.0, 0.0]
    assert scores.counts == {"timeouts": 0, "crashes": 0, "unparsed": 2, "grader_faults": 2}
    assert reward_metrics(scores, 3)["reward/grader_faults"] == 2.0
    (record,) = caplog.records
    assert "KeyError in broken_lookup" in record.getMessage()
    assert "'x\\x1b[2J'" in record.getMessage()


@pytest.mark.parametrize("other", [None, 5, b"5", float("nan"), ["5"]], ids=repr)
def test_what_is_no_text_is_wrong_and_does_not_raise(other):
    with faults.collected() as found:
        assert not compare(other, "5").right
        assert not compare("5", other).right
    assert len(found) == 2


def test_workers_hand_back_the_faults_of_the_grader(tmp_path, caplog):
    (tmp_path / "broken.py").write_text(
        "from adpo_jax.rewards import good_accuracy\n"
        "from adpo_jax.rewards.grading import compare\n"
        "def broken_in_worker(*_): raise KeyError('cis')\n"
        "compare.undress = broken_in_worker\n"
        "def graded(completions, solution, **columns):\n"
        "    return good_accuracy(completions, solution)\n"
        "async def graded_async(completions, solution, **columns):\n"
        "    return good_accuracy(completions, solution)\n"
    )
    path = str(tmp_path / "broken.py")
    functions = [RewardFunction(path, "graded"), RewardFunction(path, "graded_async")]
    with RewardModel(functions, num_workers=1) as model:
        scores = model.score(["\\boxed{x}", "\\boxed{7}"], {"solution": ["y", "7"]})
    assert scores.total.tolist() == [0.0, 2.0]
    assert scores.counts["grader_faults"] == 2
    assert len([r for r in caplog.records if "broken_in_worker" in r.getMessage()]) == 1


def test_answers_put_together_from_every_word_of_the_tables_find_no_fault():
    rng = random.Random(0)
    words = vocabulary()
    known = [
        row[0] for table in (*RIGHT.values(), *WRONG.values(), BIG_RIGHT) for row in rows(table)
    ]
    with faults.collected() as found:
        for _ in range(3000):
            parts = list(rng.choice(known)) if rng.random() < 0.5 else []
            for _ in range(rng.choice([1, 2, 4, 30])):
                parts.insert(rng.randint(0, len(parts)), rng.choice(words))
            answer = rng.choice(["", " "]).join(parts)
            with soon():
                compare(answer, rng.choice(known))
    assert found == []


def test_the_fuzzer_takes_its_words_from_the_tables_and_fails_on_a_fault(monkeypatch):
    class Provider:
        def __init__(self, data):
            self.numbers = list(data)

        def ConsumeIntInRange(self, low, high):
            return min(max(self.numbers.pop(0), low), high)

        def ConsumeBool(self):
            return False

    monkeypatch.setitem(
        sys.modules,
        "atheris",
        types.SimpleNamespace(
            instrument_imports=lambda include: faults.collected(), FuzzedDataProvider=Provider
        ),
    )
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz_grading.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    assert set(vocabulary()) <= set(fuzz.WORDS)
    assert set(fuzz.WORDS) >= FUNCTION_WORDS
    fuzz.test_one_input(bytes([1, 2, 3, 4]))
    monkeypatch.setattr(comparing, "undress", lambda text: {}[text])
    with pytest.raises(AssertionError, match="KeyError"):
        fuzz.test_one_input(bytes([1, 2, 3, 4]))
