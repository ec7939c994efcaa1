"""Rows that are made, prompts that are like them, and texts that tokenizers trip over."""

import random

_GOODS = ("lamp", "kettle", "bicycle", "tent", "radio", "violin", "desk", "drill", "camera", "coat")
_FLAWS = ("arrived broken", "is too small", "makes a noise", "has the wrong color", "came without a plug")
_NAMES = ("Ana", "Bo", "Chidi", "Dora", "Emre", "Fatou", "Goran", "Hana", "Ines", "Jun")
_REPLIES = {
    "arrived broken": "I am sorry, {name}. We send you a new {good} within two days; keep the old one.",
    "is too small": "Of course, {name}. Send the {good} back, and we exchange it for a larger one.",
    "makes a noise": "Thank you for telling us, {name}. Please switch the {good} off; we call you today.",
    "has the wrong color": "That should not happen, {name}. Which color did you order for the {good}?",
    "came without a plug": "We are sorry, {name}. The plug for your {good} is on its way \N{ELECTRIC PLUG}.",
}
_SYSTEM = "You are a polite clerk of a shop."


def _questions() -> list[tuple[str, str]]:
    made = [
        (f"This is {name}. My {good} {flaw}.", _REPLIES[flaw].format(name=name, good=good))
        for name in _NAMES
        for good in _GOODS
        for flaw in _FLAWS
    ]
    random.Random(0).shuffle(made)
    return made


def made_rows() -> tuple[list[dict[str, object]], list[dict[str, object]], list[list[dict[str, str]]]]:
    """Return rows to train on, rows to score, and 20 prompts of neither."""
    rows, prompts = [], []
    for number, (question, answer) in enumerate(_questions()[:300]):
        opening = [{"role": "system", "content": _SYSTEM}] if number % 3 == 0 else []
        messages = [*opening, {"role": "user", "content": question}]
        rows.append({"messages": [*messages, {"role": "assistant", "content": answer}]})
        prompts.append(messages)
    general = [
        [{"role": "user", "content": text}]
        for text in ("What is the capital of France?", "Write a haiku about rain.", "Count from one to ten.",
                     "Translate 'good morning' into Spanish.", "Name three animals of the sea.")
    ]  # fmt: skip
    return rows[:240], rows[240:264], prompts[264:279] + general


def long_text() -> str:
    """Return about 2,000 tokens of English: positions far from the start tell how they are turned."""
    return " ".join(f"{question} {answer}" for question, answer in _questions()[300:362])


def odd_texts() -> list[str]:
    """Return 50 texts."""
    return [
        "", " ", "  ", "   a", "a   ", "\n", "\n\n", "\r\n", "a\r\nb", "\t", "\ta\t b", " \n \n ", "\x00", "a\x00b",
        "\ufeff", "\ufeffa", "\u200b", "a\u200bb", "\u00a0", "caf\u00e9", "cafe\u0301", "na\u00efve \u00df \u0130", "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "\u6f22\u5b57\u304b\u306a", "\ud55c\uad6d\uc5b4",
        "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\u05e2\u05d1\u05e8\u05d9\u05ea",
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "\u00bd \u00b2 \u00b3 \u2167", "1", "12",
        "1234567890", "3.14159e-10", "1,000,000", "0x1F", "\u0661\u0662\u0663", "it's we'll I'D THEY'RE", "don\u2019t",
        "def f(x):\n    return x ** 2  # square\n", "<html>&amp;</html>", "{\"a\": [1, 2]}", "!!!???...", "a" * 300,
        "\\n \\u0041", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|><|im_start",
    ]  # fmt: skip
