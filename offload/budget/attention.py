"""What attention keeps beside its inputs: the scores of every token with every other, or nothing.

Knows: which of transformers' attentions a model is given, and how large its scores are. Does not
know: how much memory there is (`offload.budget`).

Where a model's class has no fused attention (`_supports_sdpa`: gpt-oss has sinks, which torch's
does not know), transformers falls back on "eager": scores [heads, tokens, context] as a tensor, and
what becomes of them beside it.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from offload.errors import UnsupportedModelError
from offload.model.seam import model_class

# Tensors of the scores' size at once. gpt-oss holds three (scores; with sinks; their softmax), the
# eager attention of most others one of 16 bits, its softmax in float32, which counts twice, and
# that in 16 bits again.
ALIVE = 4


def keeps_scores(config: PreTrainedConfig) -> bool:
    """Whether the model of `config` gets eager attention, as transformers 5.23 chooses.

    What code of a checkpoint's own does is not known before it runs: it counts as fused.
    """
    asked = getattr(config, "_attn_implementation", None)
    if asked is not None:
        return bool(asked == "eager")
    try:
        return not model_class(config, "", trust_remote_code=False)._supports_sdpa
    except UnsupportedModelError:
        return False


def score_bytes(config: PreTrainedConfig, context: int, itemsize: int) -> int:
    """Bytes that attention to `context` tokens keeps for each token of a prompt's chunk."""
    if not keeps_scores(config):
        return 0
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text]
    heads = max(int(getattr(layer, "num_attention_heads", None) or 0) for layer in layers)
    return ALIVE * heads * context * itemsize
