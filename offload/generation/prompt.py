"""A prompt becomes token ids and a checked request, and reuses the KV cache of the previous one."""

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.conversation import Message
from offload.generation.inputs import single
from offload.lines import is_memory, reason
from offload.model.sources import end_ids
from offload.sampling import is_number

logger = logging.getLogger("offload")
Prompt = str | Sequence[Message] | Sequence[int]
DEFAULT_NEW_TOKENS = 256
# The switch for thinking in the templates of, in this order: Qwen3, GLM and Gemma; DeepSeek,
# Granite and Kimi; Cohere.
THINK = ("enable_thinking", "thinking", "reasoning")
# What templates get from here, under the names that transformers and this file have for it.
OWN = ["self", "tokenizer", "messages", "conversation", "tools", "tokenize"]
OWN += ["add_generation_prompt", "continue_final_message"]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    *,
    think: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt: a text as it stands, messages through the chat template, or ids.

    The template receives `tools`, `arguments` and, unless it is None, `think` under the names of
    `THINK`. A last message of the assistant is continued. A system prompt that the template refuses
    or leaves out goes in front of the first message, and the log says so once. Raises
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
        given = {**dict.fromkeys(THINK if think is not None else (), think), **(arguments or {})}
        if own := [name for name in OWN if name in given]:
            raise GenerationError(f"the chat template's {own[0]!r} cannot be given: leave it out")
        messages: list[Any] = list(prompt)
        text = _with_system(tokenizer, messages, tools=tools, **given)
        if tools and text == _with_system(tokenizer, messages, **given):
            raise GenerationError("the model's chat template takes no tools: leave them out")
        ids = _tokens(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise GenerationError("the prompt is empty")
    return ids


def can_switch_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a switch for thinking, so that `think` changes its text."""
    hello = [{"role": "user", "content": "Hello"}]
    on, off = (_templated(tokenizer, hello, **dict.fromkeys(THINK, to)) for to in (True, False))
    return on != off


def check_switch(tokenizer: PreTrainedTokenizerBase, model: str, think: bool | None) -> None:
    """Raise `GenerationError` if the user asked to `think`, or not, and `model` has no switch."""
    if think is not None and not can_switch_thinking(tokenizer):
        raise GenerationError(
            f"the chat template of {model} has no switch for thinking: leave --think or --no-think "
            "out"
        )


def _with_system(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], **arguments: Any
) -> str:
    """The text of `messages`, with the system prompt in the first message if need be."""
    asks = len(messages) > 1 and messages[0]["role"] == "system" and messages[0]["content"]
    if not asks or messages[1]["role"] != "user":
        return _templated(tokenizer, messages, **arguments)
    system, first, *rest = messages
    joined = {**first, "content": f"{system['content']}\n\n{first['content']}"}
    try:
        text = _templated(tokenizer, messages, **arguments)
    except GenerationError as refused:
        with contextlib.suppress(GenerationError):
            text = _templated(tokenizer, [joined, *rest], **arguments)
            _tell_joined(str(tokenizer.chat_template))
            return text
        raise refused from None
    with contextlib.suppress(GenerationError):  # a template may insist on a system prompt
        if text == _templated(tokenizer, [first, *rest], **arguments):
            text = _templated(tokenizer, [joined, *rest], **arguments)
            _tell_joined(str(tokenizer.chat_template))
    return text


@functools.cache
def _tell_joined(_template: str) -> None:
    """Log once for each template."""
    logger.warning(
        "the model's chat template takes no system prompt: it is put in front of the first message"
    )


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **arguments: Any
) -> str:
    """The text that the chat template makes of `messages`. Raises `GenerationError`."""
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **arguments,
            )
        )
    except Exception as error:  # a template is the checkpoint's own program
        if is_memory(error):
            raise
        raise GenerationError(f"the chat template refused the messages: {error}") from None


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
    """Ids that end a sequence: those of the generation config, the tokenizer and the config.

    A config's class gives an id even to a file that names none, and it may be an ordinary word of
    the vocabulary. With a tokenizer, an id of the config only counts if it is a special token.
    """
    given = model.generation_config
    ends = end_ids(given.eos_token_id) if given is not None else frozenset()
    if tokenizer is None:
        return ends
    special = {token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    config = frozenset[int]()
    for part in (model.config, model.config.get_text_config()):
        config |= end_ids(getattr(part, "eos_token_id", None))
    if given is not None and given._from_model_config:  # there is no generation_config.json
        config, ends = config | ends, frozenset()
    return ends | end_ids(tokenizer.eos_token_id) | (config & special)


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
