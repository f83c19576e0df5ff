"""A sweep's experiments on the nodes of a Ray cluster: which nodes, what is asked of them, and what if one is lost."""

import contextlib
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune import agent, params, runs, sharing
from finetune.clones import PATIENCE, Repository, identity
from finetune.errors import UserError
from finetune.slots import Job, Slot

from tqdm import tqdm

LOCAL = "local"
CONNECT = 10  # seconds in which a cluster takes a connection
ANSWER = 60  # seconds in which a node says which versions it has
SHOWN = 5  # nodes in an error


class Nodes:
    """The nodes of a cluster that may run experiments of `cpus` cores and `gpus` GPUs each (None: 1, if there are any).

    Raises UserError where there is none, or one has other versions than this machine.
    """

    def __init__(self, repository: Repository, url: str, cpus: float, gpus: float | None):
        import ray

        self.repository, self.url = repository, url
        self.identity = identity(repository.root)
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") and params.load().device != "cpu" else 0
        self.wanted = {"CPU": cpus, "GPU": gpus}
        self.versions = agent.versions()
        self.refused: dict[str, str] = {}  # ids of nodes that are not used, and why
        self.has_noted = False
        self.variables = {}
        if os.environ.get("CHECKPOINTS_DIR"):
            self.variables["CHECKPOINTS_DIR"] = str(Path(repository.root, runs.store_folder()))
        self._check_versions()

    def able(self) -> dict[str, int]:
        """Return the ids of the nodes that are alive, not refused and large enough, with how many slots each has."""
        import ray

        found = {}
        for node in ray.nodes():
            has = node["Resources"]
            slots = min((has.get(what, 0) / number for what, number in self.wanted.items() if number), default=0)
            if node["Alive"] and slots >= 1 and node["NodeID"] not in self.refused:
                found[node["NodeID"]] = int(slots)
        return found

    def slots(self, number: int | None) -> Iterator["NodeSlot"]:
        """Yield that many slots, or as many as the nodes have."""
        for _ in range(number or sum(self.able().values())):
            yield NodeSlot(self)

    def refuse(self, node: str, name: str, why: str) -> None:
        """Use a node no more. Raises UserError where there is no other."""
        if node not in self.refused:
            self.refused[node] = why
            tqdm.write(f"{name} ({node[:8]}) is not used: {why}")
        if not self.able():
            raise UserError(f"no node of the cluster is left that can run experiments. The last one {why}")

    def note_wait(self, seconds: float) -> None:
        """Say once that a slot waits for long."""
        if seconds > PATIENCE and not self.has_noted:
            self.has_noted = True
            tqdm.write("waiting for a node with room, or for one that is slow to clone: see `ray status`")

    def _check_versions(self) -> None:
        """Raise UserError where there is no node for the experiments, or one has other versions than this machine."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        able = self.able()
        if not able:
            wanted = ", ".join(f"{number:g} {what}" for what, number in self.wanted.items() if number)
            raise UserError(f"no node of the cluster has what an experiment wants: {wanted}. See: ray status")
        task = ray.remote(num_cpus=0)(agent.differences)
        asked = {}
        for node in able:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[task.options(scheduling_strategy=there, max_retries=0).remote(self.versions)] = node
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
        problems = {asked[each]: f"has not answered within {ANSWER} s" for each in silent}
        for each in answered:
            try:
                problems[asked[each]] = ray.get(each)
            except ray.exceptions.RayError as error:
                problems[asked[each]] = f"can't run a task: {str(error).splitlines()[0]}"
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        said = [f"{names[node]} ({node[:8]}) {problem}" for node, problem in problems.items() if problem]
        if said:
            more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
            raise UserError(
                "nodes of the cluster differ from this machine, so that trials would not compare:\n"
                + "\n".join([*said[:SHOWN], *more])
            )


class NodeSlot(Slot):
    """An actor on a node, which Ray chooses; another one after that node is lost or left."""

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.actor: Any = None
        self._request()

    def _request(self) -> None:
        """Ask Ray for an actor, which comes when a node has room, instead of the one before."""
        import ray

        if self.actor:
            ray.kill(self.actor)
        self._asked = time.monotonic()
        self.place, self.node_name = None, "a node"
        nodes = self.nodes
        options: dict[str, Any] = {"num_cpus": nodes.wanted["CPU"], "num_gpus": nodes.wanted["GPU"]}
        if nodes.refused:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(nodes.refused)})"}
        self.actor = ray.remote(agent.Agent).options(**options).remote()
        self._place = self.actor.place.remote().future()
        self._ready = self.actor.set_up.remote(
            nodes.url, nodes.repository.commit, nodes.versions, nodes.variables, nodes.identity
        ).future()

    @property
    def is_ready(self) -> bool:
        """Whether there is an actor that has all it needs. Raises UserError where no node is left."""
        import ray

        if not self._ready.done():
            self.nodes.note_wait(time.monotonic() - self._asked)
            return False
        try:
            self.place, self.node_name = self._place.result()
            if problem := self._ready.result():
                self.leave(problem)
        except ray.exceptions.RayTaskError as error:
            self.leave(f"can't be set up: {error.cause}")
        except ray.exceptions.RayError:  # it went while it was set up
            self._request()
            return False
        if self.place in self.nodes.refused:
            self._request()
            return False
        return True

    def leave(self, why: str) -> None:
        self.nodes.refuse(str(self.place), self.node_name, why)

    def lose(self, name: str) -> None:
        """Ask for an actor elsewhere, after this one's node was lost with an experiment."""
        tqdm.write(f"{name}: {self.node_name} ({str(self.place)[:8]}) was lost; it goes on elsewhere")
        self._request()

    def run(self, name: str, overrides: Sequence[str], log: Path) -> "NodeJob":
        return NodeJob(self, name, overrides, log)

    def hand_back(self, name: str) -> None:
        sharing.fetch(self.nodes.repository, name)

    def close(self) -> None:
        import ray

        ray.kill(self.actor)


