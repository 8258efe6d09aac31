"""A trainer and a rollout that follows it, in two processes: what changed goes over, exactly.

    python examples/rl_weight_sync.py

prints (which codec is taken depends on how fast the machine is found to be)

    version 0: 2101 KB of 2101 KB (dense)
    version 1: 38 KB of 2101 KB (gap_ulp), 55x fewer
    version 2: 35 KB of 2101 KB (gap_ulp), 60x fewer
    version 3: 33 KB of 2101 KB (gap_ulp), 64x fewer
    version 4: 32 KB of 2101 KB (gap_ulp), 66x fewer
    version 5: 32 KB of 2101 KB (gap_ulp), 66x fewer
    the rollout serves version 5; all bits are equal: True
"""

import hashlib
import multiprocessing
from typing import Any

import torch
from torch import nn

from planaria.rl_sync import Publisher, Subscriber


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 512),
                         nn.GELU(), nn.Linear(512, 512))  # fmt: skip


def bits(net: nn.Module) -> str:
    """A hash of all weights in bf16."""
    data = [p.detach().to(torch.bfloat16).view(torch.uint8).numpy() for p in net.parameters()]
    return hashlib.sha256(b"".join(map(bytes, data))).hexdigest()


def rollout(url: str, last: int, said: Any) -> None:
    net = model().to(torch.bfloat16)
    with Subscriber(net, url) as subscriber:
        for version in range(last + 1):
            subscriber.update(at_least=version)  # wholly or not at all
            with subscriber.serving():  # the weights stay those of one version in here
                net(torch.randn(8, 256, dtype=torch.bfloat16))
        said.put((subscriber.version, bits(net)))


def main(last: int = 5) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    processes = multiprocessing.get_context("spawn")
    said = processes.Queue()
    # 100 Mb/s: on a faster link a larger, quicker codec is chosen.
    with Publisher(net, "tcp://127.0.0.1:0", dtype=torch.bfloat16, rate=12.5e6) as publisher:
        worker = processes.Process(target=rollout, args=(publisher.url, last, said))
        worker.start()
        for version in range(last + 1):
            optimizer.zero_grad()
            net(torch.randn(64, 256)).square().mean().backward()
            optimizer.step()
            report = publisher.publish(version, wait_for=1)
            size, dense = report.bytes // 1000, report.dense_bytes // 1000
            fewer = "" if report.base_version is None else f", {dense / size:.0f}x fewer"
            print(f"version {version}: {size} KB of {dense} KB ({report.codec}){fewer}")
        served, theirs = said.get(timeout=60)
        worker.join(60)
        print(f"the rollout serves version {served}; all bits are equal: {theirs == bits(net)}")


if __name__ == "__main__":
    main()
