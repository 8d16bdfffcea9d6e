"""The rules that split a text into words before merges, by llama.cpp's names (tokenizer.ggml.pre).

Each regex splits what the ones before it left, and is of Oniguruma's kind. Where llama.cpp's own
regex only approximates the one in the models' tokenizer.json, the latter stands here.
"""


def _words(
    numbers: str,
    *,
    letters: str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
    signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    lines: str = r"\s*[\r\n]+",
) -> str:
    """The regex of GPT-4's family, of which models change one part or another."""
    parts = (letters, numbers, signs, lines, r"\s+(?!\S)", r"\s+")
    return "|".join(part for part in parts if part)


def _cased(ending: str, marks: str = "") -> str:
    """Letters in which an upper case begins a new word; `marks` are letters that do not count."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{marks}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{marks}]"
    return "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{more}{lower}{most}{ending}"
        for more, most in (("*", "+"), ("+", "*"))
    )


_LLAMA3 = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_CAMEL = _words(r"\p{N}{1,3}", letters=_cased(_CONTRACTED), signs=_SLASHED)
_QWEN2 = _words(r"\p{N}")
_LINES = r"[^\n]+|\n+"
_KANJI = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EAST = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SIGNED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK = _words("", letters=_SIGNED, signs=r" ?[\p{P}\p{S}]+[\r\n]*")
_LATIN = (  # the letters with upper and lower case that DeepSeek-LLM counts
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling",
        (_GPT2,),
    ),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        (r"\p{N}", _GPT2),
    ),
    (
        f"{_LLAMA3} dbrx smaug-bpe glm4 glm5 chatglm-bpe",
        (_words(r"\p{N}{1,3}"),),
    ),
    ("qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2", (_QWEN2,)),
    (
        "qwen35",
        (
            _words(
                r"\p{N}",
                letters=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            ),
        ),
    ),
    ("laguna", (_LINES, _QWEN2)),
    (
        "bailingmoe bailingmoe2 llada-moe",
        (
            _words(
                r"\p{N}",
                letters=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+",
                lines=r"\s*[\r\n]",
            ),
        ),
    ),
    (
        "exaone-moe",
        (
            _words(
                r"\p{N}",
                letters=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
                r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                lines=r"\s*[\r\n]",
            ),
        ),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", (_CAMEL,)),
    ("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", _CAMEL)),
    ("tekken", (_words(r"\p{N}", letters=_cased(""), signs=_SLASHED),)),
    (
        "kimi-k2",
        (_words(r"\p{N}{1,3}", letters=r"\p{Han}+|" + _cased(_CONTRACTED, r"&&[^\p{Han}]")),),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", (r"\p{N}{1,3}", _KANJI, _DEEPSEEK)),
    (
        "deepseek-llm",
        (
            r"[\r\n]",
            rf"\s?[{_LATIN}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _EAST,
            r"\p{N}+",
        ),
    ),
    ("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}")),
    (
        "afmoe",
        (
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            r"[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
            r"\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
            r"\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            _DEEPSEEK,
        ),
    ),
    ("gemma4 sarvam-moe", (_LINES,)),
    ("default", (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
)
SPLITS = {name: regexes for names, regexes in _GROUPS for name in names.split()}
CHARACTERS = ("gemma4", "sarvam-moe")  # merges join characters, not bytes
# A text begins with bos unless the file says no.
BEGINNING = {*_LLAMA3.split(), "tekken", "gemma4"}
# A word that is in the vocabulary is one token, whatever the merges make of it.
WHOLE = {*_LLAMA3.split(), "tekken", "glm4", "glm5"}
