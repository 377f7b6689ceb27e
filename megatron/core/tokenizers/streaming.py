"""Show text while its tokens arrive, never half a character."""

from megatron.core.tokenizers.base import Tokenizer

# A character of UTF-8 has at most 4 bytes, so at most 4 tokens: more broken ones are really broken.
LONGEST_CHARACTER = 4
BROKEN = "\ufffd"


class StreamingDetokenizer:
    """Turns ids into text one by one; the parts join to ``tokenizer.detokenize`` of all ids.

    Each id costs two short detokenizations, however long the text has grown: the last part shown
    is decoded again in front of the new ids, so that a tokenizer that drops the first space of a
    text does not drop it here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes; "" while a character is incomplete."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith(BROKEN) and len(self._held) < LONGEST_CHARACTER:
            return ""
        if text:
            self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        text = self._new_text() if self._held else ""
        self._shown, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.detokenize(self._shown)
        return self._tokenizer.detokenize(self._shown + self._held)[len(before) :]
