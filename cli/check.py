"""`offload check`: a model beside its reference, and beside what it was before.

Knows: its flags, its table or JSON, when it fails. Does not know: how two models are compared
(`offload.quality`).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from offload.quant.errors import OffloadError

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_model_flags, add_window_flags
from cli.model import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add(commands: Commands) -> None:
    """The command and its flags."""
    check = commands.add(
        "check",
        run,
        "how far a model is from a reference: KL divergence, top-1 agreement, perplexity",
        "offload check demo --bits q4 --against demo --save-baseline demo-q4.json",
    )
    add_model_flags(check, context=512)
    group = check.add_argument_group("comparison")
    group.add_argument(
        "--against",
        required=True,
        metavar="REFERENCE",
        help="checkpoint (run at 16 bits, for which a pack as large as it is written), pack, hub "
        "id, or demo",
    )
    group.add_argument(
        "--plain", action="store_true", help="run the reference by transformers alone, in memory"
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="texts, each under a line `--- NAME` (prose, code, maths, dialogue, Hebrew)",
    )
    group.add_argument(
        "--baseline", type=Path, metavar="FILE", help="fail when a figure is worse than it allows"
    )
    group.add_argument(
        "--save-baseline", type=Path, metavar="FILE", help="write the figures for --baseline"
    )
    add_window_flags(check)
    check.add_argument("--json", action="store_true", help="write JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from offload.progress import Ticker
    from offload.quality.baseline import TOLERANCES, read_baseline, save_baseline
    from offload.quality.check import ModelLoader, compare_models, load_plain, reference_bits
    from offload.quality.comparison import table
    from offload.quality.prompts import read_prompts
    from offload.quality.scoring import Sliding

    prompts = read_prompts(arguments.prompts)
    # A file that cannot be used is told before two models are run.
    baseline = read_baseline(arguments.baseline) if arguments.baseline else None
    if arguments.save_baseline and not arguments.save_baseline.resolve().parent.is_dir():
        raise OffloadError(f"there is no folder for {arguments.save_baseline}: make it first")
    other = {
        "model": arguments.against,
        "revision": arguments.revision if arguments.against == arguments.model else None,
        "bits": reference_bits(arguments.against),
        "expert_bits": None,
        "dense_bits": None,
        "group_size": None,
    }
    against = argparse.Namespace(**{**vars(arguments), **other})

    def plain() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_plain(
            against.model,
            device=against.device,
            revision=against.revision,
            local_files_only=against.local_files_only,
            trust_remote_code=against.trust_remote_code,
        )

    with Ticker("check") as ticker:
        result = compare_models(
            ModelLoader(arguments.model, lambda: load_model(arguments)[:2]),
            ModelLoader(
                against.model, plain if arguments.plain else lambda: load_model(against)[:2]
            ),
            prompts,
            Sliding.asked(arguments.ctx_size, arguments.stride),
            ticker,
        )
    changes = baseline.worse(result) if baseline else ()
    if baseline and baseline.settings != result.model.settings:
        print(f"the baseline was measured with {baseline.settings}", file=sys.stderr)
    if arguments.json:
        worse = None if baseline is None else [asdict(change) for change in changes]
        print(json.dumps({**result.to_json(), "worse": worse}, indent=2, ensure_ascii=False))
    else:
        print(table([*result.named(), ("all", result.overall)]))
    if changes:
        what = "; ".join(map(str, changes))
        raise OffloadError(f"worse than {arguments.baseline} allows: {what}")
    if baseline:
        print(f"no worse than {arguments.baseline} allows", file=sys.stderr)
    if arguments.save_baseline:
        save_baseline(
            arguments.save_baseline, result, baseline.tolerances if baseline else TOLERANCES
        )
        print(f"figures saved in {arguments.save_baseline}", file=sys.stderr)
    return DONE
