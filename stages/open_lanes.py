"""Open lanes: of each stream of a stage those that this process reads, from where the last checkpoint left them."""

from __future__ import annotations

from rich.markup import escape

from mixing.bad_rows import BadRow
from mixing.lanes import LaneReader, State
from mixing.mixture import StageMixture
from stages.checkpoint import Checkpoint
from stages.run import Run


class Lanes:
    """The streams of a stage as this process reads them."""

    def __init__(self, readers: dict[str, LaneReader], bad: list[BadRow], waits: list[str], others: dict[str, dict[str, State]]) -> None:
        self.readers, self._bad, self._waits, self.others = readers, bad, waits, others

    def states(self, mixture: StageMixture, step: int) -> dict[str, dict[str, State]]:
        """Source to lane to its place once the stage has made so many steps: this process's lanes."""
        drawn = mixture.order.drawn_after(step)
        return {
            name: {str(lane): state for lane, state in reader.states(sum(count for (source, _), count in drawn.items() if source == name)).items()}
            for name, reader in self.readers.items()
        }

    def take_bad(self) -> list[BadRow]:
        """Rows left out since the last call."""
        taken, self._bad[:] = list(self._bad), []
        return taken

    def take_waits(self) -> list[str]:
        """What was waited for since the last call, and how long."""
        taken, self._waits[:] = list(self._waits), []
        return taken

    def close(self) -> None:
        """End the reading threads."""
        for reader in self.readers.values():
            reader.close()


def open_lanes(run: Run, mixture: StageMixture, checkpoint: Checkpoint | None) -> Lanes:
    """This process's lanes of each stream. checkpoint: the one that the stage goes on from. Raises ValueError if there are more processes than lanes, or than images in a step."""
    saved: dict[str, dict[str, State]] = checkpoint.state.get("lanes", {}) if checkpoint else {}
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    readers, bad, waits = dict[str, LaneReader](), list[BadRow](), list[str]()

    def stalled(message: str) -> None:
        waits.append(message)
        run.log.say(f"[yellow]waiting:[/yellow] {escape(message)}")

    mixture.check_processes(checkpoint.step if checkpoint and not checkpoint.state["finished"] else 0, processes)
    for name, selection in mixture.streams.items():
        assert selection.stream is not None
        number = selection.stream.num_lanes
        states = {int(lane): state for lane, state in saved.get(name, {}).items() if int(lane) % processes == rank}
        readers[name] = selection.stream.lanes(range(rank, number, processes), states, on_bad=bad.append, stalled=stalled)
    return Lanes(readers, bad, waits, {name: states for name, states in saved.items() if name not in readers})
