"""Stop strings in a stream of text: what may be shown yet, and where the text ends; knows no tokens."""


class StopStrings:
    """Passes text on until a stop string appears; the beginning of a possible one is held back meanwhile."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can no longer become part of a stop string. Nothing follows a found one."""
        if self.found:
            return ""
        self.held += text
        starts = [start for start in map(self.held.find, self.stops) if start >= 0]
        if starts:
            self.found = True
            shown, self.held = self.held[: min(starts)], ""
            return shown
        keep = self._length_to_hold()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def finish(self) -> str:
        """The rest, when no more text comes."""
        rest, self.held = self.held, ""
        return rest

    def _length_to_hold(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                return length
        return 0