class NodeJob(Job):
    """An experiment on a node, seen by asking its actor again as soon as it has answered."""

    slot: NodeSlot

    def __init__(self, slot: NodeSlot, name: str, overrides: Sequence[str], log: Path):
        self.slot, self.name, self.log = slot, name, log
        self._lines: list[str] = []
        self._status: int | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"on {slot.node_name} ({str(slot.place)[:8]})\n")
        slot.actor.start.remote(name, list(overrides))  # what goes wrong there, look says
        self._look()

    def _look(self) -> None:
        self._answer = self.slot.actor.look.remote().future()

    @property
    def status(self) -> int | None:
        import ray

        if self._status is None and self._answer.done():
            try:
                lines, self._status = self._answer.result()
            except ray.exceptions.RayTaskError as error:
                lines, self._status = [f"error: {error.cause}"], 1
            except ray.exceptions.RayError:
                lines, self._status, self.is_lost = [], 1, True
                self.slot.lose(self.name)
            self._lines += lines
            with open(self.log, "a") as file:
                file.writelines(f"{line}\n" for line in lines)
            if self._status is None:
                self._look()
        return self._status

    def lines(self) -> Iterator[str]:
        lines, self._lines = self._lines, []
        yield from lines

    def ask_to_stop(self) -> None:
        self.slot.actor.ask_to_stop.remote()

    def stop(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # it is gone
            ray.get(self.slot.actor.stop.remote(), timeout=PATIENCE + agent.WAIT)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to the cluster at an address, or to one of this machine alone, 'local'. Raises UserError."""
    try:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        import ray
    except ModuleNotFoundError:
        raise UserError("--ray needs Ray, which is not installed: pip install -r requirements-ray.txt") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of what it will do
    ray.cloudpickle.register_pickle_by_value(agent)
    _check_reachable(address)
    try:
        where: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:  # RuntimeError: other versions of Ray or Python
        said = " ".join(str(error).split())
        raise UserError(f"--ray {address}: {said}\nStart a cluster: ray start --head. See docs/ray.md") from None
    for number, handler in handlers.items():  # Ray has set its own
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise UserError where nobody listens at a HOST:PORT, as Ray would try for minutes."""
    if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=CONNECT).close()
        except OSError as error:
            raise UserError(f"--ray {address}: {error}.\nStart a cluster: ray start --head. See docs/ray.md") from None
