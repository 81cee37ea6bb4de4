"""Four ranks keep their steps in one another's memory; one after the other is killed and replaced, and what comes back is held against what was saved.

    python memory_kills.py FOLDER LAYOUT [--kills N] [--seed N]           LAYOUT is `fsdp` or `ddp`

Each rank trains without a word to the others, saves step after step, and says before each save what its state is (a digest) and after it
that it was committed. One rank, at random, is ended by SIGKILL at a random moment. The others hear of it from the save that fails, meet with
the new rank in a new group, and restore: the step must not be older than the last that any of them heard was committed, and the state of each rank
must have the digest that the rank in that place said when it saved it. FOLDER holds the files by which they meet, and no state.

Ranks are forks of this process, which has loaded torch and has no threads.
"""

import argparse
import faulthandler
import os
import random
import select
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # Else each new rank loads it, when it makes its model.
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from datastore.checkpoint.places.memory import MemoryCheckpointer
from datastore.digest import digest_hex
from datastore.errors import WaitError

WORLD = 4
WAIT_S = 120.0


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def program(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that the ranks share as `layout` says, with a step of AdamW behind it, so that there is state."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(301, 503), nn.Linear(503, 601), nn.BatchNorm1d(601))
    if layout == "fsdp":
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return (DistributedDataParallel(model) if layout == "ddp" else model), optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take a step that needs no other rank: the gradient follows from its number, and is the same on ranks that hold the same."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = parameter.detach() * 0.01 + step % 7 - number
    optimizer.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, int]) -> str:
    """Return a digest of all that this rank has of the state."""
    state: dict[str, Any] = {f"m {name}": value for name, value in model.state_dict().items()}
    for number, held in optimizer.state_dict()["state"].items():
        state |= {f"o {number} {name}": value for name, value in held.items()}
    tensors = {name: local(value).contiguous().reshape(-1).view(torch.uint8) for name, value in sorted(state.items())}
    whole = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors.items())
    return digest_hex(whole + repr(data).encode())


def rank_program(folder: Path, layout: str, rank: int, turn: int, tell: int) -> None:
    """Take part from the meeting `turn` on, until somebody ends this process."""

    def say(*words: object) -> None:
        os.write(tell, f"{rank} {' '.join(map(str, words))}\n".encode())

    memory: MemoryCheckpointer | None = None
    while True:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{turn}",
            rank=rank,
            world_size=WORLD,
            timeout=timedelta(seconds=WAIT_S),
        )
        group = dist.new_group(backend="gloo")
        model, optimizer = program(layout)
        data = {"step": 0}
        items = {"model": model, "optim": optimizer, "data": data}
        fresh = memory is None
        if memory is None:
            memory = MemoryCheckpointer(group, timeout_s=WAIT_S)
        if turn:
            found = memory.restore(items, group=None if fresh else group, fresh=turn % 2 == 0)
            say("restored", turn, found.step, digest(model, optimizer, data))
            assert data["step"] == found.step
        say("ready", turn)
        try:
            while True:
                data["step"] += 1
                with memory.guard():
                    train(model, optimizer, data["step"])
                say("saves", turn, data["step"], digest(model, optimizer, data))
                handle = memory.save(data["step"], items)
                if data["step"] % 3:
                    handle.committed()
                    say("committed", turn, data["step"])
        except WaitError as error:
            say("heard", turn, error.fact)
        dist.destroy_process_group()
        turn += 1


class Ranks:
    """The processes, and what they have said."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.layout = folder, layout
        self.reads, self.tell = os.pipe()
        self.ids = [self.start(rank, 0) for rank in range(WORLD)]
        self.said: list[list[str]] = []
        self._rest = b""

    def start(self, rank: int, turn: int) -> int:
        child = os.fork()
        if child:
            return child
        faulthandler.register(signal.SIGUSR1)
        try:
            rank_program(self.folder, self.layout, rank, turn, self.tell)
        except BaseException as error:  # noqa: BLE001 - told, and the process ends
            sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(1)

    def listen(self, until_s: float) -> None:
        """Take in what is said for so long."""
        deadline = time.monotonic() + until_s
        while time.monotonic() < deadline:
            if not select.select([self.reads], [], [], max(deadline - time.monotonic(), 0))[0]:
                return
            *lines, self._rest = (self._rest + os.read(self.reads, 65536)).split(b"\n")
            self.said += [line.decode().split() for line in lines]

    def await_all(self, word: str, turn: int, *, ranks: int = WORLD) -> None:
        """Listen until so many ranks have said `word` at the meeting `turn`."""
        deadline = time.monotonic() + WAIT_S
        while len({words[0] for words in self.said if words[1:3] == [word, str(turn)]}) < ranks:
            if time.monotonic() > deadline:
                self.show()
                raise AssertionError(f"not all said {word} {turn}: {self.said[-8:]}")
            self.listen(0.005)

    def show(self) -> None:
        """Have each rank print where it stands."""
        for child in self.ids:
            os.kill(child, signal.SIGUSR1)
        time.sleep(1)

    def replace(self, rank: int, turn: int) -> None:
        """End one rank, and start another in its place."""
        os.kill(self.ids[rank], signal.SIGKILL)
        os.waitpid(self.ids[rank], 0)
        self.ids[rank] = self.start(rank, turn)

    def end(self) -> None:
        for child in self.ids:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def check(said: list[list[str]], turn: int) -> int:
    """Hold what the ranks restored at the meeting `turn` against what was said before; return the step.

    Raises:
        AssertionError: it is another state, or an older step than one that was committed.
    """
    before = [words for words in said if int(words[2]) < turn]
    restored = {int(words[0]): words[3:] for words in said if words[1:3] == ["restored", str(turn)]}
    steps = {int(step) for step, _ in restored.values()}
    assert len(steps) == 1, restored
    step = steps.pop()
    committed = max((int(words[3]) for words in before if words[1] == "committed"), default=0)
    assert step >= committed, f"step {committed} was committed, {step} came back"
    for rank, (_, digest_now) in restored.items():
        saved = [words[4] for words in before if words[:2] == [str(rank), "saves"] and words[3] == str(step)]
        assert saved[-1] == digest_now, f"rank {rank} has another state at step {step}"
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("layout", choices=("fsdp", "ddp"))
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    ranks = Ranks(options.folder, options.layout)
    step = 0
    try:
        for turn in range(options.kills):
            ranks.await_all("ready", turn)
            if turn:
                step = check(ranks.said, turn)
            # The first time a step must be there to come back to.
            ranks.await_all(rng.choice(["ready", "saves", "committed"]) if turn else "committed", turn, ranks=1)
            ranks.listen(rng.uniform(0, 0.08))
            ranks.replace(rng.randrange(WORLD), turn + 1)
        ranks.await_all("ready", options.kills)
        step = check(ranks.said, options.kills)
    finally:
        ranks.end()
    sys.stdout.write(f"{options.kills} kills, {step} steps\n")


if __name__ == "__main__":
    main()
