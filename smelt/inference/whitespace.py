"""White space around a text that comes in pieces: kept, or taken away at both ends; knows no tokens."""


class OuterSpace:
    """Passes text on; if `trims`, without the white space before the first word and after the last."""

    def __init__(self, trims: bool) -> None:
        self.trims = trims
        self.has_begun = False
        self.held = ""

    def push(self, text: str) -> str:
        """What may be shown: white space waits for the next word."""
        if not self.trims:
            return text
        text = self.held + text if self.has_begun else text.lstrip()
        self.has_begun = self.has_begun or bool(text)
        shown = text.rstrip()
        self.held = text[len(shown) :]
        return shown
