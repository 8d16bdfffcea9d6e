"""Which engine plans a model's steps: the host's, or the device's where it can.

Knows: their names, and what is said when the asked one cannot be had. Does not know: what either
needs (`offload.device.making` does).
"""

from __future__ import annotations

import logging

from offload.cache.cache import ExpertCache
from offload.cache.guesses import Lookahead
from offload.engine.engine import Engine
from offload.engine.handle import Decoding, Options
from offload.errors import UnsupportedModelError
from offload.quant.errors import OffloadError
from offload.quant.pack import PackInfo
from offload.transfer.host import Transfer
from offload.transfer.per_card import cache_of, compute_of

logger = logging.getLogger("offload")

ENGINES = ("auto", "host", "device")


def check_engine(name: str) -> None:
    """Raise `UnsupportedModelError` for a name that is none."""
    if name not in ENGINES:
        raise UnsupportedModelError(f"there is no engine {name!r}: choose {' or '.join(ENGINES)}")


def make_engine(
    asked: str, info: PackInfo, options: Options, transfer: Transfer, ahead: Lookahead, k: int
) -> tuple[Engine, Decoding | None]:
    """The engine, and what gives tokens a step behind where that is possible.

    With several cards it is the host's, which is said where the device's was asked for or to be
    expected. Raises `OffloadError` where `asked` is the device's and there is no GPU.
    """
    residency = options.residency
    cache, compute = cache_of(info, options), compute_of(info, transfer)
    cuda = options.device.type == "cuda"
    wants_device = asked == "device" or (asked == "auto" and cuda)
    if not isinstance(cache, ExpertCache) or options.cards:
        if wants_device:
            logger.warning("steps are planned on the host: the model is on several cards")
    elif wants_device:
        refused = ""
        try:
            from offload.engine.device import make as making
            from offload.generation.tokens import Loops
        except ImportError as error:
            refused = f"it needs Triton ({error})"
        else:
            wanted = making.Wanted(residency, ahead, options.slots, k, options.staging)
            refused = making.why_not(wanted, transfer)
            if not refused:
                engine = making.make(info, cache, transfer, compute, wanted)
                return engine, Loops(engine)
        if not cuda:
            raise OffloadError(f"there is no device-planned engine here: {refused}: choose host")
        logger.warning("steps are planned on the host, with a wait at every layer: %s", refused)
    balance = residency.balance()
    return Engine(info, cache, transfer, compute, balance, ahead, options.staging), None
