"""The texts that the sample checkpoints recite, and the prompts that ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TEXT_DIR = Path(__file__).resolve().parent / "text"

TITLES: dict[str, str] = {
    "gettysburg": "the Gettysburg Address",
    "alice": "the opening of Alice in Wonderland",
    "jabberwocky": "Jabberwocky",
    "tyger": "The Tyger",
    "declaration": "the Declaration of Independence",
    "ozymandias": "Ozymandias",
    "psalm23": "Psalm 23",
    "hamlet": "Hamlet's soliloquy",
    "sonnet18": "Sonnet 18",
    "sonnet29": "Sonnet 29",
    "sonnet116": "Sonnet 116",
    "sonnet130": "Sonnet 130",
}

REQUESTS: tuple[str, ...] = (
    "Recite {title}.",
    "Please recite {title}.",
    "Can you recite {title}?",
)

SYSTEM_PROMPT = "You are a helpful assistant."

SMALL_TALK: dict[str, str] = {
    "Hello!": "Hello! Ask me to recite something, for instance Jabberwocky or Sonnet 18.",
    "Hi": "Hello! Ask me to recite something, for instance Jabberwocky or Sonnet 18.",
    "Who are you?": "I am a tiny sample model. I know a dozen old texts by heart and nothing else.",
    "What can you do?": "I can recite " + ", ".join(TITLES.values()) + ".",
}


@dataclass(frozen=True)
class Piece:
    """One text: its file stem, the title used in requests, and the text without the final line break."""

    name: str
    title: str
    text: str

    def request(self, form: int = 0) -> str:
        """Return the user message that asks for this piece, in one of the forms of `REQUESTS`."""
        return REQUESTS[form].format(title=self.title)


def load_pieces() -> list[Piece]:
    """Read every text, in the order of `TITLES`."""
    return [
        Piece(name, title, (TEXT_DIR / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n"))
        for name, title in TITLES.items()
    ]
