"""torchrun restarts a run whose worker is killed, on one node or two, and it ends with the same losses."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import elastic
from tests.helpers.processes import run_processes


def rows(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.json without times."""
    lines = (folder / "run" / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "time" not in k and k != "eta_seconds"} for x in lines]


def run_agents(nodes: int, processes: int, *arguments: str) -> None:
    """Run tests/helpers/elastic.py under torchrun, with one agent for each node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "--nnodes": nodes,
        "--nproc-per-node": processes,
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"127.0.0.1:{port}",
        "--rdzv-id": "test",
        "--max-restarts": 1,
        "--monitor-interval": 0.1,
        "--local-addr": "127.0.0.1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", *(f"{k}={v}" for k, v in options.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    agents = [
        subprocess.Popen(
            [*command, elastic.__file__, *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(nodes)
    ]
    try:
        for agent in agents:
            _, error = agent.communicate(timeout=300)
            assert agent.returncode == 0, error[-5000:]
    finally:
        for agent in agents:
            agent.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "nodes, processes, parallel, killed", [(1, 2, "ddp", 0), (2, 1, "fsdp", 1)], ids=["one node", "two nodes"]
)
def test_a_killed_worker_is_restarted(
    tmp_path: Path, nodes: int, processes: int, parallel: str, killed: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, run):
        folder.mkdir()
    run_agents(nodes, processes, str(run), parallel, str(killed))
    run_processes(elastic.train, nodes * processes, tmp_path / "processes", str(whole), parallel)

    assert (run / "killed").exists() and not (whole / "killed").exists()
    found = rows(run)
    assert [row["iteration"] for row in found] == list(range(9)) and "toy/error" in found[-1]
    assert found == rows(whole)  # exactly
    assert not (run / "run" / "old_1").exists()  # it was resumed without --resume
    assert re.search("Loading from .*model_0000003.pth", (run / "run" / "log.txt").read_text())
