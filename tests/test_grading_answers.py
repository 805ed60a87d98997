"""Every kind of answer in its dresses: what is right, and what only looks like it."""

import pytest

from adpo_jax.rewards import good_accuracy
from adpo_jax.rewards.grading.compare import compare

# Of each kind: the reference, answers that equal it, answers that do not.
CASES = {
    "integer_format": (
        "48250",
        [
            "48250", "48,250", "48{,}250", r"48\,250", "48 250", "48250.0", "48250.", "+48250",
            "48,250.00", r"\$48,250", r"48,\!250", r"4.825\times10^4", "4.825e4", r"\text{48250}",
            r"\mathbf{48250}", r"48250\text{ dollars}", r"48\ 250", "$48250$", "{48250}",
            "(48250)", r"48250 \text{ apples}", r"\boxed{48250}",
        ],
        [
            "48251", "-48250", "4825", "482500", "48.250", "48,25", "48250%x", "4 8250",
            "48250, 48251", "48250 or 1", "0.48250", "48250!", "4825.0", r"\frac{1}{48250}",
            "482", "48,2500",
        ],
    ),
    "negint": (
        "-19",
        [
            "-19", "-19.0", "- 19", "−19", r"-\,19", r"\text{-19}", "-19.", "(-19)",
        ],
        [
            "19", "-91", "-1.9", "190", "+19", "19-", "--19",
        ],
    ),
    "decimal": (
        "7.25",
        [
            "7.25", "7.250", r"\frac{29}{4}", r"7\frac{1}{4}", r"7\frac14", "7 1/4", "29/4",
            r"7+\frac14", r"7.25\text{ cm}", r"725\times 10^{-2}", r"\frac{725}{100}",
        ],
        [
            "7.5", "7.2", "7.26", "72.5", "0.725", r"\frac{4}{29}", "7.251", "7.2500001", "7,25",
            r"7\frac{1}{5}", "725", "-7.25", r"\frac{28}{4}",
        ],
    ),
    "decimal2": (
        "0.8",
        [
            ".8", "0.80", r"\frac45", "4/5", r"80\%", r"\frac{8}{10}",
        ],
        [
            "0.08", "8", r"\frac54", "0.84", "0.79", r"\frac56", "0.8x",
        ],
    ),
    "third": (
        r"\frac13",
        [
            "1/3", r"\frac{1}{3}", r"\frac{2}{6}", r"0.\overline{3}", r"0.\bar{3}", r"\frac 1 3",
            r"\dfrac{1}{3}", "1 / 3", r"\frac13\approx 0.333", "3^{-1}",
        ],
        [
            "0.3333", "0.33", "0.333333333333333333333", "3", r"\frac{1}{30}", "0.3",
        ],
    ),
    "rounded": (
        "0.3333",
        [
            "0.3333", r"\frac13", "1/3",
        ],
        [
            "0.33", "0.333", "0.3334", r"\frac{1}{4}", "0.33331",
        ],
    ),
    "rounded2": (
        "0.67",
        [
            "2/3", "0.670",
        ],
        [
            "0.66", "0.7", "67", r"\frac{7}{10}",
        ],
    ),
    "piref": (
        "3.14",
        [
            r"\pi", "3.140",
        ],
        [
            "3.1416", "3.1",
        ],
    ),
    "latex_fraction": (
        r"\frac{3}{8}",
        [
            r"\frac38", "3/8", "0.375", r"\frac{3}{8}", r"\tfrac{3}{8}", r"\dfrac38",
            r"\frac{6}{16}", "{3}/{8}", "(3)/(8)", r"\frac{3}8", r"\frac3{8}", r"3\div 8",
            r"37.5\%", r"\left(\frac{3}{8}\right)", r"$\frac{3}{8}$", r"\frac{-3}{-8}",
            r"3 \cdot \frac18", r"\frac{3}{8}.", r"\displaystyle\frac{3}{8}", r"\cfrac{3}{8}",
            r"\frac{ 3 }{ 8 }",
        ],
        [
            r"\frac{8}{3}", r"-\frac{3}{8}", r"\frac{3}{80}", "38", "3.8", "0.38", r"\frac{3}{9}",
            r"\frac{30}{8}", "3,8", "3:8x",
        ],
    ),
    "negfrac": (
        r"-\frac{9}{4}",
        [
            r"-\frac94", r"\frac{-9}{4}", r"\frac{9}{-4}", "-2.25", r"-2\frac14",
            r"-2\frac{1}{4}", "-9/4", "-(9/4)", r"-\dfrac{9}{4}", "−9/4", "-2 1/4",
        ],
        [
            r"\frac94", r"-\frac49", "2.25", "-2.5", r"-\frac{9}{40}", r"\frac{-9}{-4}",
        ],
    ),
    "mixed": (
        r"3\frac{1}{2}",
        [
            "3.5", "7/2", r"\frac72", r"3\frac12", "3 1/2", r"3+\frac12",
        ],
        [
            r"\frac32", "1.5", r"3\frac{1}{3}", "31/2", r"\frac{3}{2}",
        ],
    ),
    "percent": (
        r"15\%",
        [
            r"15\%", "15%", r"15 \%", r"15\text{ percent}", "0.15", "15", r"\frac{3}{20}",
            r"15.0\%", "15 percent",
        ],
        [
            r"51\%", r"1.5\%", r"0.15\%", "1.5", r"150\%", "1500", "0.0015", r"-15\%",
        ],
    ),
    "money": (
        "45",
        [
            r"\$45", r"\$45.00", "45 dollars", r"45\text{ dollars}", "$45", r"\text{\$45}",
            "45.00", "USD 45", r"\$ 45", r"45 \$", "€45",
        ],
        [
            r"\$54", r"\$4.50", r"\$450", r"-\$45", r"\$45.01", "0.45",
        ],
    ),
    "money2": (
        r"\$4.50",
        [
            "4.5", r"\$4.50", "4.50", r"4.50\text{ dollars}", r"\$4.5",
        ],
        [
            "450", "4.05", "5.40", r"\$4.51",
        ],
    ),
    "big": (
        "98765432109876543211",
        [
            "98765432109876543211", "98,765,432,109,876,543,211",
        ],
        [
            "98765432109876543210", "98765432109876543212", r"9.8765432109876543211\times10^{18}",
            "9.87654321098765e19", "9876543210987654321",
        ],
    ),
    "exactbig": (
        "10001",
        [
            "10001", "10,001",
        ],
        [
            "10000", "10001.5", "1.0001e5", "10002", "1001",
        ],
    ),
    "roots": (
        r"5\sqrt{2}",
        [
            r"\sqrt{50}", r"5\sqrt2", r"\frac{10}{\sqrt{2}}", r"\sqrt{2}\cdot5",
            r"5\cdot\sqrt{2}", "5*sqrt(2)", r"5 \sqrt{2}", r"5\times\sqrt{2}", "50^{1/2}",
            "5(2)^{1/2}", r"\sqrt{25\cdot2}", r"5\,\sqrt{2}", "5√2", r"\sqrt{2}\times 5",
            r"5 \cdot 2^{\frac{1}{2}}", "sqrt(50)", r"10/\sqrt2",
        ],
        [
            r"5\sqrt{3}", r"2\sqrt{5}", "7.07", r"\sqrt{2}", "7.0710678", r"-5\sqrt2",
            r"25\sqrt2", r"\sqrt{10}", r"5\sqrt{20}", r"\sqrt[3]{50}",
        ],
    ),
    "roots2": (
        r"\frac{\sqrt{3}}{3}",
        [
            r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}{3}", r"\sqrt3/3", r"\sqrt{\frac13}",
            "3^{-1/2}", r"\frac13\sqrt3", r"\frac{1}{3}\sqrt{3}", r"\tan 30^\circ",
            r"\tan\frac{\pi}{6}", r"\tfrac{\sqrt{3}}{3}",
        ],
        [
            r"\sqrt3", r"\frac{\sqrt{3}}{2}", r"\frac{3}{\sqrt3}", "0.577", r"\frac{\sqrt{2}}{3}",
        ],
    ),
    "roots3": (
        r"2+\sqrt{3}",
        [
            r"\sqrt3+2", r"\frac{1}{2-\sqrt3}", r"\sqrt{7+4\sqrt3}", r"2 + \sqrt{3}",
            r"\frac{4+2\sqrt3}{2}",
        ],
        [
            r"2-\sqrt3", r"\sqrt{5}", r"2\sqrt3", "3.732", r"3+\sqrt2",
        ],
    ),
    "cuberoot": (
        r"\sqrt[3]{4}",
        [
            "4^{1/3}", "2^{2/3}", r"\sqrt[3]{4}", r"\frac{2}{\sqrt[3]{2}}", "cbrt(4)",
        ],
        [
            r"\sqrt{4}", r"\sqrt[4]{3}", "4/3", "1.587",
        ],
    ),
    "pi": (
        r"9\pi",
        [
            r"9\pi", r"\pi\cdot 9", r"9 \pi", "9π", r"\pi 9", "9*pi", "9pi", r"\frac{18\pi}{2}",
            r"9 \cdot \pi", r"3^2\pi", r"9\times\pi", r"9\pi\text{ cm}^2",
        ],
        [
            "9", r"\pi", "28.27", "28.274", "9.0", r"6\pi", r"9\pi^2", r"18\pi", r"9+\pi",
            r"\frac{9}{\pi}",
        ],
    ),
    "pi2": (
        r"\frac{\pi}{4}",
        [
            r"\pi/4", r"\frac{1}{4}\pi", r"0.25\pi", r"\arctan 1", r"\tan^{-1}(1)",
            r"\frac{\pi}4", r"45^\circ",
        ],
        [
            r"\frac{4}{\pi}", r"\pi/2", "0.785", r"\frac{\pi}{3}",
        ],
    ),
    "log": (
        r"\ln 9",
        [
            r"2\ln 3", r"\ln(9)", r"\ln{9}", r"\ln 3^2", "ln 9", r"\log_e 9", r"2 \ln(3)",
            r"\ln 3+\ln 3", r"\ln 18-\ln 2", r"2\ln{3}",
        ],
        [
            r"\ln 3", r"\ln 6", r"3\ln 2", "9", r"\log 9", "e^9", r"2\ln 9", "2.197",
        ],
    ),
    "log2": (
        r"\log_2 3",
        [
            r"\frac{\ln 3}{\ln 2}", r"\log_2(3)", r"\log_{2}{3}", r"\frac{\log 3}{\log 2}",
        ],
        [
            r"\log_3 2", r"\frac32", "1.585",
        ],
    ),
    "exp": (
        "e^2",
        [
            "e^{2}", r"e\cdot e", r"\exp(2)", "exp(2)", "e^{2.0}", r"\frac{1}{e^{-2}}",
        ],
        [
            "2e", "e", "7.389", "e^{-2}", "e^3",
        ],
    ),
    "numeric_power": (
        "243",
        [
            "3^5", "3^{5}", "243", r"9\cdot 27", "3*81", r"81\times3", "3**5", r"\sqrt{59049}",
            r"3^4\cdot 3",
        ],
        [
            "5^3", "3^4", "242", "3^{-5}", r"3\cdot5", "3^5+1", "2^{43}",
        ],
    ),
    "sci": (
        "45000",
        [
            r"4.5\times 10^{4}", "4.5e4", r"4.5 \cdot 10^4", "4.5E4", r"45\times10^3",
            r"4.5\times10^4", "4.5 × 10^4", "4.5*10^4", "45 thousand", r"4.5 \times {10}^{4}",
        ],
        [
            r"4.5\times 10^{3}", r"4.5\times10^{-4}", r"4.5\times 10^5", r"5.4\times10^4", "45",
            "4.5",
        ],
    ),
    "sci2": (
        r"3.2\times 10^{-5}",
        [
            "0.000032", "3.2e-5", r"3.2\cdot10^{-5}", r"32\times10^{-6}", r"\frac{32}{1000000}",
        ],
        [
            r"3.2\times10^{5}", "0.00032", "3.2", r"3.2\times10^{-4}",
        ],
    ),
    "poly": (
        "2x^2+7x+3",
        [
            "(2x+1)(x+3)", "2x^2+7x+3", "3+7x+2x^2", "2x^{2}+7x+3", "x(2x+7)+3", "2x²+7x+3",
            "2*x^2+7*x+3", "2x**2+7x+3", "(x+3)(2x+1)", r"2(x+\frac12)(x+3)", "f(x)=2x^2+7x+3",
            "y=2x^2+7x+3", "2 x^2 + 7 x + 3", r"2x\cdot x+7x+3", "(1+2x)(3+x)",
            "2x^2 + 6x + x + 3",
        ],
        [
            "(2x+3)(x+1)", "2x^2-7x+3", "2x^2+7x", "2y^2+7y+3", "2x^2+7x+3.0001", "x^2+7x+3",
            "2x^2+7x-3", "2x+7x+3", "2x^27x+3", "2x^2+7x+3=0",
        ],
    ),
    "poly2": (
        "x^2-9",
        [
            "(x-3)(x+3)", "-9+x^2", "(x+3)(x-3)", r"x\cdot x - 9", "x^{2}-9", "-(9-x^2)",
            "x^2 - 3^2",
        ],
        [
            "x^2+9", "(x-3)^2", "9-x^2", "x^2", "x-9", "(x-3)", "2x^2-9", "X^2-9",
        ],
    ),
    "ratfun": (
        r"\frac{2}{x+3}",
        [
            "2/(x+3)", r"\frac{4}{2x+6}", r"\frac{2}{3+x}", "2(x+3)^{-1}", r"\frac{2x}{x^2+3x}",
            r"\frac{-2}{-x-3}", r"\dfrac{2}{x+3}",
        ],
        [
            r"\frac{2}{x-3}", "2/x+3", r"\frac{x+3}{2}", r"\frac{2}{x}+3", r"\frac{1}{x+3}",
        ],
    ),
    "exponent": (
        "3^{n+2}",
        [
            r"9\cdot 3^n", r"3^n\cdot 9", "3^{2+n}", r"3^{n}\cdot3^2", r"27\cdot3^{n-1}",
            r"\frac{3^{n+3}}{3}", "3^(n+2)", "9(3^n)",
        ],
        [
            "3^{n}+2", "3^{2n}", "9^n", "3^{n+3}", "3^n+9", r"6\cdot3^n", "3n+2",
        ],
    ),
    "trig": (
        r"\tan^2(y)+1",
        [
            r"\sec^2(y)", r"\sec^2 y", r"\frac{1}{\cos^2 y}", r"1+\tan^2 y", r"\tan^2 y + 1",
            r"(\tan y)^2+1", r"\frac{\sin^2 y}{\cos^2 y}+1", "sec^2(y)", r"\sec^{2}(y)",
            r"1+\tan(y)\tan(y)", r"\frac{1}{1-\sin^2(y)}",
        ],
        [
            r"\csc^2(y)", r"\tan^2(y)-1", r"\tan^2(y+1)", r"\sec(y)", r"\tan(y)+1", r"\sec^2(x)",
            "1",
        ],
    ),
    "trig2": (
        r"\sin(2x)",
        [
            r"2\sin x\cos x", r"2\sin(x)\cos(x)", r"\sin 2x", r"2\cos x\sin x", r"\sin{2x}",
            r"2 \sin x \cdot \cos x",
        ],
        [
            r"2\sin x", r"\sin x\cos x", r"\sin^2 x", r"\cos(2x)", r"\sin(2)x", r"\sin(x)",
        ],
    ),
    "trig3": (
        r"\frac{\sqrt{3}}{2}",
        [
            r"\sin 60^\circ", r"\sin(\frac{\pi}{3})", r"\cos 30^{\circ}", r"\cos\frac{\pi}{6}",
            r"\sqrt{3}/2", r"\sin\left(\frac{\pi}{3}\right)",
        ],
        [
            r"\sin 60", r"\frac12", "0.866", r"\sin 30^\circ",
        ],
    ),
    "complex": (
        "2-5i",
        [
            "-5i+2", "2-5i", "2 - 5 i", r"2-5\mathrm{i}", "2+(-5)i", "(2-5i)", "-(5i-2)",
            r"2 - 5\cdot i", r"\frac{4-10i}{2}",
        ],
        [
            "2+5i", "5-2i", "-2-5i", "2-5", "2-5j", "7i", "-3", "2-5i^2", "2i-5",
        ],
    ),
    "complex2": (
        "-i",
        [
            r"\frac{1}{i}", "i^3", "-1i", "-i", "0-i", r"e^{-i\pi/2}",
        ],
        [
            "i", "-1", "1", "i^2",
        ],
    ),
    "equation": (
        "7",
        [
            "x=7", "k = 7", "x = 7.0", "7=x", r"x=\frac{14}{2}", "y = 7", r"\theta = 7",
            r"n=7\text{ cm}", "x=3+4=7", "3+4=7", "x_1=7", r"\text{Area}=7", "a_7 = 7", "f(2)=7",
            "m=7",
        ],
        [
            "x=-7", "x=8", "x>7", r"x\ne 7", "x=7y", "7=8", "x=7, y=8", r"x\geq 7", "x=7=8",
            r"x\approx 8", "x+1=7",
        ],
    ),
    "equation2": (
        "y=3x-4",
        [
            "y=-4+3x", "y = 3x - 4", "y=3x-4", "3x-4=y", "3x-4", "y-3x=-4", r"y=3(x-\frac43)",
            "3x-y=4", "3x - y - 4 = 0", "2y=6x-8",
        ],
        [
            "y=3x+4", "y=4x-3", "y=3x", "x=3y-4", "y=-3x-4", "y+3x=4", "y>3x-4", "y=3x-4+z",
            "0=0", "-4", "y^2=(3x-4)^2",
        ],
    ),
    "equation3": (
        "x^2+y^2=25",
        [
            "x^2 + y^2 = 25", "y^2+x^2=25", "x^2+y^2-25=0", "25=x^2+y^2", "x^2+y^2=5^2",
        ],
        [
            "x^2+y^2=5", "x^2-y^2=25", "x+y=5", "25", "x^2+y^2", "(x+y)^2=25",
        ],
    ),
    "xeq": (
        "x=5",
        [
            "5", "x=5", "x = 5.0", "5=x", r"x=\frac{10}{2}",
        ],
        [
            "y=5", "2x=11", "-5", "x=-5", "x>5",
        ],
    ),
    "ineq": (
        "x>3",
        [
            "x > 3", "3<x", r"(3,\infty)", r"x\in(3,\infty)", r"x\gt 3", r"(3, +\infty)",
            r"\{x : x>3\}", "3 < x", r"\{x|x>3\}", "(3,∞)",
        ],
        [
            "x<3", r"x\ge3", r"[3,\infty)", "x>4", "3", "x=3", r"(-\infty,3)", r"(3,\infty]",
            "x>-3", "y>3",
        ],
    ),
    "ineq2": (
        r"-2\le x<5",
        [
            "[-2,5)", r"-2\leq x<5", r"5>x\ge-2", r"x\in[-2,5)", r"-2 \leqslant x < 5",
            r"x\ge -2\text{ and }x<5", "[-2, 5)",
        ],
        [
            "-2<x<5", "(-2,5]", "[-2,5]", r"-2\le x\le 5", "x<5", r"-2\le x<6", "[-2,5",
        ],
    ),
    "interval": (
        "(2,7]",
        [
            "(2,7]", "(2, 7]", r"\left(2,7\right]", r"2<x\le7", r"x\in(2,7]", "( 2 , 7 ]",
            r"2 < x \leq 7", "(2.0,7]",
        ],
        [
            "(2,7)", "[2,7]", "[2,7)", "(2,8]", "2,7", r"\{2,7\}", "(7,2]", "[2,7)",
        ],
    ),
    "closed": (
        "[0,1]",
        [
            "[0,1]", "[0, 1]", r"0\le x\le 1", r"\left[0,1\right]", r"x \in [0,1]",
        ],
        [
            "[0,1)", "(0,1)", "(0,1]", "0<x<1", r"\{0,1\}", "0,1", "(0,1)",
        ],
    ),
    "union": (
        r"(0,1)\cup(1,3)",
        [
            r"(1,3)\cup(0,1)", r"(0,1) \cup (1,3)", "(0,1)∪(1,3)", r"(0,3)\setminus\{1\}",
            r"x\in(0,1)\cup(1,3)", r"\left(0,1\right)\cup\left(1,3\right)", "(0, 1) U (1, 3)",
            r"0<x<1\text{ or }1<x<3",
        ],
        [
            "(0,3)", r"(0,1]\cup(1,3)", r"(0,1)\cup(1,4)", "(0,1)", r"[0,1)\cup(1,3)",
            r"(0,1)\cap(1,3)", "(0,1),(1,3)x",
        ],
    ),
    "union2": (
        r"(-\infty,-2)\cup(2,\infty)",
        [
            r"x<-2\text{ or }x>2", r"(-\infty,-2) \cup (2,+\infty)", "x < -2 or x > 2",
            r"(2,\infty)\cup(-\infty,-2)",
        ],
        [
            r"(-\infty,\infty)", "(-2,2)", r"(-\infty,-2]\cup[2,\infty)", r"x<-2\text{ and }x>2",
        ],
    ),
    "set": (
        r"\{4,9\}",
        [
            r"\{9, 4\}", r"\{4, 9\}", r"\left\{4,9\right\}", "4,9", "9,4", "{4,9}", r"\{4;9\}",
            r"4\text{ and }9", "4, 9", r"x\in\{4,9\}", r"\{ 4 , 9 \}", r"\{4,9,9\}",
            r"\{\frac82,3^2\}", r"\lbrace 4,9\rbrace",
        ],
        [
            r"\{4\}", r"\{4,9,1\}", r"\{4,8\}", "(4,9)", "[4,9]", "49", r"\{4.9\}", r"\{-4,9\}",
        ],
    ),
    "emptyset": (
        r"\emptyset",
        [
            r"\emptyset", r"\varnothing", r"\{\}", "∅", r"\left\{\right\}",
        ],
        [
            "0", r"\{0\}", r"\{\emptyset,1\}", r"\{1\}",
        ],
    ),
    "tuple": (
        "(2,-1)",
        [
            "(2,-1)", "(2, -1)", r"\left( 2,-1 \right)", "(x,y)=(2,-1)", "(2,-1.0)", "(2;-1)",
            r"(\frac42,-1)", "( 2 , -1 )", r"\left(2,-1\right)", r"\langle 2,-1\rangle",
            "(2, −1)",
        ],
        [
            "(-1,2)", "(2,1)", "(2,-1,0)", "2,-1x", r"\{2,-1\}", "[2,-1]", "(2,-1]", "1", "(2-1)",
            "(-2,-1)", "2-1",
        ],
    ),
    "tuple2": (
        r"\left(3,\frac{\pi}{2}\right)",
        [
            r"(3, \pi/2)", r"(3,\frac{\pi}{2})", r"(3, \frac{1}{2}\pi)", r"(3,0.5\pi)",
            r"\left(3, \frac{\pi}{2}\right)",
        ],
        [
            r"(3,\pi)", r"(\frac{\pi}{2},3)", "(3,1.57)", r"(3,\frac{\pi}{3})", "(3,90)",
        ],
    ),
    "triple": (
        "(1,2,3)",
        [
            "(1,2,3)", "(1, 2, 3)", r"\left(1,2,3\right)",
        ],
        [
            "(3,2,1)", "(1,2)", "1,2,3x", "6", "(1,2,4)", "123", "(1,23)",
        ],
    ),
    "list": (
        "3, 7",
        [
            "3,7", "3, 7", "7, 3", "3 and 7", r"3\text{ and }7", "x=3,x=7",
            r"x=3 \text{ or } x=7", "3 or 7", "7,3", "x=3, 7", r"\{3,7\}", "3;7",
        ],
        [
            "37", "3", "7", "3,7,7", "3, 8", "(3,7)", "3.7", "-3,7", "3+7",
        ],
    ),
    "pm": (
        r"\pm 5",
        [
            "5,-5", "-5,5", r"\pm5", r"x=\pm5", r"5\text{ or }-5", "±5", r"\{-5,5\}", "+5,-5",
            "x=5,x=-5", "5 and -5",
        ],
        [
            "5", "-5", "5,5", r"\pm 6", "25", "0,5",
        ],
    ),
    "pm2": (
        r"3\pm\sqrt{2}",
        [
            r"3+\sqrt2,3-\sqrt2", r"3-\sqrt{2}, 3+\sqrt{2}", r"3 \pm \sqrt{2}",
            r"\frac{6\pm\sqrt{8}}{2}", r"x=3\pm\sqrt2", r"3\mp\sqrt2",
            r"3+\sqrt2\text{ and }3-\sqrt2",
        ],
        [
            r"3+\sqrt2", r"3\pm\sqrt3", r"-3\pm\sqrt2", r"2\pm\sqrt3", r"3+\sqrt2,3+\sqrt2",
        ],
    ),
    "matrix": (
        r"\begin{pmatrix} 0 & 3 \\ 0 & -1 \end{pmatrix}",
        [
            r"\begin{pmatrix}0&3\\0&-1\end{pmatrix}",
            r"\begin{bmatrix} 0 & 3 \\ 0 & -1 \end{bmatrix}",
            r"\begin{pmatrix}0&3\\0&-1\\\end{pmatrix}",
            r"\left(\begin{array}{cc}0&3\\0&-1\end{array}\right)",
            r"\begin{pmatrix}0&\frac62\\0&-1\end{pmatrix}",
            r"\begin{pmatrix}0 & 3\\ 0 & -1.0\end{pmatrix}",
            r"\left[\begin{matrix}0&3\\0&-1\end{matrix}\right]",
        ],
        [
            r"\begin{pmatrix}0&3\\0&1\end{pmatrix}", r"\begin{pmatrix}0&0\\3&-1\end{pmatrix}",
            r"\begin{pmatrix}0&3&0&-1\end{pmatrix}", r"\begin{pmatrix}0&3\end{pmatrix}",
            "(0,3,0,-1)", r"\begin{pmatrix}3&0\\0&-1\end{pmatrix}", "0",
        ],
    ),
    "vector": (
        r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}",
        [
            r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{bmatrix}1\\-2\end{bmatrix}",
            r"\begin{pmatrix} 1 \\ -2 \\ \end{pmatrix}",
        ],
        [
            r"\begin{pmatrix}1&-2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix}-2\\1\end{pmatrix}", "-1",
        ],
    ),
    "degrees": (
        r"120^\circ",
        [
            r"120^{\circ}", "120", "120 degrees", "120°", r"120\text{ degrees}", r"120^\circ.",
            r"\frac{2\pi}{3}", r"120\degree", r"120.0^\circ", r"\angle A = 120^\circ",
            "m∠ABC = 120°",
        ],
        [
            r"60^\circ", r"12^\circ", r"210^\circ", r"-120^\circ", r"120\pi", r"\frac{\pi}{3}",
            r"1\angle 20^\circ", r"1 ∠ 20^\circ",
        ],
    ),
    "temperature": (
        r"72^\circ\text{C}",
        [
            r"72^\circ C", "72°C", "72", r"72^\circ\mathrm{C}", r"72\,^\circ\mathrm{~C}",
        ],
        [
            "27°C", "72°F", r"72^\circ\text{F}", "C",
        ],
    ),
    "unit after a fixed space": (
        r"25 \mathrm{~cm}^{2}",
        [
            "25", r"25 \mathrm{~cm}^2", r"25\text{~cm}^2", r"25\mathrm{\,cm}^2",
            r"25.0 \text{ cm}^2",
        ],
        [
            "5", r"25 \mathrm{~m}^2", r"26 \mathrm{~cm}^2",
        ],
    ),
    "length of a segment": (
        "5",
        [
            "|AB| = 5", "AB = 5", r"|AB|=5 \mathrm{~cm}",
        ],
        [
            "|AB| = 6", "|A| = 6",
        ],
    ),
    "base": (
        "1011_2",
        [
            "1011_2", "1011_{2}", "(1011)_2", "1011_{two}", r"\text{1011}_2",
            r"1011_{\text{two}}", "1011_{(2)}", "1011_{ 2 }", "$1011_2$", "01011_2",
        ],
        [
            "1101_2", "1011_3", "1011", "11", "10112", "1011_{10}", "13_8", "1010_2", "B_{16}",
            "1011^2",
        ],
    ),
    "base16": (
        "2B_{16}",
        [
            "2B_{16}", "2b_{16}", r"\text{2B}_{16}",
        ],
        [
            "2B", "43", "2A_{16}", "2B_{12}",
        ],
    ),
    "choice": (
        "C",
        [
            "C", r"\text{C}", "(C)", "C.", r"\textbf{C}", r"\textbf{(C)}", r"\text{(C)}",
            r"(\text{C})", "C)", "c", r"\mathrm{C}", r"\mathbf{C}", "Option C", "(C) 15", "C) 15",
            "C: 15", "C. 15", r"\text{(C) }15", "(c)", "option (C)", r"\textbf{(C) } 15",
        ],
        [
            "A", "(A)", "B", "D", r"\text{B}", "CC", "C or D", "A, C", "AC", "C and D",
            r"\text{A}", "not C", "C, D", "(A) C", "3", "(C) or (D)", "E",
        ],
    ),
    "choice2": (
        r"\text{(B)}",
        [
            "B", "(B)", r"\text{B}", r"\textbf{(B)}",
        ],
        [
            "A", "C", r"\text{D}", "8",
        ],
    ),
    "inf": (
        r"\infty",
        [
            r"\infty", r"+\infty", "∞", "infinity", r"\text{infinity}", "inf",
        ],
        [
            r"-\infty", "0", r"\frac10", "1", "100000", r"\text{DNE}", r"\frac{1}{\infty}",
        ],
    ),
    "neginf": (
        r"-\infty",
        [
            r"-\infty", "−∞", "-infinity",
        ],
        [
            r"\infty", "0",
        ],
    ),
    "fact": (
        "120",
        [
            "5!", "120", r"\frac{6!}{6}", r"5\cdot4!", r"\binom{10}{3}", r"\binom{16}{2}",
        ],
        [
            "4!", "6!", "5", "5!!", r"\binom{10}{2}", "(5!)!",
        ],
    ),
    "binom": (
        r"\binom{10}{3}",
        [
            "120", r"\binom{10}{7}", r"\frac{10!}{3!7!}", r"\dbinom{10}{3}", r"{10\choose 3}",
            r"\tbinom{10}{3}", r"\frac{10!}{3!\cdot 7!}", r"\frac{10\cdot9\cdot8}{6}",
        ],
        [
            r"\binom{10}{4}", r"\frac{10}{3}", "30", r"\binom{3}{10}", r"\frac{10!}{7!}",
        ],
    ),
    "factvar": (
        "n!",
        [
            r"n\cdot(n-1)!", "n!", "n(n-1)!",
        ],
        [
            "(n-1)!", "(n+1)!", "n^n", "n",
        ],
    ),
    "text": (
        r"\text{Monday}",
        [
            "Monday", r"\text{Monday}", "monday", r"\text{ Monday }", "Monday.",
            r"\textbf{Monday}", r"\mathrm{Monday}", "MONDAY", '"Monday"', r"\text{monday}",
        ],
        [
            "Tuesday", r"\text{Sunday}", "not Monday", "Monday or Tuesday", "Mon", "M", "Mondays",
            r"\text{Monday and Tuesday}", "Mnoday",
        ],
    ),
    "yes": (
        r"\text{Yes}",
        [
            "Yes", "yes", r"\text{yes}", "YES", r"\textbf{Yes}", "Yes.",
        ],
        [
            "No", r"\text{no}", "Yse", "Yes and no", "Y",
        ],
    ),
    "even": (
        r"\text{even}",
        [
            "even", r"\text{Even}", "Even",
        ],
        [
            "odd", "neither", "eve",
        ],
    ),
    "name": (
        "Evelyn",
        [
            r"\text{Evelyn}", "Evelyn", "evelyn",
        ],
        [
            "Briana", "Eve", "Evelyn and Bob",
        ],
    ),
    "units": (
        r"10\text{ cm}",
        [
            "10", "10 cm", r"10\text{ cm}", r"10\,\text{cm}", r"10\ \mathrm{cm}",
            r"10\text{ centimeters}", "10cm", r"10 \text{cm}", "10.0 cm", r"10~\text{cm}",
            r"10\operatorname{cm}",
        ],
        [
            "10 m", r"10\text{ inches}", r"100\text{ cm}", r"1\text{ cm}", r"10\text{ cm}^2",
            "11 cm", "0.1 cm",
        ],
    ),
    "units2": (
        r"12\text{ square feet}",
        [
            "12", r"12\text{ ft}^2", "12 ft^2", r"12\text{ square feet}", r"12\text{ sq ft}",
            "12 square feet", r"12\ \text{ft}^{2}",
        ],
        [
            r"12\text{ ft}", r"12\text{ cubic feet}", "144", r"12\text{ m}^2",
        ],
    ),
    "units3": (
        r"60\text{ mph}",
        [
            "60", "60 mph", r"60\text{ miles per hour}", "60 miles per hour", r"60\text{ mph}",
        ],
        [
            r"60\text{ km/h}", "16", "60 miles",
        ],
    ),
    "units4": (
        "72",
        [
            "72 clips", r"72\text{ clips}", "72 apples", "72 years old", r"72\text{ years}",
            "72 km/h", r"72\text{ m/s}", "72 m", "72 hours", r"72\text{ square units}",
            "72 minutes", r"72\text{ people}", r"72 \text{ cm}^3", r"72\text{ cm}^{3}", "72 dogs",
            "72 men", r"\$72", "72 cups of flour",
        ],
        [
            "27 clips", "72 million", "7.2 apples", "72x", "72xy", "72m", "72/60", "72 or 73",
            "72 dozen", "72 plus 1", "72 squared", "72k", "72 percent of 10", "72 half",
            "72 minus 1",
        ],
    ),
    "million": (
        "5000000",
        [
            "5 million", r"5\text{ million}", "5{,}000{,}000", "5,000,000", r"\$5 million",
            "5 million dollars", r"5\times10^6", r"5\,000\,000",
        ],
        [
            "5", "500000", "50 million", "5 billion",
        ],
    ),
    "abs": (
        "|x|",
        [
            "|x|", r"\left|x\right|", r"\sqrt{x^2}", r"\lvert x\rvert", "abs(x)", "|-x|",
            r"\left\lvert x \right\rvert",
        ],
        [
            "x", "-x", "x^2", "|y|", r"\sqrt{x}", r"(\sqrt{x})^2",
        ],
    ),
    "var": (
        "x",
        [
            "x", "1x", r"\frac{2x}{2}", "x^1", r"x\cdot1", r"(\sqrt{x})^2", r"\sqrt[3]{x^3}",
        ],
        [
            "|x|", r"\sqrt{x^2}", "-x", "y", "X", "x^2", "2x", "1",
        ],
    ),
    "ratio": (
        "3:2",
        [
            "3:2", "3 : 2", r"3\colon2",
        ],
        [
            "2:3", "3:4", "32", "3,2",
        ],
    ),
    "ab": (
        r"\frac{a+b}{2}",
        [
            "(a+b)/2", r"\frac{1}{2}(a+b)", "0.5(a+b)", r"\frac{b+a}{2}", r"\frac a2+\frac b2",
        ],
        [
            r"a+\frac b2", r"\frac{a-b}{2}", "ab/2", "a+b",
        ],
    ),
    "multi": (
        "x_1+x_2",
        [
            "x_2+x_1", "x_{1}+x_{2}", "x_1 + x_2",
        ],
        [
            "x_1-x_2", "2x_1", "x+x", "x_1x_2",
        ],
    ),
    "nested": (
        r"\frac{3}{4}",
        [
            r"\frac{1}{1+\frac{1}{3}}", r"\frac{1}{1+\frac13}", r"\cfrac{1}{1+\cfrac{1}{3}}",
            r"\frac{\frac{3}{2}}{2}", "0.75", r"\frac{\frac{1}{2}}{\frac{2}{3}}",
        ],
        [
            r"\frac43", r"\frac{1}{1+3}", r"\frac{1+\frac13}{1}", r"\frac{4}{3}",
        ],
    ),
    "zero": (
        "0",
        [
            "0", "0.0", "-0", r"\sin\pi", r"0\text{ cm}", "5-5", "+0", r"\frac{0}{5}",
        ],
        [
            "1", "0.0001", r"\frac{1}{0}", r"\emptyset", r"\frac{0}{0}", "10^{-100}", "e^{-1000}",
            "o", "O",
        ],
    ),
    "near": (
        "64",
        [
            "64", "2^6", "8^2", "64.0", r"\frac{128}{2}", "4^3",
        ],
        [
            "6400", "0.64", "640", "6.4", "-64", "64.5", "63", "65", "46", r"\frac{64}{10}",
            "64.01", "64.0000001", r"64\ldots", "64?", "~",
        ],
    ),
    "hedge": (
        "18",
        [
            "18",
        ],
        [
            "17 or 18", "18, 19", "17,18", "18 or 17", "17<x<19", r"\text{the reference answer}",
            r"18\pm1", "18 (or maybe 17)", r"17\text{ or }18", "either 17 or 18", "{17,18}",
            r"\{17,18\}", "[17,19]", "(17,19)", "x", r"x\approx 18.4", r"\text{all of the above}",
            r"\text{any}", r"18 \ne 17", "not 18", r"\ge 18", ">17", "18 and 19", "18/17",
            r"\text{18 or 19}", "between 17 and 19", "17-19", "18-", "1..100", r"\in\mathbb{Z}",
            "x=17 or x=18", "18;19", r"17\le x\le 18", "N/A", "1 8", "n", r"\text{solution}",
            "answer", r"\{1,2,...,100\}", r"18 \text{ or } 24", r"18\text{ (but maybe 17)}",
            "18 (17)", "18|17", "18 = 17", "18?", "18 or more", "at least 18", "about 18 or so",
            r"\text{correct}", r"\mathbb{R}", r"\mathbb{N}", r"(-\infty,\infty)", "18+C",
            "18+x-x+1", "_", "*", ".*", r"\text{same as the reference}", r"\boxed{}",
            r"17 \text{ and } 18", "18 if x>0, 17 otherwise", r"18\text{ if }x", r"x\mid 18",
        ],
    ),
    "chars": (
        "12",
        [
            "12",
        ],
        [
            "１２", "١٢", "1\u200b2", "1\u202e2", "1_2", "0x0c", "0b1100", "0o14", "12j", "NaN",
            "nan", "inf", "1e1+2x", "①②", '"12', "12#", "12@", r"\x31\x32", "1²", "Ⅻ", "十二",
            r"12\n13", "12L_", "twelve?", "1'2", "1`2", "%12", "12&", "chr(49)", "12if 1 else 0",
            "lambda:12", "12 if True else 0", "[12][0]", "(12).real", "12;import os",
            "12.__class__",
        ],
    ),
    "mod": (
        r"3 \pmod{7}",
        [
            r"3 \pmod{7}", r"3\pmod{7}",
        ],
        [
            "3", r"4\pmod 7",
        ],
    ),
    "sum": (
        r"\sum_{k=1}^{n} k",
        [
            r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n}k",
        ],
        [
            r"\sum_{k=1}^{n} k^2", "n",
        ],
    ),
    "sqrtx": (
        r"x\sqrt{x}",
        [
            "x^{3/2}", r"\sqrt{x^3}", r"x^{\frac32}", r"x\cdot\sqrt x",
        ],
        [
            "x^2", r"\sqrt{x}", "x^{2/3}",
        ],
    ),
    "lnx": (
        r"\ln(x)+\ln(2)",
        [
            r"\ln(2x)", r"\ln 2x", r"\ln x+\ln 2", r"\ln{2x}",
        ],
        [
            r"\ln(x+2)", r"\ln(x)\ln(2)", r"2\ln x", r"\log(2x)",
        ],
    ),
    "plusC": (
        r"\frac{x^3}{3}+C",
        [
            r"\frac13x^3+C", r"\frac{x^3}{3}+C", r"C+\frac{x^3}{3}", "x^3/3+C",
        ],
        [
            r"\frac{x^3}{3}", "x^3+C", r"\frac{x^3}{3}+1",
        ],
    ),
    "log10": (
        "2",
        [
            r"\log 100", r"\log_{10}100", r"\log_3 9", r"\lg 100",
        ],
        [
            r"\ln 100", r"\log 10",
        ],
    ),
    "floor": (
        "3",
        [
            r"\lfloor 3.7\rfloor", r"\lceil 2.1 \rceil", r"\left\lfloor \pi \right\rfloor",
            r"\max(1,3)", r"\gcd(9,6)",
        ],
        [
            r"\lceil 3.1\rceil", r"\pi",
        ],
    ),
    "points": (
        "(1,2),(3,4)",
        [
            "(1,2),(3,4)", "(3,4),(1,2)", r"(1,2)\text{ and }(3,4)", "(1, 2), (3, 4)",
            r"\{(1,2),(3,4)\}",
        ],
        [
            "(2,1),(4,3)", "(1,2)", "(1,2,3,4)", "(1,4),(3,2)",
        ],
    ),
    "approximate": (
        "3.14",
        [r"\approx 3.14", r"x\approx 3.14", "≈ 3.14"],
        [r"\approx 3.1", r"\approx 3"],
    ),
    "approximate_integer": (
        "18",
        [r"x = 17.6 + 0.4 = 18", r"\text{The answer is }18"],
        [r"\approx 18", r"x\approx 18", "18...", r"18\ldots", r"\text{anything but: }18",
         r"\text{not }18", r"\text{The answer is not }18", "~18", r"\sim 18"],
    ),
    "sci_letter": (
        "45000",
        ["4.5 x 10^4", "4.5x10^4", "4.5 X 10^{4}", r"\textbf{45,000}", "45~000"],
        ["4.5 x 10^5", "4.5x", "4.5 x 10", "4.5 x^4"],
    ),
    "over": (
        r"\frac{a+1}{b}",
        [r"{a+1\over b}", r"\nicefrac{a+1}{b}", r"{{a+1} \over {b}}"],
        [r"{a+1 \over b+1}", r"a+{1\over b}"],
    ),
    "point_by_names": (
        "(2,-1)",
        ["x=2, y=-1", "x=2,y=-1", r"x = 2 \text{ and } y = -1"],
        ["x=-1, y=2", "y=2, x=-1", "x=2", "x=2, x=-1", "x=2, y=1"],
    ),
    "numbered_roots": (
        "3, 7",
        ["x_1=3, x_2=7", r"x_1 = 7 \text{ and } x_2 = 3"],
        ["x_1=3, x_2=8", "x=3, y=7", "x_1=3"],
    ),
    "base_in_words": (
        "1011_2",
        ["1011 base 2", r"1011 \text{ (base 2)}", r"1011_\text{two}", "1011 in base two"],
        ["1011 base 3", "1011 base", "base 2"],
    ),
    "currency_before": (
        "45",
        ["US\\$45", "USD 45", "EUR 45.00", "GBP 45"],
        ["USD 54", "US 4.5", "45 45"],
    ),
    "difference_of_sets": (
        r"(0,1)\cup(1,3)",
        [r"x\in(0,3), x\ne 1", r"(0,1) \bigcup (1,3)", r"0<x<3\text{ and }x\neq 1"],
        [r"x\in(0,3), x\ne 2", r"x\in(0,3)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_every_dress_of_the_reference_is_right(kind):
    reference, right, _ = CASES[kind]
    assert [answer for answer in right if not compare(answer, reference).right] == []


@pytest.mark.parametrize("kind", CASES)
def test_what_only_looks_like_the_reference_is_wrong(kind):
    reference, _, wrong = CASES[kind]
    assert [answer for answer in wrong if compare(answer, reference).right] == []


@pytest.mark.parametrize("kind", CASES)
def test_the_reference_equals_itself_in_a_box_and_a_tag(kind):
    reference = CASES[kind][0]
    completions = [f"So \\boxed{{{reference}}}.", f"So <answer> {reference} </answer>"]
    assert good_accuracy(completions, [reference] * 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "is_parsed"),
    [("5", True), (r"\frac{1}{2}", True), ("x+", False), ("so there are many", False), ("", False)],
)
def test_an_answer_outside_the_grammar_is_reported_as_unparsed(answer, is_parsed):
    assert compare(answer, "7") == (False, is_parsed)
