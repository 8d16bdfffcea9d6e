"""Text from models, files and errors, made fit for a terminal."""

from collections.abc import Callable, Iterable

from offload.errors import NO_MEMORY
from offload.quant.errors import OffloadError

# These control characters (C0 except tab and newline, DEL, C1) could make a terminal move the
# cursor, erase text or send an answer.
_SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_SHOWN |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with symbols for control characters (U+241B for ESC); tabs and newlines stay."""
    return text.translate(_SHOWN)


THINKING, THOUGHT = "Thinking...", "...done thinking."  # ollama's words
Write = Callable[[str], None]


class Speaker:
    """Writes an answer as plain text while it arrives, with words around the thoughts in it."""

    def __init__(self, write: Write, aside: Write | None = None, *, safe: bool = True) -> None:
        """`aside` writes thoughts; by default `write` does. `safe`: make control characters visible
        that a terminal would obey."""
        self.thoughts = True  # whether thoughts are shown
        self.write = write  # writes text that is not part of an answer, unchanged
        self._aside = aside or write
        self._shown = printable if safe else str
        self._thinking = False

    def show(self, piece: tuple[str, bool]) -> None:
        """Show the next piece of the answer: its text, and whether it is a thought."""
        text, thought = piece
        if self.thoughts or not thought:
            self._turn(thought)
            (self._aside if thought else self.write)(self._shown(text))

    def finish(self) -> None:
        """End the answer, which may have been interrupted at any point, and show all of it."""
        self._turn(False)
        self.write("\n")

    def _turn(self, thought: bool) -> None:
        if thought != self._thinking:
            self._aside(f"{THINKING}\n" if thought else f"\n{THOUGHT}\n\n")
            self._thinking = thought


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that was probably meant, or an empty text."""
    import difflib  # imported here because every --help imports this file

    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


LONGEST = 1000  # characters in a line, because a message may quote a whole file


def one_line(error: BaseException) -> str:
    """`error` as one line for the user."""
    if isinstance(error, OffloadError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error}: make it usable, or name another place with OFFLOAD_HOME"
    elif is_memory(error):
        text = f"out of memory: {NO_MEMORY}"
    elif type(error).__name__ == "OutOfMemoryError":  # a class of torch, which is not imported here
        text = f"out of GPU memory: {NO_MEMORY}"
    else:
        text = f"{type(error).__name__}: {error} (a bug: --debug shows where)"
    return shortened(printable(" ".join(text.split())))


def is_memory(error: BaseException) -> bool:
    """Whether `error`, raised by Python, torch or a Rust library, means that memory ran out."""
    # CPython raises a SystemError when there is no memory left for a MemoryError either.
    words = (
        "can't allocate memory",
        "can't start new thread",
        "error return without exception set",
    )
    return (
        isinstance(error, MemoryError)
        or any(word in str(error) for word in words)
        or type(error).__name__ == "PanicException"
    )


def shortened(text: str) -> str:
    """`text`, without its middle if it is very long."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def reason(error: BaseException) -> str:
    """The message of another library's `error`, as one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
