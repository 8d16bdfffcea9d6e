"""What a name that is no path stands for on the hub, told without the network."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from offload.errors import SourceError
from offload.model.known import BY_ID, BY_NAME, BY_OLLAMA, KNOWN, KnownModel
from offload.quant.manifest import is_pack

DEMO = "demo"
_URL = re.compile(r"(?:https?://[^/]+|huggingface\.co|hf\.co)/(?P<rest>.+)", re.IGNORECASE)
_IN_URL = re.compile(r"([^/]+/[^/]+)/(?:resolve|blob|tree)/([^/]+)/?(.*)")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_IN_REPOSITORY = re.compile(
    r"(?P<id>[^/:]+/[^/:]+)(?::(?P<quant>[\w.-]+)|/(?P<file>.+\.gguf))?", re.IGNORECASE
)
_FILES = re.compile(r"\.(gguf|safetensors|bin|pt|json)$", re.IGNORECASE)


@dataclass(frozen=True)
class HubName:
    """A model on the hub, or one of the GGUF models in a repository there."""

    text: str  # as messages call it
    id: str  # owner/name
    file: str = ""  # the path of a GGUF file in the repository
    quant: str = ""  # or what its name ends with, like Q4_K_M
    revision: str | None = None  # where a URL names one

    @property
    def model(self) -> str:
        """The name that users know the model by."""
        return self.id + (f"/{self.file}" if self.file else f":{self.quant}" * bool(self.quant))


def hub_name(text: str, packs: Path | None = None) -> HubName:
    """The model on the hub that `text` names, which is no path here.

    `text` is an id, perhaps with `:Q4_K_M` or `/FILE.gguf` behind it; a URL; or a short name from
    `offload.model.known`. Raises `SourceError`, which says what may have been meant; that may also
    be a pack in the folder `packs`.
    """
    if url := _URL.fullmatch(text.strip()):
        return _from_url(text, url["rest"].partition("?")[0])
    word = text.casefold()
    if known := BY_NAME.get(word):
        return HubName(text, known.id)
    ids = (id for known in KNOWN for id in (known.id, *known.also))
    if whole := next((id for id in ids if id.rpartition("/")[2].casefold() == word), None):
        return HubName(text, whole)
    match = _IN_REPOSITORY.fullmatch(text)
    if match and _ID.fullmatch(match["id"]):
        return HubName(text, match["id"], match["file"] or "", match["quant"] or "")
    raise SourceError(_unknown(text, packs))


def _from_url(text: str, rest: str) -> HubName:
    if inside := _IN_URL.fullmatch(rest):
        id, revision, file = inside.groups()
        if file and not file.endswith(".gguf"):
            raise SourceError(f"{text} is one file of a model: name the model, {id}")
        return HubName(text, id, file, revision=None if revision == "main" else revision)
    match = _IN_REPOSITORY.fullmatch(rest.strip("/"))
    if match is None or not _ID.fullmatch(match["id"]):
        raise SourceError(
            f"{text} is not the page of a model: write the model's id, like owner/name"
        )
    return HubName(text, match["id"], match["file"] or "", match["quant"] or "")


def _unknown(text: str, packs: Path | None) -> str:
    """What is wrong with a name that is neither a path here nor one of the hub's."""
    word = text.casefold()
    if id := BY_OLLAMA.get(word):
        return f"{text!r} is ollama's name: write {id}"
    if _FILES.search(text) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        what = "file" if _FILES.search(text) else "folder"
        return f"there is no {what} {text}{_instead(similar_path(text))}"
    name, colon, tag = word.partition(":")
    if colon and name in BY_NAME:
        return f"{text!r} names no bits that way: write {name} --bits {tag}"
    if near := similar_name(name, packs):
        return f"unknown model {text!r}{_instead(near)}"
    return (
        f"unknown model {text!r}: give a folder, a .gguf file, a hub id (owner/name), or a short "
        "name (offload plan lists them)"
    )


def _instead(near: str) -> str:
    return f": did you mean {near}?" if near else ": check the path"


def similar_name(text: str, packs: Path | None = None) -> str:
    """The short name, known id or pack in `packs` that is most like `text`; "" if none is."""
    if "/" in text:
        names = {id.casefold(): id for known in BY_NAME.values() for id in (known.id, *known.also)}
    else:
        kept = [path.name for path in packs.glob("*/") if is_pack(path)] if packs else []
        names = {name.casefold(): name for name in (*kept, DEMO, *BY_NAME)}
    near = difflib.get_close_matches(text.casefold(), names, 1, cutoff=0.7)
    return names[near[0]] if near else ""


def similar_path(text: str) -> str:
    """The file or folder beside the path `text` whose name is most like its own; "" if none is."""
    path = Path(text).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1, cutoff=0.7)
    stem = DEMO if path.stem == DEMO else ""
    return str(path.with_name(near[0])) if near else stem


def known_model(text: str) -> KnownModel | None:
    """The model of `offload.model.known` that `text` names, with all of its weights."""
    try:
        asked = hub_name(text)
    except SourceError:
        return None
    whole = not (asked.file or asked.quant or asked.revision)
    return BY_ID.get(asked.id.casefold()) if whole else None
