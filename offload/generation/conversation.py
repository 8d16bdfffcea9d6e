"""Messages as OpenAI's interface has them become what chat templates read."""

import json
from typing import Any, NamedTuple

Message = dict[str, Any]  # "role" and "content", and what chat templates know beside them
SHAPES = (
    'write "a text", {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, as '
    "JSON on one line"
)


class Conversation(NamedTuple):
    """What a line gives to the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    arguments: dict[str, Any]


def conversation_of(given: dict[str, Any], system: str) -> Conversation:
    """The conversation of a prompt line, after the `system` prompt unless it brings its own.

    Messages become what chat templates read: contents are texts, and the arguments of a tool call
    are an object. Raises `ValueError`, which says what is wrong.
    """
    said = given.get("messages", [{"role": "user", "content": given.get("prompt")}])
    if not isinstance(said, list) or not said:
        raise ValueError(SHAPES)
    messages = [_message(message) for message in said]
    last = messages[-1]
    if "tool_calls" in last:
        raise ValueError("the last message calls a tool: add the message in which the tool answers")
    if not last["content"]:
        raise ValueError("the last message is empty: write its text, or leave it out")
    tools, arguments = given.get("tools") or [], given.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of objects')
    if not isinstance(arguments, dict):
        raise ValueError('"chat_template_kwargs" must be an object')
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, tools, arguments)


def _message(given: Any) -> Message:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ValueError(SHAPES)
    made, content, calls = dict(given), given.get("content"), given.get("tool_calls")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if foreign := [kind for kind in kinds if kind != "text"]:
            raise ValueError(f"a content has a part of type {foreign[0]!r}: only text can be read")
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if calls is None:
        made.pop("tool_calls", None)
    elif isinstance(calls, list) and calls:
        made["tool_calls"], content = [_called(call) for call in calls], content or ""
    else:
        raise ValueError('"tool_calls" must be a list of calls')
    if not isinstance(content, str):
        raise ValueError(SHAPES)
    return {**made, "content": content}


def _called(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object; OpenAI writes them as a text."""
    try:
        function = dict(call["function"])
        given = function["arguments"]
        function["arguments"] = dict(json.loads(given) if isinstance(given, str) else given)
        return {**call, "function": function}
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(
            'a tool call must be {"type": "function", "function": {"name": "...", "arguments": '
            '"{...}"}}'
        ) from None
