"""What a simulation found, as values and as lines."""

from __future__ import annotations

from dataclasses import dataclass

from offload.cache.statistics import LayerCounts


@dataclass
class Phase:
    """Prefill or decode: its tokens, and the parts of the device's time, whose sum is `seconds`."""

    tokens: int = 0
    dense_seconds: float = 0.0  # attention, shared experts, head
    expert_seconds: float = 0.0
    host_seconds: float = 0.0  # the device stood still because nothing was queued
    start_seconds: float = 0.0  # the device started kernels that were queued
    urgent_wait_seconds: float = 0.0  # the device stood still for an urgent copy
    guess_wait_seconds: float = 0.0  # the device stood still for a right guess that was late
    loads: int = 0
    loaded_bytes: int = 0
    dropped: int = 0  # guesses given up before their copies began
    copy_seconds: float = 0.0  # of those loads, over all links
    disk_seconds: float = 0.0  # the part of `copy_seconds` for records that RAM did not hold

    @property
    def seconds(self) -> float:
        waits = self.urgent_wait_seconds + self.guess_wait_seconds
        compute = self.dense_seconds + self.expert_seconds
        return compute + self.host_seconds + self.start_seconds + waits

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def shares(self) -> dict[str, float]:
        """Name of a part of the time -> its share."""
        parts = {
            "dense": self.dense_seconds,
            "experts": self.expert_seconds,
            "host": self.host_seconds,
            "starting kernels": self.start_seconds,
            "waiting for loads": self.urgent_wait_seconds,
            "waiting for guesses": self.guess_wait_seconds,
        }
        return {name: part / (self.seconds or 1.0) for name, part in parts.items()}

    @property
    def limited_by(self) -> str:
        """What the device spends most of its time on."""
        waits = self.urgent_wait_seconds + self.guess_wait_seconds
        carrier = "the disk" if self.disk_seconds > self.copy_seconds / 2 else "the link"
        parts = {
            "device memory": self.dense_seconds + self.expert_seconds,
            "the host": self.host_seconds,
            "kernel starts": self.start_seconds,
            carrier: waits,
        }
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class SimulatedRun:
    """A trace on a machine. `decode` and `prefill` together are all of its time."""

    decode: Phase
    prefill: Phase
    links: int
    slots: int
    total_experts: int
    counts: LayerCounts  # of the cache, in both phases
    guess_delay_seconds: float  # that urgent copies waited for guesses under way

    @property
    def seconds(self) -> float:
        return self.decode.seconds + self.prefill.seconds

    @property
    def link_use(self) -> float:
        """Share of the decode time in which a link is copying, averaged over links."""
        seconds = self.decode.seconds * self.links
        return self.decode.copy_seconds / seconds if seconds else 0.0

    def lines(self) -> list[str]:
        """Speed, waits, use of the link, parts of the time and what limits the speed, as text."""
        rows = []
        if self.prefill.tokens:
            rows.append(f"prefill  {self.prefill.tokens_per_s:8.1f} tokens/s")
        decode = self.decode
        if not decode.tokens:
            return rows
        loads = decode.loads / decode.tokens
        mib = decode.loaded_bytes / 2**20 / decode.tokens
        waits = decode.urgent_wait_seconds + decode.guess_wait_seconds
        rows += [
            f"decode   {decode.tokens_per_s:8.1f} tokens/s, "
            f"{1e3 * decode.seconds / decode.tokens:.1f} ms/token, limited by {decode.limited_by}",
            f"experts  {self.slots}/{self.total_experts} resident, hits "
            f"{self.counts.hit_rate:.1%}, {loads:.1f} loads and {mib:.1f} MiB/token",
            f"link     {self.link_use:.0%} busy, {1e3 * waits / decode.tokens:.2f} ms/token waited",
            "time     " + ", ".join(f"{n} {s:.0%}" for n, s in decode.shares().items() if s > 5e-4),
        ]
        if self.counts.lookahead_guesses:
            rows.append(
                f"guesses  precision {self.counts.lookahead_precision:.0%}, recall "
                f"{self.counts.lookahead_recall:.0%}, {self.counts.lookahead_loads} loaded"
            )
        return rows
