"""Questions that want a plugin: arithmetic for the calculator, equations for the solver, in many wordings and two languages."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt

NO_RESULT = "No result: division by zero."


@dataclass
class Task:
    """A question, the command it needs, and how its answer is worded, with {e} the expression and {r} the result."""

    question: str
    plugin: str  # Calculate or Solve
    argument: str
    result: str  # as the plugin gives it
    answer: str

    @property
    def command(self) -> str:
        return f'{self.plugin}("{self.argument}")'

    @property
    def response(self) -> str:
        """What stands in Results."""
        return f"{self.command} => '{self.result}'" if self.plugin == "Calculate" else f"{self.command} =>\n{self.result}"


def calculate(expression: str) -> str | None:
    """What the calculator gives; None where that is long or in powers of ten, which is not asked here."""
    try:
        value = eval(expression.replace("^", "**"), {"__builtins__": {}, "sqrt": sqrt})
    except ZeroDivisionError:
        return NO_RESULT
    text = str(value)
    return text if "e" not in text and abs(value) < 10**12 else None


def shown(result: str) -> str:
    """A result as it stands in an answer: no .0, and of more than four decimals the first four and an ellipsis."""
    whole, _, decimals = result.partition(".")
    if not decimals or decimals == "0":
        return whole
    return f"{whole}.{decimals}" if len(decimals) <= 4 else f"{whole}.{decimals[:4]}…"


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def number(rng: random.Random, digits: int = 6, decimals: bool = True) -> str:
    """Of up to so many digits, short ones more often; now and then with decimals."""
    length = min(digits, rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6)))
    text = str(rng.randint(1 if length == 1 else 10 ** (length - 1), 10**length - 1))
    if decimals and rng.random() < 0.1:
        text += "." + str(rng.randint(1, 9)) if rng.random() < 0.6 else "." + str(rng.randint(0, 9)) + str(rng.randint(1, 9))
    return text


def expression(rng: random.Random) -> str:
    a, b, c, d = (number(rng, 6) for _ in range(4))
    o, p, q = (rng.choice("++--***/") for _ in range(3))
    forms = ((0.6, f"{a}{o}{b}"), (0.13, f"{a}{o}{b}{p}{c}"), (0.12, f"({a}{o}{b}){p}{c}"), (0.06, f"{a}{o}({b}{p}{c})"),
             (0.04, f"({a}{o}{b}){p}({c}{q}{d})"), (0.05, f"{a}{o}{b}{p}{c}{q}{d}"))  # fmt: skip
    return rng.choices([form for _, form in forms], [weight for weight, _ in forms])[0]


def written(expression: str, rng: random.Random, chinese: bool) -> str:
    """An expression as someone may type it: other signs, blanks."""
    text = expression
    if rng.random() < (0.4 if chinese else 0.2):
        text = text.replace("*", "×").replace("/", "÷")
    elif "sqrt" not in text and rng.random() < 0.1:
        text = text.replace("*", "x")
    if rng.random() < 0.5:
        text = re.sub(r"(?<=[\d)])([-+*/×÷x])", r" \1 ", text)
    return text


# ---- wordings ---------------------------------------------------------------------------------------------------------------

DIRECT = {
    "en": ("{e}", "{e}", "what is {e}", "what's {e}", "calculate {e}", "compute {e}", "{e} =", "{e} = ?", "how much is {e}",
           "please calculate {e}", "can you calculate {e}", "what does {e} give", "what do you get for {e}", "solve {e}",
           "tell me {e}", "i need {e}", "work out {e}", "what is the result of {e}", "what is the value of {e}", "evaluate {e}",
           "could you compute {e} for me", "find {e}", "{e} equals what", "{e} is how much", "use the calculator: {e}"),
    "zh": ("{e}", "{e}等于多少", "{e}是多少", "计算{e}", "计算一下{e}", "算一下{e}", "请计算{e}", "{e}=", "{e}=?", "帮我算{e}", "求{e}",
           "{e}的结果是多少", "{e}得多少", "{e}等于几", "请问{e}等于多少", "请算出{e}", "{e}的值是多少", "用计算器算{e}", "麻烦算一下{e}", "{e}是几"),
}  # fmt: skip
# (question, expression, digits of the numbers): {a}, {b}, {c} are numbers.
WORDED = {
    "en": (
        ("(what is |how much is |calculate |)(the sum of {a} and {b}|{a} plus {b}|{a} added to {b})", "{a}+{b}", 6),
        ("(what is |how much is |calculate |){a} (minus|less) {b}", "{a}-{b}", 6),
        ("(what is |how much is |calculate |){a} (times|multiplied by) {b}", "{a}*{b}", 5),
        ("(what is |how much is |calculate |)the product of {a} and {b}", "{a}*{b}", 5),
        ("(what is |how much is |calculate |){a} (divided by|over) {b}", "{a}/{b}", 6),
        ("(add|please add) {a} (and|to) {b}", "{a}+{b}", 6),
        ("(multiply|please multiply) {a} (by|with|and) {b}", "{a}*{b}", 5),
        ("divide {a} by {b}", "{a}/{b}", 6),
        ("(subtract|take) {a} from {b}", "{b}-{a}", 6),
        ("what is the difference between {a} and {b}", "{a}-{b}", 6),
        ("(what is |how much is |calculate |){a} (squared|to the power of two)", "{a}^2", 4),
        ("(what is |how much is |calculate |)({a} cubed|{a} to the power of three)", "{a}^3", 3),
        ("(what is |how much is |calculate |){p} (to the power of|to the power) {q}", "{p}^{q}", 1),
        ("(what is |how much is |calculate |){p}^{q}", "{p}^{q}", 1),
        ("(what is |how much is |calculate |)(the square root of|the root of|sqrt) {a}", "sqrt({a})", 5),
        ("(what is |how much is |calculate |){p}(%| percent) of {a}", "{a}*{p}/100", 5),
        ("how many percent (of {b} is {a}|is {a} of {b})", "{a}/{b}*100", 4),
        ("(i have|tom has|there are) {a} (apples|books|coins|stamps) and (get|gets|buy) {b} more, how many (is that|are there|in all)", "{a}+{b}", 4),
        ("(i had|anna had|a shop had) {a} (apples|books|pens|eggs) and (sold|lost|gave away) {b}, how many are left", "{a}-{b}", 4),
        ("(one|a) (book|ticket|pen|chair) costs {a} (dollars|euros|yuan), (how much are|what do) {b} (cost|of them)", "{a}*{b}", 4),
        ("{a} (apples|sweets|euros|coins) (shared|divided) (among|by) {b} (people|children|friends), how (many|much) (for each|does each get)", "{a}/{b}", 4),
        ("a car (drives|goes) {a} km (an|per) hour, how far (does it go|is it) in {b} hours", "{a}*{b}", 3),
        ("how long (does it take|do i need) for {a} km at {b} km an hour", "{a}/{b}", 4),
        ("what is the area of a (rectangle|room|field) of {a} (by|times) {b} (metres|m|cm)", "{a}*{b}", 4),
        ("what is the (average|mean) of {a}, {b} and {c}", "({a}+{b}+{c})/3", 4),
        ("what is the (average|mean) of {a} and {b}", "({a}+{b})/2", 4),
        ("{a} plus {b} (times|multiplied by) {c}", "{a}+{b}*{c}", 3),
        ("a (price|coat|bike) of {a} (dollars|euros) is (reduced|lowered) by {p} percent, what is the new price", "{a}*(100-{p})/100", 4),
        ("how many hours are {a} days", "{a}*24", 4),
        ("how many minutes are {a} hours", "{a}*60", 4),
        ("{a} (boxes|bags|rows) with {b} (pieces|balls|chairs) each, how many (in all|together|are there)", "{a}*{b}", 4),
        ("(what is |)(half|one half) of {a}", "{a}/2", 6),
        ("(what is |)(double|twice|two times) {a}", "{a}*2", 6),
    ),
    "zh": (
        ("{a}(加|加上|和){b}(等于多少|是多少|的和是多少|等于几|)", "{a}+{b}", 6),
        ("{a}(减|减去){b}(等于多少|是多少|等于几|得多少|)", "{a}-{b}", 6),
        ("{a}(乘|乘以|乘上){b}(等于多少|是多少|等于几|得多少|)", "{a}*{b}", 5),
        ("{a}(除以){b}(等于多少|是多少|等于几|得多少|)", "{a}/{b}", 6),
        ("{a}(和|与){b}的(积|乘积)(是多少|)", "{a}*{b}", 5),
        ("{a}(和|与){b}的差(是多少|)", "{a}-{b}", 6),
        ("(求|){a}的(平方|二次方)(是多少|)", "{a}^2", 4),
        ("(求|){a}的(立方|三次方)(是多少|)", "{a}^3", 3),
        ("{p}的{q}次方(是多少|等于多少|)", "{p}^{q}", 1),
        ("(求|){a}的(平方根|算术平方根)(是多少|)", "sqrt({a})", 5),
        ("(根号|求根号){a}(是多少|等于多少|)", "sqrt({a})", 5),
        ("{a}的(百分之{p}|{p}%)(是多少|等于多少|)", "{a}*{p}/100", 5),
        ("{a}(占|是){b}的百分之(几|多少)", "{a}/{b}*100", 4),
        ("(小明|我|商店)有{a}(个苹果|本书|支笔|元)，又(买了|得到){b}(个|本|支|元)，(一共|现在)有多少", "{a}+{b}", 4),
        ("(小红|我|商店)有{a}(个苹果|本书|个鸡蛋|元)，(卖掉|用了|送出){b}(个|本|元)，(还剩|剩下)多少", "{a}-{b}", 4),
        ("(一本书|一张票|一支笔|一把椅子){a}元，(买|)({b}个|{b}本|{b}张)(一共|要|)多少钱", "{a}*{b}", 4),
        ("{a}(个苹果|颗糖|元)(平均|)分给{b}个人，每人(多少|几个|得多少)", "{a}/{b}", 4),
        ("汽车每小时(走|行驶|开){a}公里，{b}小时(走多远|行驶多少公里|走多少公里)", "{a}*{b}", 3),
        ("{a}公里，每小时{b}公里，要(走|)几(个|)小时", "{a}/{b}", 4),
        ("长{a}(米|厘米)宽{b}(米|厘米)的(长方形|房间)面积(是|)多少", "{a}*{b}", 4),
        ("{a}、{b}(和|、){c}的平均(数|值)(是多少|)", "({a}+{b}+{c})/3", 4),
        ("{a}和{b}的平均(数|值)(是多少|)", "({a}+{b})/2", 4),
        ("(每盒|每箱|每排){a}(个|把)，{b}(盒|箱|排)(一共|)有多少", "{a}*{b}", 4),
        ("(原价|一件衣服){a}元，(降价|便宜)百分之{p}，(现价|现在)多少", "{a}*(100-{p})/100", 4),
        ("{a}的一半(是多少|)", "{a}/2", 6),
        ("{a}的两倍(是多少|)", "{a}*2", 6),
        ("{a}加{b}再乘以{c}(等于多少|是多少|)", "({a}+{b})*{c}", 4),
    ),
}  # fmt: skip
ANSWERS = {
    "en": ("{e} = {r}", "{e} = {r}", "The result is {r}.", "That is {r}."),
    "zh": ("{e} = {r}", "{e} = {r}", "结果是 {r}。", "等于 {r}。"),
}
FAILED = {"en": "The calculator gives no result for that.", "zh": "计算器没有给出结果。"}
ON = {  # going on with the last result
    "en": (("(and |)(times|multiplied by) {b}", "*"), ("(and |)plus {b}", "+"), ("(and |)minus {b}", "-"), ("(and |)divided by {b}", "/"),
           ("(now |)multiply (that|it) by {b}", "*"), ("(now |)add {b}( to that|)", "+"), ("(now |)subtract {b}( from that|)", "-"),
           ("(now |)divide (that|it) by {b}", "/")),
    "zh": (("(再|然后|)乘以{b}", "*"), ("(再|然后|)加上{b}", "+"), ("(再|然后|)加{b}", "+"), ("(再|然后|)减去{b}", "-"), ("(再|然后|)除以{b}", "/")),
}  # fmt: skip


def choose(template: str, rng: random.Random) -> str:
    """The template with one of each (a|b)."""
    while (found := re.search(r"\(([^()]*\|[^()]*)\)", template)) is not None:
        template = template[: found.start()] + rng.choice(found[1].split("|")) + template[found.end() :]
    return template


def calculation(rng: random.Random, language: str) -> Task:
    """Something for the calculator."""
    while True:
        if rng.random() < 0.5:
            e = expression(rng)
            question = rng.choice(DIRECT[language]).replace("{e}", written(e, rng, language == "zh"))
        else:
            question, e = _worded(rng, language)
        result = calculate(e)
        if result is not None and len(e) < 40 and (result != NO_RESULT or rng.random() < 0.3):
            break
    answer = FAILED[language] if result == NO_RESULT else rng.choice(ANSWERS[language])
    return Task(question, "Calculate", e, result, answer.replace("{e}", e).replace("{r}", shown(result)))


def _worded(rng: random.Random, language: str) -> tuple[str, str]:
    template, e, digits = rng.choice(WORDED[language])
    question = choose(template, rng)
    values = {name: number(rng, digits, decimals=digits >= 5) for name in "abc"}  # no half apples
    values |= {"p": str(rng.randint(2, 99)), "q": str(rng.randint(2, 5))}
    for name, value in values.items():
        question, e = question.replace("{" + name + "}", value), e.replace("{" + name + "}", value)
    return question, e


def going_on(rng: random.Random, language: str, last: str) -> Task:
    """A question about the last result, a whole number as the answer showed it."""
    template, operator = rng.choice(ON[language])
    b = str(rng.randint(2, 999))
    e = f"{last}{operator}{b}"
    result = calculate(e)
    answer = rng.choice(ANSWERS[language])
    question = choose(template, rng).replace("{b}", b)
    return Task(question, "Calculate", e, result, answer.replace("{e}", e).replace("{r}", shown(result)))


# ---- equations --------------------------------------------------------------------------------------------------------------

EQUATION = {
    "en": ("solve {e}", "solve {e}", "solve the equation {e}", "what is {x} if {e}", "find {x}: {e}", "solve for {x}: {e}", "{e}, what is {x}",
           "{e}", "which {x} solves {e}", "please solve {e}", "can you solve {e}", "{e}. find {x}", "use the solver: {e}", "what is {x} in {e}"),
    "zh": ("解方程{e}", "解方程：{e}", "解{e}", "求解{e}", "{e}，求{x}", "{e}，{x}是多少", "如果{e}，{x}等于多少", "请解方程{e}", "{e}", "方程{e}的解是什么",
           "帮我解{e}", "求{x}：{e}", "{e}，{x}等于几"),
}  # fmt: skip
SYSTEM = {
    "en": ("solve {e} and {f}", "solve {e}, {f}", "find {x} and {y}: {e}, {f}", "{e} and {f}, what are {x} and {y}", "solve the system {e}, {f}",
           "{e}; {f}", "what are {x} and {y} if {e} and {f}", "solve {e}; {f}"),
    "zh": ("解方程组{e}，{f}", "解方程组：{e}，{f}", "{e}，{f}，求{x}和{y}", "求解{e}和{f}", "如果{e}，{f}，{x}和{y}是多少", "解{e}；{f}", "{e}；{f}"),
}  # fmt: skip
TWO = {
    "en": ("two numbers (add up to|have the sum) {s} and (differ by|have the difference) {d}, what are they",
           "the sum of two numbers is {s} and their difference is {d}, (what are they|find them)"),
    "zh": ("两个数的和是{s}，差是{d}，(这两个数是多少|求这两个数)", "两数之和是{s}，之差是{d}，(求这两个数|各是多少)"),
}  # fmt: skip
AND, OR = {"en": " and ", "zh": "，"}, {"en": " or ", "zh": " 或 "}


def equation(rng: random.Random, language: str) -> Task:
    """Something for the solver: linear, quadratic, or two equations."""
    make = rng.choices((_linear, _quadratic, _system, _two_numbers), (5, 2, 3, 1))[0]
    task = make(rng, language)
    return task


def _linear(rng: random.Random, language: str) -> Task:
    x = rng.choice("xxxxyntaz")
    a, b = rng.randint(2, 99 if rng.random() < 0.3 else 12), rng.randint(1, 999 if rng.random() < 0.2 else 60)
    root = Fraction(rng.randint(-20, 60))
    if rng.random() < 0.25:
        root = Fraction(rng.randint(1, 90), a)
    form = rng.randrange(6)
    if form == 0:
        left, value = f"{a}{x}+{b}", a * root + b
    elif form == 1:
        left, value = f"{a}{x}-{b}", a * root - b
    elif form == 2:
        left, value = f"{x}+{b}", root + b
    elif form == 3:
        left, value = f"{x}-{b}", root - b
    elif form == 4:
        left, value = f"{a}{x}", a * root
    else:
        c = rng.randint(1, a - 1)
        left, root = f"{a}{x}+{b}", Fraction(rng.randint(1, 50))
        value = None
        d = (a - c) * root + b
        right = f"{'' if c == 1 else c}{x}+{d}"
    if value is not None:
        if value.denominator != 1:
            return _linear(rng, language)
        right = str(value)
    e = f"{left}={right}"
    return _equation(rng, language, e, x, f"{x} = {root}", f"{x} = {root}")


def _quadratic(rng: random.Random, language: str) -> Task:
    x = rng.choice("xxxxxyt")
    p, q = sorted((rng.randint(-12, 12), rng.randint(-12, 12)))
    if rng.random() < 0.3:
        q = rng.randint(1, 30)
        e, p = f"{x}^2={q * q}", -q
    else:
        b, c = -(p + q), p * q
        middle = "" if b == 0 else f"{'+' if b > 0 else '-'}{'' if abs(b) == 1 else abs(b)}{x}"
        e = f"{x}^2{middle}{'' if c == 0 else f'{c:+d}'}=0"
    if p == q:
        return _equation(rng, language, e, x, f"{x} = {p}", f"{x} = {p}")
    return _equation(rng, language, e, x, f"{x}_0 = {p}\n{x}_1 = {q}", f"{x} = {p}{OR[language]}{x} = {q}")


def _equation(rng: random.Random, language: str, e: str, x: str, result: str, said: str) -> Task:
    text = re.sub(r"([=+])|(?<=.)(-)", lambda m: f" {m[0]} ", e) if rng.random() < 0.35 and "=-" not in e else e
    question = rng.choice(EQUATION[language]).replace("{e}", text).replace("{x}", x)
    return Task(question, "Solve", e, result, _said(said, language))


def _system(rng: random.Random, language: str) -> Task:
    x, y = rng.choice(("xy", "xy", "xy", "ab", "mn"))
    p, q = rng.randint(-9, 40), rng.randint(-9, 40)
    while True:
        a, b, c, d = (rng.choice((1, 1, 1, 2, 3, rng.randint(2, 9))) for _ in range(4))
        s, t = rng.choice("+-+"), rng.choice("-+-")
        if a * d * (1 if t == "+" else -1) != b * c * (1 if s == "+" else -1):
            break
    term = lambda k, v: f"{'' if k == 1 else k}{v}"  # noqa: E731
    e = f"{term(a, x)}{s}{term(b, y)}={a * p + (b * q if s == '+' else -b * q)}"
    f = f"{term(c, x)}{t}{term(d, y)}={c * p + (d * q if t == '+' else -d * q)}"
    question = rng.choice(SYSTEM[language])
    for name, value in (("{e}", e), ("{f}", f), ("{x}", x), ("{y}", y)):
        question = question.replace(name, value)
    return Task(question, "Solve", f"{e};{f}", f"{x} = {p}\n{y} = {q}", _said(f"{x} = {p}{AND[language]}{y} = {q}", language))


def _two_numbers(rng: random.Random, language: str) -> Task:
    y, difference = rng.randint(1, 90), rng.randint(1, 60)
    x = y + difference
    question = choose(rng.choice(TWO[language]), rng).replace("{s}", str(x + y)).replace("{d}", str(difference))
    said = _said(f"x = {x}{AND[language]}y = {y}", language)
    return Task(question, "Solve", f"x+y={x + y};x-y={difference}", f"x = {x}\ny = {y}", said)


def _said(solution: str, language: str) -> str:
    return f"The solution: {solution}" if language == "en" else f"解是 {solution}"
