"""On CUDA a rank gets its own GPU and both backends (`make test-gpu`)."""

import pytest
import torch
import torch.distributed as dist

from evovlm.launch.ranks import RankInfo, process_group


@pytest.mark.gpu
def test_process_group_reduces_on_the_gpu_and_on_the_cpu() -> None:
    with process_group(RankInfo(), "cuda", timeout=60) as world:
        assert world.device == torch.device("cuda", 0)
        for device in (world.device, torch.device("cpu")):
            value = torch.ones(3, device=device)
            dist.all_reduce(value)
            assert value.tolist() == [1.0, 1.0, 1.0]
    assert not dist.is_initialized()
