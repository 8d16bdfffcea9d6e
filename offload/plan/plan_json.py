"""A plan for programs.

Knows: keys; everything is in bytes and tokens a second. Does not know: how a plan is made
(`offload.plan`).
"""

from __future__ import annotations

from typing import Any

from offload.budget.placement import Share
from offload.cache.simulate.forecast import Forecast
from offload.plan.plan import Row
from offload.plan.plan_part import Plan
from offload.plan.report import notes


def to_json(plan: Plan, command: str, traced: bool) -> dict[str, Any]:
    """Everything, in bytes and tokens a second."""
    outline, target = plan.outline, plan.target
    info = plan.rows[0].info
    return {
        "model": outline.name,
        "model_type": outline.config.model_type,
        "parameters": info.parameters,
        "active_parameters": outline.active_parameters(info),
        "layers": len(info.layers),
        "experts": info.total_experts,
        "top_k": outline.top_k,
        "download_bytes": outline.download_bytes,
        "machine": {
            "name": target.name,
            "cards": target.cards,
            "device": target.device.type,
            "memory_bytes": target.memory.device,
            "ram_bytes": target.memory.ram,
            "memory_gb_per_s": target.hardware.memory_gb_per_s,
            "link_gb_per_s": target.hardware.link_gb_per_s,
            "disk_gb_per_s": target.hardware.disk_gb_per_s,
        },
        "context": plan.context,
        "rows": [_row_json(row) for row in plan.rows],
        "chosen": None if plan.chosen is None else plan.rows.index(plan.chosen),
        "command": None if plan.chosen is None else command,
        "remedy": plan.remedy or None,
        "notes": list(notes(plan, traced)),
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "bits": str(row.bits),
        "recipe": str(row.recipe),
        "expert_bytes": row.info.expert_bytes,
        "slot_bytes": row.info.slot_bytes,
        "pack_bytes": row.pack_bytes,
        "dense_bytes": row.budget.dense,
        "kv_cache_bytes": row.budget.kv_cache,
        "workspace_bytes": row.budget.workspace,
        "staging_bytes": row.staging_bytes,
        "prompt_tokens_at_once": row.chunk,
        "slots": row.slots,
        "cards": [_share_json(share) for share in row.shares],
        "engine": "device" if row.on_device else "host",
        "rest_in": row.rest,
        "disk_share": row.disk_share,
        "refusal": row.refusal or None,
        "tokens_per_s": None if row.forecast is None else _forecast_json(row.forecast),
    }


def _share_json(share: Share) -> dict[str, Any]:
    return {
        "layers": len(share.blocks),
        "experts": share.experts,
        "slots": share.slots,
        "dense_bytes": share.dense,
        "kv_cache_bytes": share.kv_cache,
    }


def _forecast_json(forecast: Forecast) -> dict[str, Any]:
    return {
        "low": forecast.low,
        "usual": forecast.usual,
        "high": forecast.high,
        "loaded_bytes": forecast.loaded_bytes,
        "limited_by": forecast.limited_by,
    }
