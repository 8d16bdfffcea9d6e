"""Finds models on the Hugging Face hub, and fetches what is needed of them into the hub's cache.

Small files are fetched by huggingface_hub. Weights are fetched here, because huggingface_hub begins
an interrupted file anew; they are put where it would put them, so that others find them.
"""

import fnmatch
import functools
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

import huggingface_hub
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not typed so
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from offload.errors import SourceError
from offload.files import existing, read_object
from offload.lines import reason
from offload.model.ids import HubName, similar_name
from offload.model.layout import INDEX, SINGLE
from offload.progress import Progress
from offload.units import gib

HEADER = 2**25  # bytes at the start of a GGUF file; its vocabulary takes a third of them
AT_ONCE = 4  # files
CHUNK = 2**20
TRIES = 4  # in a row without a new byte
_FULL = (ENOSPC, EDQUOT, EFBIG)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32|FP16|FP32)$", re.IGNORECASE)


@dataclass(frozen=True)
class HubFile:
    """A file in a repository; `etag` names its content in the hub's cache."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Repository:
    """A model's repository at one commit: as the hub lists it, or as the local cache has it."""

    id: str
    commit: str
    files: tuple[HubFile, ...]
    online: bool

    @property
    def folder(self) -> Path:
        """Where its files are in the hub's cache."""
        return _storage(self.id) / "snapshots" / self.commit

    def matching(self, patterns: Sequence[str]) -> list[HubFile]:
        """The files at the top of the repository whose names match."""
        return [
            file
            for file in self.files
            if "/" not in file.path and any(fnmatch.fnmatch(file.path, p) for p in patterns)
        ]

    def named(self, paths: Sequence[str]) -> list[HubFile]:
        by_path = {file.path: file for file in self.files}
        if lacking := [path for path in paths if path not in by_path]:
            where = "the hub" if self.online else "the hub's local cache, and the hub is not asked"
            raise SourceError(f"{self.id} has no {lacking[0]} on {where}: check the name")
        return [by_path[path] for path in paths]


