"""What Python callers write as a prompt: texts, messages, and token ids in every form."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.keywords import check_names
from offload.sampling import is_number

Encoded = Tensor | np.ndarray[Any, Any] | Mapping[str, Any]  # one prompt, or a row for each
FORMS = "give a text, a list of messages, or token ids"


def check_call(
    function: str, model: Any, tokenizer: Any, given: Iterable[str], known: Collection[str]
) -> None:
    """Check the arguments of `function` but its prompt. Raises `OffloadError`."""
    check_names(function, given, known)
    offload_of(model)
    if tokenizer is not None and not callable(tokenizer):
        raise GenerationError(f"the tokenizer is {tokenizer!r}: give the one that load returned")


def plain(prompt: Any) -> tuple[bool, Any]:
    """Whether `prompt` is a batch, and the prompt with lists of numbers for tensors and arrays.

    Ids may be a list, a tensor, an array, or what a tokenizer returns for one text or for several,
    whose attention mask tells ids from padding. A batch has a row for each prompt. Raises
    `GenerationError`.
    """
    if isinstance(prompt, str):
        return False, prompt
    if isinstance(prompt, bytes | bytearray):
        raise GenerationError("the prompt is bytes: decode it to a text")
    if isinstance(prompt, Mapping):
        return _encoding(prompt)
    if hasattr(prompt, "tolist"):  # a tensor of torch, an array of NumPy
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise GenerationError(f"the prompt is {str(prompt)[:40]}: {FORMS}")
    kinds = {_kind(item) for item in prompt}
    if len(kinds) > 1:
        raise GenerationError(f"the prompt mixes {' and '.join(sorted(kinds))}: {FORMS}")
    if kinds == {"token ids"}:
        return False, [int(item) for item in prompt]
    if kinds == {"texts"}:
        return True, list(prompt)
    if kinds == {"rows"}:
        return True, [single(item) for item in prompt]
    return False, list(prompt)


def single(prompt: Any) -> Any:
    """The prompt that `plain` makes of `prompt`; of a batch that has one row, this row.

    Raises `GenerationError` for more rows.
    """
    many, rows = plain(prompt)
    if many and len(rows) != 1:
        raise GenerationError(f"this is a batch of {len(rows)} prompts: give it to generate")
    return rows[0] if many else rows


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "texts"
    if is_number(item, Integral):
        return "token ids"
    if isinstance(item, Mapping) and "input_ids" not in item:
        if "role" not in item:
            raise GenerationError(f"a message has no 'role': {str(item)[:40]}")
        if "content" not in item and "tool_calls" not in item:
            raise GenerationError(f"a message has no 'content': {str(item)[:40]}")
        if not isinstance(content := item.get("content"), str | Sequence | None):
            raise GenerationError(f"the content of a message is {str(content)[:40]}: give a text")
        return "messages"
    if isinstance(item, Mapping | Sequence) or hasattr(item, "tolist"):
        return "rows"
    raise GenerationError(f"the prompt has {item!r} in it: {FORMS}")


def _encoding(prompt: Mapping[str, Any]) -> tuple[bool, Any]:
    """`plain` of what a tokenizer returns."""
    if "role" in prompt:
        raise GenerationError("the prompt is one message: put it into a list, [message]")
    if "input_ids" not in prompt:
        raise GenerationError(f"the prompt is a dict without input_ids: {FORMS}")
    many, ids = plain(prompt["input_ids"])
    if prompt.get("attention_mask") is None:
        return many, ids
    mask = plain(prompt["attention_mask"])[1]
    rows, masks = (ids, mask) if many else ([ids], [mask])
    kept = [
        [token for token, real in zip(row, reals, strict=True) if real]
        for row, reals in zip(rows, masks, strict=True)
    ]
    return many, kept if many else kept[0]
