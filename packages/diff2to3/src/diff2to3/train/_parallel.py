"""Many processes: how a stage is spread over them, and whole tensors of what is split."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from diff2to3._errors import InputError
from diff2to3.train._config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this process among those that its launcher (or torchrun) started.

    Raises:
        InputError: a tracker is missing, or sharding does not fit the number of processes or the optimizer.
    """
    for tracker in config.trackers:
        if find_spec(tracker) is None:
            raise InputError(f"trackers: {tracker} is not installed: pip install {tracker}")
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else "bf16",
        cpu=config.device == "cpu",
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.out), logging_dir=str(config.out / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if config.sharding == "fsdp2":
        if accelerator.num_processes == 1:
            raise InputError("sharding: fsdp2 needs several processes; start them with `accelerate launch`")
        if config.optimizer == "muon":
            raise InputError("sharding: fsdp2 splits the matrices that muon needs whole; take optimizer: adamw")
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise InputError(f"sharding: fsdp2 needs torch 2.7 or newer, this is {torch.__version__}")
    return accelerator


def shard(stage: nn.Module, accelerator: Accelerator) -> None:
    """Splits what learns over the processes, in place (FSDP2); optimizers are to be made afterwards.

    PyTorch's own function, since Accelerate's asks for GPUs. Every block is gathered on its own. Products compute in
    bfloat16 by autocast, as without sharding, so parameters and gradients travel in float32 and losses are the same.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(stage):
        fully_shard(block, mesh=mesh)
    fully_shard(stage, mesh=mesh, ignored_params={p for p in stage.parameters() if not p.requires_grad})


@contextmanager
def unsynchronised(wrapped: nn.Module) -> Iterator[None]:
    """A backward in the block keeps its gradients to this process; the first one after it adds and averages them."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)
    elif isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    else:
        yield


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model: the entries of its lists of modules, of those that learn."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList):
            yield from blocks(child)
        elif any(p.requires_grad for p in child.parameters()):
            yield child


def recompute_blocks(model: nn.Module) -> None:
    """Lets every block keep its inputs alone and compute the rest again in the backward, in place."""
    for block in blocks(model):
        plain = block.forward

        def forward(*arguments, plain=plain, **options):
            if not torch.is_grad_enabled():
                return plain(*arguments, **options)
            return checkpoint(plain, *arguments, use_reentrant=False, **options)

        block.forward = forward  # type: ignore[method-assign]


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts in one tensor; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor as `example` is split over the processes, or as it is; on its device."""
    value = value.to(example.device)
    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def gather_back(stage: nn.Module) -> None:
    """Frees parameters that a forward without a backward left gathered, so that the next one sees changed ones."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_root(stage: nn.Module) -> None:
    """Gathers parameters outside the blocks, for calls of a model's methods that do not go through the stage."""
    if isinstance(stage, FSDPModule):
        stage.unshard()
