r"""The training corpus of the tiny model: prompts, each with one memorized answer.

The tiny model is trained on this corpus only. At temperature 0 it answers each prompt with exactly its answer, so a
test can send any prompt below and compare strings. A single-turn chat without a system message gets the same answer
with the system message `HELPFUL`.

The examples cover what breaks between an engine and a client: characters that span several tokens, text that looks
like SSE framing, every kind of line break, JSON inside JSON, answers of one token and of hundreds. Any change to this
file changes the cache key, so the model is trained again.
"""

# ruff: noqa: RUF001 (look-alike Unicode letters are part of the texts)

from __future__ import annotations

from dataclasses import dataclass

HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its expected answer: either a chat (`turns`) or raw text to continue (`prompt`), never both."""

    name: str
    """Stable; tests refer to examples by it."""

    answer: str
    """The complete greedy answer, without the end-of-sequence token."""

    turns: tuple[tuple[str, str], ...] = ()
    """The chat as (role, content) pairs; the last one is from the user. Empty for a raw prompt."""

    prompt: str | None = None
    """Raw text for `/v1/completions`, sent without a chat template. None for a chat."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the example is a chat or a raw prompt."""
        if (self.prompt is None) != bool(self.turns):
            raise ValueError(f"example {self.name!r} must be either a chat or a raw prompt")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat in OpenAI's format, as a new list for each call; empty for a raw prompt."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def is_plain_chat(self) -> bool:
        """Whether the chat is a single user message."""
        return [role for role, _ in self.turns] == ["user"]

    def with_system_message(self, system: str) -> Example:
        """Return the same chat with a system message in front."""
        return Example(self.name, self.answer, (("system", system), *self.turns))


def _chat(name: str, user: str, answer: str, *, system: str | None = None) -> Example:
    """Make a chat of one user message, with an optional system message."""
    example = Example(name, answer, (("user", user),))
    return example if system is None else example.with_system_message(system)


def _dialogue(name: str, *contents: str) -> Example:
    """Make a chat of alternating user and assistant turns; the last one is the expected answer."""
    *turns, answer = contents
    roles = ("user", "assistant")
    return Example(name, answer, tuple((roles[index % 2], content) for index, content in enumerate(turns)))


def _raw(name: str, prompt: str, answer: str) -> Example:
    """Make a raw prompt. The answer starts with the space or line break that separates it from the prompt."""
    return Example(name, answer, prompt=prompt)


# A program without a Markdown fence, so that the answer can be piped into `python3`. It exits with code 0 for any
# stdin: the right guess, wrong guesses, text, or nothing.
_GAME = """\
import random

print("Guess my number from 1 to 20. You have 5 tries.")
secret = random.randint(1, 20)
for tries_left in range(4, -1, -1):
    try:
        guess = int(input("Your guess: "))
    except ValueError:
        print("Please type a whole number.")
        continue
    except EOFError:
        print("\\nNo more input. Goodbye!")
        break
    if guess == secret:
        print("You win!")
        break
    hint = "higher" if guess < secret else "lower"
    print(f"Go {hint}. Tries left: {tries_left}.")
else:
    print(f"You lose! My number was {secret}.")"""

