"""The kill switch on episodes that teach nothing: a run that mostly fails stops, and says why, instead of going on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from palaestra.errors import WorkerError
from palaestra.types import Episode, Outcome

_OURS = (Outcome.INFRA_ERROR, Outcome.UNSCORABLE)


class FailureWatch:
    """Looks at the last `window` episodes: how many failed on our side, and how many got no advantage at all."""

    def __init__(
        self, max_failure_rate: float, max_invalid_rate: float, *, is_valid: Callable[[Outcome], bool], window: int = 64
    ) -> None:
        self._max_failure_rate = max_failure_rate
        self._max_invalid_rate = max_invalid_rate
        self._is_valid = is_valid
        self._recent: deque[Episode] = deque(maxlen=window)

    def see(self, episode: Episode) -> None:
        """Count an episode; raises `WorkerError` once a full window has more failures than allowed.

        One that was cut at its group's deadline counts as one without an advantage: what hangs would be cut for ever.
        """
        self._recent.append(episode)
        if len(self._recent) < (self._recent.maxlen or 0):
            return
        failed = [e for e in self._recent if e.outcome in _OURS]
        if len(failed) > self._max_failure_rate * len(self._recent):
            raise WorkerError(
                f"{len(failed)} of the last {len(self._recent)} episodes failed on our side; most often, in "
                f"{_commonest(failed)}"
            )
        invalid = [e for e in self._recent if not self._is_valid(e.outcome)]
        if len(invalid) > self._max_invalid_rate * len(self._recent):
            outcomes = ", ".join(f"{count} {name}" for name, count in Counter(map(_outcome, invalid)).items())
            raise WorkerError(
                f"{len(invalid)} of the last {len(self._recent)} episodes got no advantage ({outcomes}): what is left "
                "to train on is no fair sample; raise the limits of the environment, group_timeout_s, or "
                "max_invalid_rate"
            )


def _outcome(episode: Episode) -> str:
    return "late" if episode.outcome is Outcome.CANCELLED else episode.outcome.value


def _commonest(failed: list[Episode]) -> str:
    told = Counter(
        f"{e.env_id}: {e.failure.kind if e.failure else e.outcome}: {e.failure.message if e.failure else ''}"
        for e in failed
    )
    return told.most_common(1)[0][0]