def _storage(id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{id.replace('/', '--')}"


def open_repository(name: HubName, revision: str | None, local_files_only: bool) -> Repository:
    """The repository of `name`: from the hub, or from the local cache if the hub cannot be asked.

    Raises `SourceError`.
    """
    revision = revision or name.revision
    why = "--local-files-only is set"
    if not local_files_only:
        try:
            return _listed(name.id, revision)
        except Exception as error:  # huggingface_hub raises its transport's errors too
            if isinstance(error, HfHubHTTPError) and not _unreachable(error):
                raise SourceError(_refused(name, revision, error)) from None
            what = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else reason(error)
            why = f"{_host()} is unreachable ({what})"
            if isinstance(error, HfHubHTTPError):
                why = f"{_host()} answers {_status(error)}"
    if (kept := _kept(name.id, revision)) is not None:
        return kept
    remedy = "unset HF_HUB_OFFLINE" if constants.is_offline_mode() else "check the connection"
    remedy = "leave --local-files-only out" if local_files_only else remedy
    raise SourceError(
        f"model {name.text!r} not found: no such folder, not downloaded, and {why}: "
        f"check the name, or {remedy}"
    )


@functools.lru_cache(maxsize=8)
def _listed(id: str, revision: str | None) -> Repository:
    info = huggingface_hub.HfApi().model_info(id, revision=revision, files_metadata=True)
    files = tuple(
        HubFile(
            each.rfilename,
            each.size or 0,
            (each.lfs.sha256 if each.lfs else each.blob_id) or "",
        )
        for each in info.siblings or ()
    )
    return Repository(id, str(info.sha), files, online=True)


def forget() -> None:
    """Ask the hub again what its repositories have."""
    _listed.cache_clear()


def _kept(id: str, revision: str | None) -> Repository | None:
    """What the local cache has of a repository."""
    folder = kept_folder(id, revision)
    if folder is None:
        return None
    files = [
        HubFile(
            file.relative_to(folder).as_posix(),
            file.stat().st_size,
            file.readlink().name if file.is_symlink() else "",  # the cache links to its blobs
        )
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return Repository(id, folder.name, tuple(files), online=False)


def kept_folder(id: str, revision: str | None) -> Path | None:
    """The folder of a repository's files in the local cache, if there is one."""
    reference = _storage(id) / "refs" / (revision or constants.DEFAULT_REVISION)
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    folder = _storage(id) / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _unreachable(error: HfHubHTTPError) -> bool:
    return _status(error) >= 500 or _status(error) == 429


def _status(error: HfHubHTTPError) -> int:
    return int(getattr(error.response, "status_code", 0))


def _host() -> str:
    return constants.ENDPOINT.partition("://")[2]


def _refused(name: HubName, revision: str | None, error: HfHubHTTPError) -> str:
    """What the hub's refusal means, and what to do."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name.id}"
        return f"{name.id} is gated: accept its terms at {page}, then set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{name.id} has no revision {revision!r}: check --revision"
    if isinstance(error, RepositoryNotFoundError):
        near = similar_name(name.id)
        instead = f"did you mean {near}?" if near else "check the name, or set HF_TOKEN if private"
        return f"{_host()} has no model {name.id!r}, and there is no such folder: {instead}"
    return f"{_host()} answers {_status(error)} for {name.id}: try again, or check HF_TOKEN"


def fetch_small(repository: Repository, patterns: Sequence[str]) -> None:
    """Fetch the files at the top that match, except weights. Raises `SourceError`."""
    wanted = [file for file in repository.matching(patterns) if not _is_here(repository, file)]
    if not (repository.online and wanted):
        return
    with _telling(repository, sum(file.size for file in wanted)), _without_bars():
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(functools.partial(_link, repository), wanted))
        _note_revision(repository)


def _link(repository: Repository, file: HubFile) -> None:
    """Put a file into the snapshot's folder, from the cache's blobs if it is there already."""
    huggingface_hub.hf_hub_download(repository.id, file.path, revision=repository.commit)


def _note_revision(repository: Repository) -> None:
    """Note which commit the default revision is, so that it is found without the hub."""
    reference = _storage(repository.id) / "refs" / constants.DEFAULT_REVISION
    if _listed(repository.id, None) == repository:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repository.commit, encoding="utf-8")


def _is_here(repository: Repository, file: HubFile) -> bool:
    return (repository.folder / file.path).is_file()


def weights_of(repository: Repository) -> list[HubFile]:
    """The safetensors files that the index names, or the single one. Raises `SourceError`."""
    index = repository.folder / INDEX
    if index.is_file():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
            raise SourceError(f"{index} is damaged: fetch it again")
        return repository.named(sorted(set(named.values())))
    return repository.named([SINGLE])


def missing_bytes(repository: Repository, files: Sequence[HubFile]) -> int:
    """Bytes of `files` that are still to be fetched."""
    return sum(
        file.size - _begun(repository, file) for file in files if not _is_here(repository, file)
    )


def _part(repository: Repository, file: HubFile) -> Path:
    return _storage(repository.id) / "blobs" / f"{file.etag}.offload.incomplete"


def _begun(repository: Repository, file: HubFile) -> int:
    part = _part(repository, file)
    return part.stat().st_size if part.is_file() else 0


def check_room(repository: Repository, files: Sequence[HubFile]) -> None:
    """Raise `SourceError` if the disk of the hub's cache has no room for `files`."""
    needed, cache = missing_bytes(repository, files), existing(Path(constants.HF_HUB_CACHE))
    if needed > (free := shutil.disk_usage(cache).free):
        raise SourceError(
            f"the download needs {gib(needed)} and {cache} has {gib(free)} free: free some space, "
            "or set HF_HOME to a folder on another disk"
        )


def fetch_large(repository: Repository, files: Sequence[HubFile]) -> Path:
    """Fetch `files` with a progress bar; a file that was interrupted goes on where it stopped.

    Returns the folder that they are in. Raises `SourceError`.
    """
    wanted = [file for file in files if not _is_here(repository, file)]
    if not wanted:
        return repository.folder
    check_room(repository, files)
    missing, stop = missing_bytes(repository, wanted), threading.Event()
    with (
        _telling(repository, missing),
        _without_bars(),
        Progress(f"fetching {repository.id}", total=missing, unit="bytes") as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        fetch = functools.partial(_fetch, repository, progress=progress, stop=stop)
        try:
            list(pool.map(fetch, wanted))
        except BaseException:  # Ctrl-C too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    _note_revision(repository)
    return repository.folder


def fetch_headers(repository: Repository, files: Sequence[HubFile]) -> Path:
    """A folder with the headers of GGUF `files`, each as long as the whole file but empty behind.

    Raises `SourceError`.
    """
    folder = Path(_scratch().name) / repository.commit
    with _telling(repository, HEADER * len(files)):
        for file in files:
            path = folder / file.path
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            url = huggingface_hub.hf_hub_url(repository.id, file.path, revision=repository.commit)
            headers = build_hf_headers() | {"Range": f"bytes=0-{HEADER - 1}"}
            with get_session().stream("GET", url, headers=headers, timeout=30) as response:
                hf_raise_for_status(response)
                with path.open("wb") as handle:
                    for chunk in response.iter_bytes(CHUNK):
                        handle.write(chunk)
                        if handle.tell() >= HEADER:
                            break
                    handle.truncate(file.size)
    return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when the program ends."""
    return tempfile.TemporaryDirectory(prefix="offload-headers-")


def _fetch(
    repository: Repository, file: HubFile, progress: Progress, stop: threading.Event
) -> None:
    part = _part(repository, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    blob = part.with_name(file.etag)
    with FileLock(f"{part}.lock"):
        if not blob.exists() and 0 < file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _download(repository, file, part, progress, stop)
            part.replace(blob)
    Path(f"{part}.lock").unlink(missing_ok=True)
    _link(repository, file)


def _download(
    repository: Repository, file: HubFile, part: Path, progress: Progress, stop: threading.Event
) -> None:
    url = huggingface_hub.hf_hub_url(repository.id, file.path, revision=repository.commit)
    tries = 0
    with part.open("ab") as handle:
        furthest = handle.tell()
        while (begun := handle.tell()) < file.size and tries < TRIES:
            failure = None
            try:
                headers = build_hf_headers() | ({"Range": f"bytes={begun}-"} if begun else {})
                with get_session().stream("GET", url, headers=headers, timeout=30) as response:
                    hf_raise_for_status(response)
                    if begun and response.status_code != 206:  # it sends the whole file again
                        handle.truncate(handle.seek(0))
                    for chunk in response.iter_bytes():
                        if stop.is_set():
                            return
                        handle.write(chunk)
                        progress.advance(len(chunk), len(chunk))
            except Exception as error:  # of a transport whose errors are not known here
                handle.flush()
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    raise  # no room, or the hub refuses
                failure = error
            tries = tries + 1 if handle.tell() <= furthest else 0
            furthest = max(furthest, handle.tell())
            if failure is not None and (tries == TRIES or stop.is_set()):
                raise failure
    if part.stat().st_size != file.size:
        part.unlink()
        raise SourceError(f"{file.path} of {repository.id} came with another size: fetch it again")


@contextmanager
def _telling(repository: Repository, size: int) -> Iterator[None]:
    """Turn what goes wrong in a download into a `SourceError` that says what it was."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        cache = existing(Path(constants.HF_HUB_CACHE))
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # it would only say that something happened
        if isinstance(error, HfHubHTTPError) and not _unreachable(error):
            text = _refused(HubName(repository.id, repository.id), None, error)
        elif isinstance(error, OSError) and error.errno in _FULL:
            free = gib(shutil.disk_usage(cache).free)
            text = (
                f"{cache} has no room for {repository.id}, {gib(size)} ({free} are free): free "
                "some space, or set HF_HOME to a folder on another disk"
            )
        elif (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, ConnectionError | TimeoutError)
        ):
            text = f"{cache} cannot be written ({error.strerror}): set HF_HOME to another folder"
        else:
            text = (
                f"the connection to {_host()} was lost while {repository.id} was fetched "
                f"({reason(error)}): run the same command again, which continues where it stopped"
            )
        raise SourceError(text) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide huggingface_hub's own progress bars."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def gguf_models(repository: Repository) -> dict[str, list[HubFile]]:
    """The GGUF models of a repository: the path of the first file -> all files, in order."""
    models: dict[str, list[HubFile]] = {}
    for file in sorted(repository.files, key=lambda file: file.path):
        base = Path(file.path).name.casefold()
        if base.endswith(".gguf") and not base.startswith("mmproj"):
            models.setdefault(_PART.sub(".gguf", file.path), []).append(file)
    return {files[0].path: files for files in models.values()}


def quant_of(path: str) -> str:
    """The quantisation that the name of a GGUF file ends with, like Q4_K_M; "" if none."""
    stem = _PART.sub(".gguf", Path(path).name).removesuffix(".gguf")
    found = re.split(r"[-.]", stem)
    for at in range(len(found)):
        if match := _QUANT.fullmatch("-".join(found[at:])):
            return match[0].upper()
    return ""


def gguf_files_of(repository: Repository, name: HubName) -> list[HubFile]:
    """The files of the GGUF model that `name` stands for. Raises `SourceError`."""
    models = gguf_models(repository)
    if name.file:
        wanted = [files for files in models.values() if name.file in [f.path for f in files]]
    elif name.quant:
        wanted = [f for path, f in models.items() if quant_of(path) == name.quant.upper()]
    else:
        wanted = list(models.values())
    if len(wanted) == 1:
        files = wanted[0]
        if (part := _PART.search(files[0].path)) and len(files) != int(part[2]):
            raise SourceError(
                f"{name.id} has {len(files)} of the {part[2].lstrip('0')} parts of "
                f"{files[0].path}: fetch the others"
            )
        return files
    what = name.file or name.quant
    lacks = f"no {what}" if what and not wanted else f"{len(wanted)} GGUF models"
    choices = ", ".join(_choice(name.id, path, files) for path, files in models.items())
    if not models and (name.file or name.quant):
        raise SourceError(f"{name.id} has no GGUF files: write {name.id} alone")
    if not models:
        raise SourceError(
            f"{name.id} has neither config.json nor GGUF files: it is not a model that can be run"
        )
    raise SourceError(f"{name.id} has {lacks}: name one of {choices}")


def _choice(id: str, path: str, files: Sequence[HubFile]) -> str:
    quant = quant_of(path)
    written = f"{id}:{quant}" if quant else f"{id}/{path}"
    return f"{written} ({gib(sum(file.size for file in files), 1)})"