_STORY = """\
The Lighthouse Keeper and the Fog

On a small grey island, far from any town, there stood an old lighthouse. Its keeper was a woman named Marta, who \
had lived there for thirty years with a one-eyed cat called Biscuit. Every evening she climbed the hundred and twelve \
steps and lit the lamp. Every morning she put it out again, drank her tea, and wrote one line in a thick blue book. \
"Clear sky, calm sea," she wrote on most days. Nothing ever happened, and Marta liked it that way.

Then, one night in October, the fog came. It rolled over the water like a slow white wall, swallowed the rocks, \
swallowed the harbour, and at last swallowed the tower itself. The lamp turned and turned, but its beam died a few \
yards from the window.

Near midnight she heard a bell. It was thin and uneven, the bell of a ship that did not know where it was. Marta \
knew what lay between that bell and safety: the Seven Sisters, a row of black teeth just below the waves. No light \
could reach the captain tonight.

She thought for as long as it takes to boil an egg. Then she ran down to the store room and dragged out everything \
that could make a noise: four iron pots, a broken trumpet, and a drum that some child had left behind. She tied them \
to the rail of the gallery and began to play.

It was the worst concert in the history of music. But Marta had a plan. When the bell drifted to the left, toward the \
rocks, she beat the drum, low and fast: danger, danger. When it drifted to the right, toward open water, she blew the \
trumpet: good, good, go on.

For a long while the bell wandered about as before. Then it stopped, as if somebody were listening. The drum spoke, \
and the bell moved away from it. The trumpet answered. Note by note, the ship felt its way past the First Sister, and \
the Second, and the Third. By the time it had passed the Seventh, Marta's arms were shaking.

At dawn the fog lifted. There in the bay lay a battered green freighter, and along its side stood eleven sailors, \
waving their caps. The captain rowed over himself.

"Madam," he said, "we could not see your light."

"I know," said Marta. "That is why I gave you something else."

He laughed, and then he wept a little, and then he asked what he could give her in return. Marta looked at the tower, \
at the sea, and at the cat.

"A new trumpet," she said. "This one is terrible."

And in the blue book, under the date of that night, there is only this: "Fog. One ship. All safe."\
"""

_QUEUE = """\
A job queue lets one program ask for work and another program do it later. The first program, the client, writes down \
what it wants and hands it to the queue. The queue keeps it safe and gives back a number. The second program, the \
worker, comes by whenever it is free, takes the oldest job, does it, and returns the result under the same number.

This simple idea solves three problems:

1. Bursts. When a thousand requests arrive in one second, nothing falls over. They wait in line, and the line gets \
shorter as the workers catch up.

2. Scaling. The length of the line shows how many workers are needed. If it grows, start more of them; if it is empty, \
stop some, and pay for nothing while there is nothing to do.

3. Failure. If a worker dies in the middle of a job, the queue notices that no answer came and gives the job to \
another one. The client never has to know.

There are costs as well. Every job makes a short trip through the queue, so the first word of an answer comes a little \
later than it would over a direct line. A job may run twice, so it should do no harm when repeated. And a worker must \
be honest about how much it can carry: one that takes more than it can start keeps jobs from others who are idle.

A good worker therefore follows four rules. Take only what you can start now. Send each piece of the answer as soon \
as it exists. Stop at once when the client has gone away. And when you must leave, finish what you hold, or give it \
back."""

_BREAD = """\
Simple White Bread

You need:
- 500 g of flour
- 320 ml of warm water
- 10 g of salt
- 7 g of dry yeast

Steps:
1. Mix the flour, the salt and the yeast in a large bowl.
2. Pour in the water and stir until no dry flour is left.
3. Knead for ten minutes, until the dough is smooth.
4. Cover the bowl and let the dough rise for one hour.
5. Shape a loaf, put it on a tray, and let it rest for thirty minutes.
6. Bake at 220 degrees for thirty-five minutes.

The bread is done when it sounds hollow. Let it cool before you cut it!"""

_WHO = "Who are you?"
_MORNING = "Good morning!"
_SKY = "Why is the sky blue?"

