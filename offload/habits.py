"""Words of llama.cpp, ollama, mlx-lm and LM Studio: what each is here, or what replaces it.

They are those of these programs' documentation and sources of August 2026, and a few that older
versions had and people still type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from offload.lines import did_you_mean

# Other programs' commands -> the same here, with what follows the word.
SAME_COMMANDS = {"run": "chat", "ls": "list", "remove": "rm", "perplexity": "ppl", "get": "pull"}
_NO_SERVER = "there is no server yet: use offload chat, offload generate, or load() in Python"
_MADE = "a model is made from a checkpoint: offload quantize SRC DST"
_NOTHING_RUNS = "nothing stays loaded after a command ends, so there is nothing to {}"
OTHER_COMMANDS = {
    "serve": _NO_SERVER,
    "server": _NO_SERVER,
    "start": _NO_SERVER,
    "launch": _NO_SERVER,
    "ps": _NOTHING_RUNS.format("list"),
    "stop": _NOTHING_RUNS.format("stop"),
    "unload": _NOTHING_RUNS.format("unload"),
    "load": "each command loads the model that it names: offload chat MODEL",
    "import": "a checkpoint folder or .gguf file is used where it lies: offload chat PATH",
    "create": _MADE,
    "convert": _MADE,
    "cp": "packs are folders: copy one with cp",
    "push": "packs are folders: hf upload sends one to the hub",
    "login": "hf auth login stores the key to models that ask for one",
    "search": "models are found on huggingface.co: offload plan ID tells whether one fits",
}

# Other programs' flags -> the same here; "" stands for MODEL, which has no flag here.
SAME_FLAGS = {
    "-m": "",
    "--model": "",
    "-hf": "",
    "-hfr": "",
    "--hf-repo": "",
    "--temperature": "--temp",
    "--predict": "--n-predict",
    "--num-predict": "--n-predict",
    "--max-tokens": "--n-predict",
    "--max-new-tokens": "--n-predict",
    "--num-ctx": "--ctx-size",
    "--context-length": "--ctx-size",
    "--repetition-penalty": "--repeat-penalty",
    "--stop": "--reverse-prompt",
    "--system": "--system-prompt",
    "--hidethinking": "--hide-thoughts",
    "--max-kv-size": "--ctx-size",
    "--ignore-chat-template": "--raw",
    "--chat-template-config": "--chat-template-kwargs",
    "--think=false": "--no-think",
    "--think=true": "--think",
}
_RESIDENT = (
    "is not needed: as many experts as fit are resident; --vram and --expert-slots set limits"
)
_ATTENTION = "is not needed: torch chooses the fastest attention for this machine"
_MAPPED = "is not needed: a pack is mapped into memory, and --ram limits what is kept there"
_CHAT = "is not needed: offload chat is a conversation; -st answers one prompt"
_COLOUR = "is not needed: a terminal gets colours; NO_COLOR=1 in the environment turns them off"
_CACHE_TYPE = "has no equivalent: the KV cache has the type of the model; -c makes it smaller"
_SPLIT = "is not needed: --gpus 0,1 shares by free memory; --vram 20GiB,10GiB sets each GPU's part"
_TEMPLATE = "is not needed: the model's own chat template is used; generate --raw uses none"
_DRAFT = "has no equivalent: there is no speculative decoding"
_THINK = "is written --think or --no-think, and levels go into --chat-template-kwargs"
_BATCH = "is written -ub here: tokens of a prompt that go through the model at once"
_FORMAT = "has no equivalent: answers cannot be held to a grammar or to JSON yet"
_IMAGE = "has no equivalent: models read text only"
_LORA = "has no equivalent: merge the adapter into the checkpoint before it is quantised"
_ROPE = "has no equivalent: the model's config.json says how positions are scaled"
_KEEP = "is not needed: the model is freed when the command ends"
_SERVER = "belongs to a server, and there is none yet"
OTHER_FLAGS = {
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers", "--num-gpu"), _RESIDENT),
    **dict.fromkeys(("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"), _RESIDENT),
    **dict.fromkeys(("-ot", "--override-tensor", "-fit", "--fit"), _RESIDENT),
    **dict.fromkeys(("-fitt", "--fit-target"), _RESIDENT),
    **dict.fromkeys(("-fa", "--flash-attn"), _ATTENTION),
    **dict.fromkeys(("--mlock", "--mmap", "--no-mmap", "-dio", "--direct-io"), _MAPPED),
    **dict.fromkeys(("-lm", "--load-mode"), _MAPPED),
    **dict.fromkeys(("-rea", "--reasoning", "--reasoning-budget", "--reasoning-effort"), _THINK),
    **dict.fromkeys(("-cnv", "--conversation", "-no-cnv", "--no-conversation"), _CHAT),
    **dict.fromkeys(("-i", "--interactive", "-if", "--interactive-first"), _CHAT),
    **dict.fromkeys(("--color", "-co", "--no-color"), _COLOUR),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), _CACHE_TYPE),
    **dict.fromkeys(("-nkvo", "--no-kv-offload", "--kv-bits"), _CACHE_TYPE),
    **dict.fromkeys(("-ts", "--tensor-split", "-sm", "--split-mode"), _SPLIT),
    **dict.fromkeys(("-mg", "--main-gpu", "-dev"), "is written --device cuda:1, or --gpus 0,1"),
    **dict.fromkeys(("--jinja", "--chat-template", "--chat-template-file"), _TEMPLATE),
    **dict.fromkeys(("-md", "--model-draft", "--draft", "--draft-max", "-ngld"), _DRAFT),
    **dict.fromkeys(("--spec-type", "--spec-draft-model", "--spec-default"), _DRAFT),
    **dict.fromkeys(("--draft-model", "--num-draft-tokens"), _DRAFT),
    **dict.fromkeys(("--grammar", "--grammar-file", "-j", "--json-schema", "--format"), _FORMAT),
    **dict.fromkeys(("-jf", "--json-schema-file"), _FORMAT),
    **dict.fromkeys(("-mm", "--mmproj", "--image", "--audio", "--video"), _IMAGE),
    **dict.fromkeys(("-b", "--batch-size"), _BATCH),
    **dict.fromkeys(("--lora", "--lora-scaled", "--adapter-path"), _LORA),
    **dict.fromkeys(("--rope-scaling", "--rope-scale", "--rope-freq-base"), _ROPE),
    **dict.fromkeys(("--keepalive", "--keep-alive"), _KEEP),
    **dict.fromkeys(("--host", "--port", "-cb", "--cont-batching"), _SERVER),
    "-tb": "is not needed: -t is the number of threads for prompts and answers",
    "--nowordwrap": "is not needed: what is written to a pipe or a file is never wrapped",
    "--insecure": "has no equivalent: HF_ENDPOINT in the environment names another hub",
}


def translated(words: Iterable[str], known: Mapping[str, Any]) -> list[str]:
    """The `words` after a command, with other programs' flags in our spelling.

    `known` are the command's flags, each with its `argparse.Action`. Raises `ValueError` for a flag
    that does not exist here; the message says what replaces it. argparse would read `-ngl 99` as
    `-n gl`.
    """
    result: list[str] = []
    models: list[str] = []
    rest = iter(words)
    for word in rest:
        word = SAME_FLAGS.get(word, word) if "=" in word else word
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*models, *result, word, *rest]
        if not _is_flag(flag) or flag in known or word in known:
            result.append(word)
        elif SAME_FLAGS.get(flag) == "":
            models.append(value if equals else next(rest, flag))
        elif SAME_FLAGS.get(flag) in known:
            result.append(SAME_FLAGS[flag] + equals + value)
        elif word == "--json" and "json" in (getattr(known.get("-o"), "choices", None) or ()):
            result += ["-o", "json"]
        elif replaced := OTHER_FLAGS.get(flag) or OTHER_FLAGS.get(flag[1:]):  # --ngl is -ngl
            raise ValueError(f"{flag} {replaced}")
        elif flag.startswith("--") or flag[:2] not in known or not _is_number(flag[2:]):
            raise ValueError(f"there is no option {flag}{did_you_mean(flag, known)}")
        else:
            result.append(word)  # like -n5
    return [*models, *result]


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and " " not in word and not _is_number(word)


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).replace(",", "").isdecimal()
