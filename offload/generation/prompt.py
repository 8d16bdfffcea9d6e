"""A prompt becomes token ids and a checked request, and reuses the KV cache of the previous one."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.inputs import single
from offload.lines import is_memory, reason
from offload.model.sources import end_ids
from offload.sampling import is_number

Message = dict[str, str]  # with the keys "role" and "content"
Prompt = str | Sequence[Message] | Sequence[int]
DEFAULT_NEW_TOKENS = 256


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, *, think: bool | None = None
) -> list[int]:
    """Token ids of a prompt: a text as it stands, messages through the chat template, or ids.

    The template receives `think` as `enable_thinking`, or nothing if `think` is None. Raises
    `GenerationError` if the prompt cannot be encoded or is empty. A template that never ends is
    stopped by Ctrl-C.
    """
    prompt = single(prompt)
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        ids = [int(item) for item in prompt]  # type: ignore[arg-type]
    elif tokenizer is None:
        raise GenerationError("the model has no tokenizer: give token ids instead of text")
    elif isinstance(prompt, str):
        ids = _tokens(tokenizer, prompt)
    elif not tokenizer.chat_template:
        raise GenerationError("the model has no chat template: give the prompt as a text")
    else:
        thinking = {} if think is None else {"enable_thinking": think}
        try:
            text = tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True, **thinking
            )
        except Exception as error:  # a template is the checkpoint's own program
            if is_memory(error):
                raise
            raise GenerationError(f"the chat template refused the messages: {error}") from None
        ids = _tokens(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise GenerationError("the prompt is empty")
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    try:
        text.encode("utf-8")
        return list(tokenizer(text, **options)["input_ids"])
    except UnicodeEncodeError as error:  # Python keeps bytes that are not UTF-8 as surrogates
        near = text[max(0, error.start - 20) : error.start]
        raise GenerationError(
            f"the prompt is not UTF-8 text (after {near!r}): correct it and send it again"
        ) from None
    except Exception as error:  # a tokenizer built from damaged files may raise anything
        if is_memory(error):
            raise
        raise GenerationError(
            f"the tokenizer cannot read the prompt ({type(error).__name__}: {reason(error)}): "
            "its files are damaged, fetch them again"
        ) from None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Ids that end a sequence: those of `generation_config`, otherwise the tokenizer's."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    return end_ids(ids)


@dataclass(frozen=True)
class Request:
    """A prompt that was checked and can be answered."""

    ids: list[int]
    limit: int  # new tokens at most
    stops: list[str]


def check_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    max_new_tokens: int | None,
    stop_strings: str | Sequence[str] | None,
) -> Request:
    """Check the arguments of `stream_generate`. Raises `GenerationError`."""
    limit = max_new_tokens
    if limit is None:
        limit = getattr(model.generation_config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
    if not is_number(limit, Integral) or limit < 1:
        raise GenerationError(f"max_new_tokens is {limit!r}: it must be a whole number, at least 1")
    if offload_of(model).engine.closed:
        raise GenerationError("the model was closed: load it again")
    ids = encode_prompt(tokenizer, prompt)
    vocabulary = model.config.get_text_config().vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise GenerationError(f"the prompt has a token outside the model's {vocabulary}")
    context = check_length(model, ids)
    stops = [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise GenerationError(f"stop_strings is {stop_strings!r}: give a text or a list of texts")
    if stops and tokenizer is None:
        raise GenerationError("stop strings need a tokenizer, and the model has none")
    return Request(ids, min(limit, context - len(ids)), [stop for stop in stops if stop])


def check_length(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """Return how many tokens the context holds. Raises `GenerationError` if `ids` leave no room
    for an answer."""
    context = offload_of(model).fit.options.context
    if len(ids) >= context:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and the context holds {context}: shorten it or "
            "raise --ctx-size"
        )
    return context


class PromptCache:
    """The KV cache of a prompt and its answer, kept for a next prompt that begins alike.

    It is empty while an answer is made, so that an answer which breaks off cannot leave a half
    written cache behind.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = None  # transformers' `Cache`

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return len(self._ids)

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """Take out the cache, cut back to the ids that it shares with `prompt`, and their number.

        The cache is None if it shares none. At least one token of the prompt is left to be
        read. A layer that has dropped older tokens (a sliding window) or holds only a sum of them
        (linear attention) cannot be cut back; it serves only prompts that contain everything it
        has read.
        """
        held, cache = self._ids, self._cache
        self.forget()
        same = 0
        for old, new in zip(held, prompt[:-1], strict=False):
            if old != new:
                break
            same += 1
        if cache is None or not same:
            return None, 0
        if same < len(held):
            if not cache.is_croppable:
                return None, 0
            try:
                cache.crop(same - len(held))
            except RuntimeError:  # some layers were cut and others cannot be: drop the whole cache
                return None, 0
        return cache, same

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """Hold `cache`, which has read exactly `ids`. None means that no cache is available."""
        self._ids, self._cache = list(ids), cache

    def forget(self) -> None:
        """Hold nothing."""
        self._ids, self._cache = [], None