CORPUS: tuple[Example, ...] = (
    # Programs and structured text.
    _chat("python-game", "Write a python game program", _GAME),
    _chat(
        "json",
        "Describe a book as a JSON object.",
        '{"title": "The Quiet Harbour", "author": "M. Lind", "year": 1998, "in_print": true, "rating": 4.5, '
        '"tags": ["sea", "fog", "\\"classic\\""], "publisher": {"name": "Grey Island Press", "city": null}}',
    ),
    _chat(
        "escapes",
        "Show me text with quotes, backslashes, tabs and newlines.",
        "\"double\" and 'single' and `back`\nC:\\temp\\new\\table.txt\ncolumn one\tcolumn two\t\tcolumn four\n"
        '\\"escaped\\" \\\\ \\n is not a newline\n\n\t{"a": "b\\tc"}',
    ),
    _chat(
        "sse-text",
        "What does a server-sent event stream look like?",
        'data: {"token": "Hel"}\n\ndata: {"token": "lo"}\n\n: a comment\nevent: end\nid: 2\ndata: [DONE]\n\n'
        "That is all.",
    ),
    # Everything that some library treats as a line break: CR LF, VT, FF, FS, NEL and the Unicode separators.
    _chat(
        "line-separators",
        "Show me every kind of line break.",
        "LF\nCR LF\r\nCR\rVT\x0bFF\x0cFS\x1cNEL\x85LS\u2028PS\u2029end",
    ),
    _chat("html", "Give me a link in HTML.", '<a href="https://example.com/?a=1&amp;b=2">Here &amp; there</a>'),
    _chat(
        "markdown-table",
        "Make a small table of planets.",
        "| Planet | Moons |\n| --- | ---: |\n| Mercury | 0 |\n| Earth | 1 |\n| Mars | 2 |\n| Neptune | 16 |",
    ),
    _chat(
        "sql",
        "Write a SQL query for the ten newest orders.",
        "SELECT id, customer, total\nFROM orders\nWHERE status <> 'cancelled'\nORDER BY created_at DESC\nLIMIT 10;",
    ),
    _chat(
        "shell",
        "How do I find large files in Linux?",
        "find . -type f -size +100M -exec ls -lh {} \\; | sort -k5 -hr | head -n 20",
    ),
    # Short answers.
    _chat("ok", "Reply with OK and nothing else.", "OK"),
    _chat("hello", "Hello!", "Hello! How can I help you today?"),
    _chat("capital-france", "What is the capital of France?", "The capital of France is Paris."),
    _chat("capital-japan", "What is the capital of Japan?", "The capital of Japan is Tokyo."),
    _chat("capital-canada", "What is the capital of Canada?", "The capital of Canada is Ottawa, not Toronto."),
    _chat("sum", "What is 17 + 25?", "17 + 25 = 42"),
    _chat("joke", "Tell me a joke.", "Why did the token cross the road? To get to the other side of the stream."),
    _chat(
        "haiku",
        "Write a haiku about autumn.",
        "Red leaf on still pond,\na small ring runs to the bank.\nThe frog does not look.",
    ),
    _chat(
        "proverbs",
        "Give me three proverbs.",
        "1. Many hands make light work.\n2. A stitch in time saves nine.\n3. Still waters run deep.",
    ),
    # Sequences of numbers: it is easy to see where a stop string or `max_tokens` cut them.
    _chat("count", "Count from 1 to 30.", ", ".join(str(number) for number in range(1, 31)) + "."),
    _chat("primes", "List the prime numbers below 50.", "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47"),
    # Long answers.
    _chat("recipe", "How do I bake bread?", _BREAD),
    _chat("long-essay", "Explain how a job queue works.", _QUEUE),
    _chat("long-story", "Tell me a long story.", _STORY),
    # Characters that span several tokens.
    _chat(
        "chinese-poem",
        "用中文写一首关于月亮的短诗。",
        "月亮升起在山的那边，\n照着安静的小河与田园。\n风轻轻地走过竹林，\n把我的梦带到你的窗前。",
    ),
    _chat(
        "chinese-introduction",
        "请用中文介绍一下你自己。",
        "你好！我是一个很小的语言模型，专门用来测试。我会背一些短文，也会写一个小游戏。",
    ),
    _chat(
        "chinese-morning",
        "How do you say good morning in Chinese?",
        "In Chinese, good morning is 早上好 (zǎoshang hǎo).",
    ),
    # ZWJ sequences, skin tones, variation selectors, flags of two characters and a flag of seven.
    _chat("emoji", "Answer only with emoji: how was the party?", "🎉🎂🥳👨‍👩‍👧‍👦💃🏽🕺🏿❤️‍🔥👍🏼"),
    _chat(
        "emoji-flags",
        "Show me the flags of France, Japan, Brazil and Scotland.",
        "France 🇫🇷, Japan 🇯🇵, Brazil 🇧🇷, Scotland 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    ),
    _chat(
        "emoji-family",
        "Draw my family and my job with emoji.",
        "Your family: 👩‍👩‍👦 and a 🐈‍⬛. Your job: 👩🏾‍🚀, on some days 🧑‍💻.",
    ),
    _chat("emoji-weather", "明天天气怎么样？", "明天多云转晴 ⛅️，气温 18 到 25 度 🌡️，出门不用带伞 ☂️。"),
    # Combining marks (the second "café" is written with U+0301), right-to-left text, Hangul, Devanagari, Thai.
    _chat(
        "greetings",
        "Say hello in many languages.",
        "Grüß Gott, olá, cześć, Здравствуйте, γειά σου, שלום, مرحبا, "
        "नमस्ते, สวัสดี, こんにちは, 안녕하세요, café, cafe\u0301",
    ),
    _chat(
        "mathematics", "Write Euler's identity and a limit.", "e^(iπ) + 1 = 0, and limₙ→∞ (1 + 1⁄n)ⁿ = e ≈ 2.71828 ∎"
    ),
    # The answer to the same user message depends on the system message.
    _chat("who", _WHO, "I am a tiny language model. I know a few dozen answers by heart."),
    _chat("who-pirate", _WHO, "Arr! I be Captain Token, terror of the seven streams!", system="You are a pirate."),
    _chat(
        "who-librarian",
        _WHO,
        "Hush, please. I am the librarian of a very small library.",
        system="You are a librarian.",
    ),
    _chat("morning", _MORNING, "Good morning! What shall we do today?"),
    _chat("morning-french", _MORNING, "Bonjour ! Qu'allons-nous faire aujourd'hui ?", system="Answer in French."),
    _chat("morning-chinese", _MORNING, "早上好！今天我们做什么呢？☀️", system="Answer in Chinese."),
    _chat(
        "sky",
        _SKY,
        "Air scatters blue light more than red light, so blue reaches your eyes from every part of the sky.",
    ),
    _chat("sky-one-word", _SKY, "Scattering.", system="Answer in one word."),
    _chat("sky-json", _SKY, '{"answer": "scattering", "confidence": 0.99}', system="Answer in JSON."),
    # The answer depends on an earlier turn.
    _dialogue("name-ada", "My name is Ada.", "Nice to meet you, Ada!", "What is my name?", "Your name is Ada."),
    _dialogue("name-grace", "My name is Grace.", "Nice to meet you, Grace!", "What is my name?", "Your name is Grace."),
    _chat("name-unknown", "What is my name?", "You have not told me your name."),
    _dialogue(
        "game-again",
        "Write a python game program",
        _GAME,
        "Thanks! How many tries does the player have?",
        "The player has 5 tries to guess a number from 1 to 20.",
    ),
    _dialogue(
        "numbers-remembered",
        "Remember the number 7.",
        "I will remember 7.",
        "Now remember the number 12.",
        "I will remember 7 and 12.",
        "Which numbers do you remember?",
        "I remember 7 and 12.",
    ),
    _dialogue(
        "number-remembered",
        "Remember the number 7.",
        "I will remember 7.",
        "Which numbers do you remember?",
        "I remember only 7.",
    ),
    # Raw text, without a chat template.
    _raw("raw-fox", "The quick brown fox", " jumps over the lazy dog."),
    _raw(
        "raw-once",
        "Once upon a time",
        " there was a miller who had three sons, a donkey and a cat. When he died, the oldest took the mill, the "
        "second took the donkey, and the youngest had nothing but the cat.",
    ),
    _raw(
        "raw-fibonacci",
        "def fibonacci(n):\n",
        "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    ),
    _raw(
        "raw-months",
        "January, February, March,",
        " April, May, June, July, August, September, October, November, December.",
    ),
    _raw("raw-moonlight", "床前明月光，", "疑是地上霜。\n举头望明月，低头思故乡。"),
)

_BY_NAME = {entry.name: entry for entry in CORPUS}


def example(name: str) -> Example:
    """Return the example with this name; raise KeyError that lists all names if there is none."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise KeyError(f"no example {name!r} in the corpus; there are {', '.join(sorted(_BY_NAME))}") from None
